"""Signals that stop a run, and the exit codes by which a launcher knows why it stopped."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ssl_vit.core.distributed import note_progress, process_index, world_size

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
OUT_OF_TIME = 100  # used like a signal number; larger than any
# 128 + signal is the shell's convention, and 75 is sysexits.h's "try again".
EXIT_STOPPED: dict[int, int] = {**{number: 128 + number for number in SIGNALS}, OUT_OF_TIME: 75}
EXIT_COLLAPSED = 3
AFTER_THIS_STEP = (
    b"\nStopping after this step. Ctrl-C again ends at once and loses the steps since the last checkpoint.\n"
)


class StopSignal:
    """Notes Ctrl-C, SIGTERM and SIGUSR1, so that the loop can save before it ends; a second Ctrl-C ends at once.

    All processes agree on the step to stop at. They ask each other over gloo, which works on the host and never
    waits for the accelerator.

    Args:
        deadline: when to stop without any signal, in `time.monotonic` seconds.
    """

    def __init__(self, deadline: float = math.inf) -> None:
        self.received, self._deadline = 0, deadline
        self._group: Any = None
        if world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        # `accelerate launch` forwards no signals: its death is the signal.
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT and process_index() == 0:
            os.write(2, AFTER_THIS_STEP)  # print is not safe here
        self.received = number

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Catch the signals inside this block."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self) -> int:
        """The signal that any process received, 0 for none; call once a step on every process.

        OUT_OF_TIME where the deadline has passed.
        """
        if time.monotonic() > self._deadline:
            self.received = self.received or OUT_OF_TIME
        if self._launcher is not None and os.getppid() != self._launcher:
            self.received = self.received or signal.SIGTERM
        if self._group is None:
            return self.received
        flag = torch.tensor(self.received)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        note_progress()  # all have answered, so a store that does not answer ends no run
        return int(flag)
