"""The samples that each process trains on, of one source or a mixture, as a pure function of seed and step."""

import math
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from torch.utils.data import Sampler


class SampleKey(NamedTuple):
    """One draw of one image: `position` in the shuffled order of `epoch`, `index` in the source."""

    epoch: int
    position: int
    index: int


def epoch_order(num_samples: int, seed: int, epoch: int) -> Int64[np.ndarray, " n"]:
    """The shuffled order of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(num_samples)


def sample_rng(seed: int, key: SampleKey) -> np.random.Generator:
    """The sample's own generator: its crops, colours and masks depend on seed, epoch and position alone."""
    # The fourth word keeps these streams apart from those of epoch_order.
    return np.random.default_rng((seed, key.epoch, key.position, 1))


class StepSampler(Sampler[list[SampleKey]]):
    """Micro-batches of one process, from `start_step` to `num_steps`.

    The epochs, each shuffled anew, form one endless sequence of samples, and step s takes the samples
    [s x batch_size, (s + 1) x batch_size) of it: every image is seen once an epoch, no tail is dropped, no batch is
    short, and starting at any step costs nothing. A step is cut into `num_micro` micro-batches, and each of these
    among the processes, so that neither number changes what is learned.

    With repeated augmentation (Hoffer et al. 2020, arXiv:1901.09335; Berman et al. 2019, arXiv:1902.05509) each image
    of the sequence is drawn `repeats` times in a row, each time with a generator of its own. An epoch still has
    `num_samples` draws, of a part of the images; in `repeats` epochs each is drawn `repeats` times.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        batch_size: int,
        num_steps: int,
        seed: int,
        start_step: int = 0,
        num_micro: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
        repeats: int = 1,
        order: Callable[[int, int], Int64[np.ndarray, " n"]] | None = None,
    ) -> None:
        """Begin at `start_step`.

        Args:
            repeats: draws of an image in a row.
            order: gives the `num_samples` rows of an epoch by seed and epoch; None = all rows, shuffled.
        """
        if num_samples < 1:
            raise ValueError("num_samples=0: there is nothing to train on")
        if batch_size % (num_micro * num_processes):
            raise ValueError(
                f"batch_size={batch_size}: not divisible into {num_micro} micro-batches x {num_processes} processes"
            )
        self.num_samples, self.batch_size, self.num_steps = num_samples, batch_size, num_steps
        self.seed, self.start_step, self.num_micro = seed, start_step, num_micro
        self.process_index, self.num_processes, self.repeats = process_index, num_processes, repeats
        self.order = order or partial(epoch_order, num_samples)

    def __len__(self) -> int:
        return (self.num_steps - self.start_step) * self.num_micro

    def of_step(self, step: int) -> list[list[SampleKey]]:
        """The micro-batches of this process in one step, wherever the sampler starts."""
        one = copy(self)
        one.start_step, one.num_steps = step, step + 1
        return list(one)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        size = self.batch_size // (self.num_micro * self.num_processes)
        turn, order = -1, np.empty(0, dtype=np.int64)  # of all images; an epoch where none is repeated
        for step in range(self.start_step, self.num_steps):
            for micro in range(self.num_micro):
                start = step * self.batch_size + (micro * self.num_processes + self.process_index) * size
                keys = []
                for draw in range(start, start + size):
                    wanted, place = divmod(draw // self.repeats, self.num_samples)
                    if wanted != turn:
                        turn, order = wanted, self.order(self.seed, wanted)
                    keys.append(SampleKey(*divmod(draw, self.num_samples), int(order[place])))
                yield keys


def check_weights(weights: Mapping[Any, float]) -> None:
    """Refuse weights that make no mixture.

    Raises:
        ValueError: begins with `source=`.
    """
    text = as_text(weights)
    if len(weights) < 2:
        raise ValueError(f"source={text}: a mixture has at least two sources; give a single one without braces")
    for name, weight in weights.items():
        if not name or not isinstance(name, str):
            raise ValueError(f"source={text}: {name!r} is no name; put quotes around a number that is one")
        if isinstance(weight, bool) or not math.isfinite(weight) or weight <= 0:
            raise ValueError(
                f"source={text}: the weight of {name!r} is {weight}; give a number above 0, or leave the source out"
            )


def as_text(weights: Mapping[Any, float]) -> str:
    """A mixture as it is written on the command line."""
    return "{" + ", ".join(f"{name}: {weight:g}" for name, weight in weights.items()) + "}"


@dataclass(frozen=True, eq=False)
class Mixture:
    """Which source each row comes from, and how often each source is drawn from.

    An epoch has as many draws as there are rows. Each source gets its share of them, to the nearest whole number, and
    goes through shuffled epochs of its own, so that all its images are seen equally often whatever its weight.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    origin: Int64[np.ndarray, " n"]
    """Index into `names` of each row."""

    def subset(self, rows: Int64[np.ndarray, " r"]) -> "Mixture":
        """The mixture of the given rows, in their order."""
        return replace(self, origin=self.origin[rows])

    def alike(self, row: int) -> Int64[np.ndarray, " s"]:
        """Rows of the same source, starting at `row`, wrapping around."""
        rows = np.flatnonzero(self.origin == self.origin[row])
        return np.roll(rows, -int(np.searchsorted(rows, row)))

    def draws(self) -> Int64[np.ndarray, " s"]:
        """Draws from each source in an epoch: its share, rounded by largest remainders so that they add up."""
        present = np.bincount(self.origin, minlength=len(self.names)) > 0
        weights = np.asarray(self.weights) * present
        exact = len(self.origin) * weights / weights.sum()
        draws = np.floor(exact).astype(np.int64)
        missing = len(self.origin) - int(draws.sum())
        draws[np.argsort(draws - exact, kind="stable")[:missing]] += 1
        return draws

    def order(self, seed: int, epoch: int) -> Int64[np.ndarray, " n"]:
        """The rows of an epoch, in the order in which they are drawn."""
        drawn = [self._drawn(source, int(count), seed, epoch) for source, count in enumerate(self.draws())]
        return np.concatenate(drawn)[epoch_order(len(self.origin), seed, epoch)]

    def _drawn(self, source: int, count: int, seed: int, epoch: int) -> Int64[np.ndarray, " m"]:
        """Rows that a source gives to an epoch: the next `count` of its own endless sequence."""
        if count == 0:
            return np.empty(0, dtype=np.int64)
        rows = np.flatnonzero(self.origin == source)
        start, stop = epoch * count, (epoch + 1) * count
        first, last = start // len(rows), (stop - 1) // len(rows)
        # The last word keeps these streams apart from those of the samples.
        turns = [np.random.default_rng((seed, turn, source, 2)).permutation(rows) for turn in range(first, last + 1)]
        return np.concatenate(turns)[start - first * len(rows) : stop - first * len(rows)]
