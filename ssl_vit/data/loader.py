"""From a source to batches on the training device."""

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_vit.data.sampler import SampleKey, StepSampler, sample_rng
from ssl_vit.data.sources import Source
from ssl_vit.objectives.objective import Transform


class TransformedSource(Dataset[dict[str, Tensor]]):
    """Samples of a source by key: decoded, then transformed with the sample's own generator.

    Where the source has labels, a sample holds its `label` too (-1 = none). With `skip_bad` a picture that cannot be
    decoded is replaced by the next good one, and the sample's `bad_row` names the bad one's row (-1 = was good).
    """

    def __init__(
        self, source: Source, transform: Transform, num_channels: int, seed: int, skip_bad: bool = False
    ) -> None:
        self.source, self.transform, self.num_channels, self.seed = source, transform, num_channels, seed
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        row = key.index
        if self.skip_bad:
            image, row = self.source.next_image(row, self.num_channels)
        else:
            image = self.source.image(row, self.num_channels)
        sample = self.transform(image, sample_rng(self.seed, key))
        if self.source.labels is not None:
            sample["label"] = torch.tensor(self.source.labels[row])
        if self.skip_bad:
            sample["bad_row"] = torch.tensor(-1 if row == key.index else key.index)
        return sample


def choose_num_workers(num_workers: int, device: torch.device) -> int:
    """Loader processes of each training process; -1 means chosen from the machine.

    None where the CPU trains: every core is busy with the step, and a worker that takes one away costs more than it
    hides.
    """
    if num_workers >= 0:
        return num_workers
    if device.type == "cpu":
        return 0
    return max(1, min(16, num_cpus() // num_local_processes() - 1))


def num_local_processes() -> int:
    """Training processes on this machine, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def num_cpus() -> int:
    """CPUs that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C, and SIGTERM or SIGUSR1 to the whole group, must not end the workers under a run that is about to save.

    A SIGTERM is heeded a minute late, and a second one at once: it may come from a main process that ends.
    """

    def heed_later(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        timer = threading.Timer(60, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True  # must not keep a worker alive that is done
        timer.start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, heed_later)


def read_batches(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader, with a worker's ValueError as it would be without workers.

    torch puts the worker's whole traceback into the message.
    """
    try:
        yield from loader
    except ValueError as error:
        text = str(error)
        if not text.startswith("Caught ValueError in "):
            raise
        raise ValueError(text.rpartition("\nValueError: ")[2].strip()) from None


def build_loader(
    source: Source,
    transform: Transform,
    sampler: StepSampler,
    *,
    num_channels: int,
    num_workers: int,
    device: torch.device,
    note_bad: Callable[[Tensor], None] | None = None,
) -> Generator[dict[str, Tensor], None, None]:
    """Micro-batches in the sampler's order, on `device`, as the objective takes them.

    Close it (`contextlib.closing`) to end its workers.

    Args:
        note_bad: given the `bad_row` of each batch; pictures that cannot be decoded are replaced. None = they raise.

    Raises:
        ValueError: an image cannot be decoded; see `Source.image` and `Source.next_image`.
    """
    loader = DataLoader(
        TransformedSource(source, transform, num_channels, sampler.seed, skip_bad=note_bad is not None),
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_leave_signals_to_the_main_process,
    )
    for batch in read_batches(loader):
        if note_bad is not None:
            note_bad(batch.pop("bad_row"))
        yield transform.on_device(batch, device)
