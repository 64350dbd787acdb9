"""From a source to batches on the training device."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_vit.data.sampler import SampleKey, StepSampler, sample_rng
from ssl_vit.data.sources.source import Source
from ssl_vit.data.transform import Transform
from ssl_vit.data.workers import CurrentRows, leave_signals_to_the_main_process, naming_killed_workers, shut_down


class TransformedSource(Dataset[dict[str, Tensor]]):
    """Samples of a source by key: decoded, then transformed with the sample's own generator.

    Where the source has labels, a sample holds its `label` too (-1 = none). With `skip_bad` an image that cannot be
    decoded is replaced by the next good one, and the sample's `bad_row` is the bad one's row (-1 = it was good).
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        num_channels: int,
        seed: int,
        skip_bad: bool = False,
        num_workers: int = 0,
    ) -> None:
        self.source, self.transform, self.num_channels, self.seed = source, transform, num_channels, seed
        self.skip_bad = skip_bad
        self.current = CurrentRows(num_workers)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        row = key.index
        if self.skip_bad:
            image, row = self.source.next_image(row, self.num_channels, self.current.note)
        else:
            self.current.note(row)
            image = self.source.image(row, self.num_channels)
        sample = self.transform(image, sample_rng(self.seed, key))
        if self.source.labels is not None:
            sample["label"] = torch.tensor(self.source.labels[row])
        if self.skip_bad:
            sample["bad_row"] = torch.tensor(-1 if row == key.index else key.index)
        return sample


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise a worker's ValueError as it was: torch puts the worker's whole traceback into the message."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        if not text.startswith("Caught ValueError in "):
            raise
        raise ValueError(text.rpartition("\nValueError: ")[2].strip()) from None


@contextmanager
def reading(loader: DataLoader, current: CurrentRows, where: Callable[[int], str]) -> Iterator[Iterator[Any]]:
    """The batches of a loader, with `plain_errors` and `naming_killed_workers`; its workers end with the context."""
    iterator = iter(loader)
    current.watch(iterator)
    try:
        with naming_killed_workers(current, where), plain_errors():
            yield iterator
    finally:
        shut_down(iterator)


class Batches:
    """Micro-batches in the sampler's order, on `device`, as the objective takes them.

    A context: its end ends the workers, and inside it a killed worker becomes a ValueError that names the image it was
    at, wherever torch raises the news.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        sampler: StepSampler,
        *,
        num_channels: int,
        num_workers: int,
        device: torch.device,
        note_bad: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Start no worker before the first batch.

        Args:
            note_bad: called with the `bad_row` of each batch; undecodable images are replaced. None = they raise.
        """
        self.source, self.transform, self.device, self.note_bad = source, transform, device, note_bad
        self._samples = TransformedSource(
            source, transform, num_channels, sampler.seed, skip_bad=note_bad is not None, num_workers=num_workers
        )
        self._loader = DataLoader(
            self._samples,
            batch_sampler=sampler,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=4 if num_workers else None,
            worker_init_fn=leave_signals_to_the_main_process,
        )
        self._iterator: Any = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Tensor]:
        """The next micro-batch.

        Raises:
            ValueError: an image cannot be decoded; see `Source.image` and `Source.next_image`. Or a worker was killed.
        """
        with self._naming(), plain_errors():
            if self._iterator is None:
                self._iterator = iter(self._loader)
                self._samples.current.watch(self._iterator)
            batch = next(self._iterator)
        if self.note_bad is not None:
            self.note_bad(batch.pop("bad_row"))
        return self.transform.on_device(batch, self.device)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shut_down(self._iterator)
        if isinstance(error, RuntimeError | OSError | EOFError):
            with self._naming():
                raise error

    def _naming(self) -> AbstractContextManager[None]:
        return naming_killed_workers(self._samples.current, self.source.where)
