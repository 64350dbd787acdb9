"""Several sources, drawn from by weight as a pure function of seed and epoch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int64

from ssl_vit.data.sampler import epoch_order


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
