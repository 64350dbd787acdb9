"""Runs of pretrain_mae in this process, whole or broken off in the middle as by a kill."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from accelerate.state import AcceleratorState

from scripts.pretrain_mae import DEFAULTS
from ssl_vit.data.loader import Batches
from ssl_vit.training.loop import main
from tests.conftest import SMALL_RUN


class Killed(BaseException):
    """What no part of a run catches."""


def run(*flags: str) -> int:
    """Run the script with small settings and return its exit code."""
    AcceleratorState._reset_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pretrain_mae.py", *SMALL_RUN, *flags])
        return main(DEFAULTS)


@contextmanager
def killed_after(num_steps: int) -> Iterator[None]:
    """Break the run of the block off when it asks for the batch after so many of its steps."""
    left, next_batch = num_steps, Batches.__next__

    def count(batches: Batches) -> object:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return next_batch(batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "__next__", count)
        with pytest.raises(Killed):
            yield
