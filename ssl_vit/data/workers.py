"""Loader processes: how many, which signals they heed, which row each is at, and the error when one is killed."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from ssl_vit.core.machine import num_cpus, num_local_processes

_Result = TypeVar("_Result")


def check_num_workers(num_workers: int | str) -> int | Literal["auto"]:
    """A number of loader processes as settings give it; -1, the former spelling of `auto`, becomes `auto`.

    Raises:
        ValueError: no number of processes.
    """
    if num_workers in ("auto", -1):
        return "auto"
    if isinstance(num_workers, str) or num_workers < 0:
        raise ValueError(f"num_workers={num_workers!r}: must be at least 0, or auto")
    return num_workers


def choose_num_workers(num_workers: int | Literal["auto"], device: torch.device) -> int:
    """Loader processes of each training process; `auto` chooses from the machine.

    0 where the CPU trains: every core is busy with the step, and a worker that takes one away costs more than it hides.
    """
    if num_workers != "auto":
        return num_workers
    if device.type == "cpu":
        return 0
    return max(1, min(16, num_cpus() // num_local_processes() - 1))


def leave_signals_to_the_main_process(worker: int) -> None:
    """Let Ctrl-C, and SIGTERM or SIGUSR1 to the whole group, not end the workers of a run that is about to save.

    A first SIGTERM ends the worker a minute later, a second one at once: it may come from a main process that ends.
    """

    def heed_later(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        timer = threading.Timer(60, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True  # must not keep a worker alive that is done
        timer.start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, heed_later)


def shut_down(iterator: object) -> None:
    """End the workers of a loader's iterator, if it has any.

    The garbage collector would be too late: an error's traceback keeps the workers alive, and each of them would raise
    one more error when it ends.
    """
    if hasattr(iterator, "_shutdown_workers"):
        with suppress(RuntimeError):
            iterator._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]


class CurrentRows:
    """The row that each worker of a loader is at, in memory that the workers share with the main process."""

    def __init__(self, num_workers: int) -> None:
        # Process id and row of each worker; -1 before it has begun.
        self._rows = torch.full((max(1, num_workers), 2), -1, dtype=torch.int64).share_memory_()
        self._workers: list[Any] = []

    def note(self, row: int) -> None:
        """Note the row that is read next; does nothing without workers."""
        worker = get_worker_info()
        if worker is not None:
            entry = self._rows[worker.id]
            entry[0], entry[1] = os.getpid(), row

    def of(self, process: int) -> int | None:
        """The row that a worker was at last, by its process id."""
        return dict(self._rows.tolist()).get(process)

    def watch(self, iterator: object) -> None:
        """Remember the workers of a loader's iterator, if it has any, so that `find_killed` can ask them."""
        self._workers = list(getattr(iterator, "_workers", ()))

    def find_killed(self) -> tuple[int, str] | None:
        """A worker that a signal has ended: its process id, and the signal's name."""
        for worker in self._workers:
            if worker.pid is not None and (worker.exitcode or 0) < 0:
                return worker.pid, signal.strsignal(-worker.exitcode) or str(-worker.exitcode)
        return None


@contextmanager
def in_workers(
    work: Callable[[int], _Result],
    rows: Sequence[int],
    where: Callable[[int], str],
    *,
    num_workers: int | None = None,
    doing: str | None = None,
) -> Iterator[Iterator[_Result]]:
    """Call `work` with each row in loader processes; the context gives the results in the order of rows.

    Args:
        where: the beginning of an error about a row; see `naming_killed_workers`.
        num_workers: None = one for each CPU.
        doing: the name of a progress bar; None = no bar.
    """
    if num_workers is None:
        num_workers = num_cpus() if num_cpus() > 1 else 0
    loader = DataLoader(
        dataset := _Rows(work, rows, num_workers),
        batch_size=64,
        collate_fn=list,
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_the_main_process,
    )
    iterator = iter(loader)
    dataset.current.watch(iterator)
    every = 0.5 if sys.stderr.isatty() else 30.0  # a log file gets a line now and then
    bar = tqdm(total=len(rows), desc=doing, unit="image", mininterval=every, leave=False, disable=doing is None)

    def results() -> Iterator[Any]:
        for batch in iterator:
            yield from batch
            bar.update(len(batch))

    try:
        with naming_killed_workers(dataset.current, where), bar:
            yield results()
    finally:
        shut_down(iterator)


class _Rows(Dataset[Any]):
    def __init__(self, work: Callable[[int], Any], rows: Sequence[int], num_workers: int) -> None:
        self.work, self.rows, self.current = work, rows, CurrentRows(num_workers)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Any:
        row = int(self.rows[position])
        self.current.note(row)
        return self.work(row)


@contextmanager
def naming_killed_workers(rows: CurrentRows, where: Callable[[int], str]) -> Iterator[None]:
    """Turn the error about a worker that was killed into one that names the row it was at.

    torch raises it wherever the main process happens to be when the worker ends, also in the middle of a step; or
    reading what the worker has sent fails first.

    Args:
        where: the beginning of the message for a row: where the image is.

    Raises:
        ValueError: a worker was killed, by the system or by what it was decoding.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        killed = _find_killed(rows, error)
        if killed is None:
            raise
        process, name = killed
        row = rows.of(process)
        begin = "data.num_workers: a loader worker" if row is None else f"{where(row)}: the loader worker at this image"
        advice = "its decoder crashed: remove the image or convert it"
        if name == signal.strsignal(signal.SIGKILL):
            advice = (
                "the system does so where memory runs out: set fewer --data.num_workers or a smaller "
                "--data.max_image_bytes, or remove the image if it is this one each time"
            )
        raise ValueError(f"{begin} was killed ({name}); {advice}") from error


def _find_killed(rows: CurrentRows, error: BaseException) -> tuple[int, str] | None:
    """The worker whose end caused an error: its process id, and the name of the signal; None if there is none."""
    for _ in range(20):
        try:
            killed = _killed_by_message(error) or rows.find_killed()
            if killed is not None or not isinstance(error, ConnectionError | EOFError):
                return killed
            time.sleep(0.1)  # a connection breaks a little before its process counts as ended
        except RuntimeError as news:
            error = news
    return None


def _killed_by_message(error: BaseException | None) -> tuple[int, str] | None:
    """The killed worker that torch's message, or that of an error before it, names: process id, and signal."""
    while error is not None:
        match = re.match(r"DataLoader worker \(pid (\d+)\) is killed by signal: (.*?)\.? *$", str(error))
        if match is not None:
            return int(match[1]), match[2]
        error = error.__cause__ or error.__context__
    return None
