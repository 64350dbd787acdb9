"""The samples that each process trains on, as a pure function of seed and step."""

from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from typing import NamedTuple

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
        order: Callable[[int, int], Int64[np.ndarray, " n"]] | None = None,
    ) -> None:
        """Begin at `start_step`.

        Args:
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
        self.process_index, self.num_processes = process_index, num_processes
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
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start_step, self.num_steps):
            for micro in range(self.num_micro):
                start = step * self.batch_size + (micro * self.num_processes + self.process_index) * size
                keys = []
                for draw in range(start, start + size):
                    if draw // self.num_samples != epoch:
                        epoch = draw // self.num_samples
                        order = self.order(self.seed, epoch)
                    position = draw % self.num_samples
                    keys.append(SampleKey(epoch, position, int(order[position])))
                yield keys
