"""Loader processes: how many, the signals they get, what each is at, and what is said when one dies."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import torch
from torch.utils.data import get_worker_info

from ssl_vit.core.machine import num_cpus, num_local_processes


def check_num_workers(num_workers: int | str) -> int | Literal["auto"]:
    """A number of loader processes as settings give it; -1, the older way of writing `auto`, becomes that.

    Raises:
        ValueError: no number of processes.
    """
    if num_workers in ("auto", -1):
        return "auto"
    if isinstance(num_workers, str) or num_workers < 0:
        raise ValueError(f"num_workers={num_workers!r}: must be at least 0, or auto")
    return num_workers


def choose_num_workers(num_workers: int | Literal["auto"], device: torch.device) -> int:
    """Loader processes of each training process; auto means chosen from the machine.

    None where the CPU trains: every core is busy with the step, and a worker that takes one away costs more than it
    hides.
    """
    if num_workers != "auto":
        return num_workers
    if device.type == "cpu":
        return 0
    return max(1, min(16, num_cpus() // num_local_processes() - 1))


def leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C, and SIGTERM or SIGUSR1 to the whole group, must not end the workers under a run that is about to save.

    A SIGTERM is heeded a minute late, and a second one at once: it may come from a main process that ends.
    """

    def heed_later(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        timer = threading.Timer(60, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True  # must not keep a worker alive that is done
        timer.start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, heed_later)


def shut_down(iterator: object) -> None:
    """End the workers of a loader's iterator, if it has any.

    Not left to the garbage collector: the traceback of an error would keep the workers alive, and the end of each of
    them would be one more error.
    """
    if hasattr(iterator, "_shutdown_workers"):
        with suppress(RuntimeError):
            iterator._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]


class CurrentRows:
    """The row that each worker of a loader is at, in memory that they share with the main process."""

    def __init__(self, num_workers: int) -> None:
        # Process id and row of each worker; -1 before it has begun.
        self._rows = torch.full((max(1, num_workers), 2), -1, dtype=torch.int64).share_memory_()

    def note(self, row: int) -> None:
        """Say what is read next; without workers nobody needs to know."""
        worker = get_worker_info()
        if worker is not None:
            place = self._rows[worker.id]
            place[0], place[1] = os.getpid(), row

    def of(self, process: int) -> int | None:
        """The row that a worker was at last, by its process id."""
        return dict(self._rows.tolist()).get(process)

    def find_killed(self) -> tuple[int, str] | None:
        """A worker that a signal has ended: its process id, and the signal's name."""
        for process in self._rows[:, 0].tolist():
            try:
                # Without taking the news away from those who wait for it.
                ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) if process > 0 else None
            except ChildProcessError:
                continue
            if ended is not None and ended.si_code != os.CLD_EXITED:
                return process, signal.strsignal(ended.si_status) or str(ended.si_status)
        return None


@contextmanager
def naming_killed_workers(rows: CurrentRows, where: Callable[[int], str]) -> Iterator[None]:
    """Turn the error about a worker that was killed into one that names the row it was at.

    torch raises it wherever the main process happens to be when the worker ends, in the middle of a step as well; or
    reading what the worker has sent fails first.

    Args:
        where: the beginning of the message for a row: where the picture is.

    Raises:
        ValueError: a worker was killed, by the system or by what it was decoding.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        found = _find_killed(rows, error)
        if found is None:
            raise
        process, name = found
        row = rows.of(process)
        begin = (
            "data.num_workers: a loader worker" if row is None else f"{where(row)}: the loader worker at this picture"
        )
        advice = "its decoder crashed: remove the picture or convert it"
        if name == signal.strsignal(signal.SIGKILL):
            advice = (
                "the system does so where memory runs out: set fewer --data.num_workers or a smaller "
                "--data.max_image_bytes, or remove the image if it is this one each time"
            )
        raise ValueError(f"{begin} was killed ({name}); {advice}") from error


def _find_killed(rows: CurrentRows, error: BaseException) -> tuple[int, str] | None:
    """The worker that an error comes from: its process id, and the name of the signal; None if it comes from none."""
    for _ in range(20):
        try:
            found = _said_to_be_killed(error) or rows.find_killed()
            if found is not None or not isinstance(error, ConnectionError | EOFError):
                return found
            time.sleep(0.1)  # a connection breaks a little before its process counts as ended
        except RuntimeError as news:
            error = news
    return None


def _said_to_be_killed(error: BaseException | None) -> tuple[int, str] | None:
    """A killed worker as torch's message names it, or that of an error before it: process id, and the signal's name."""
    while error is not None:
        said = re.match(r"DataLoader worker \(pid (\d+)\) is killed by signal: (.*?)\.? *$", str(error))
        if said is not None:
            return int(said[1]), said[2]
        error = error.__cause__ or error.__context__
    return None
