"""Faults that a run survives: steps that are skipped, losses that jump, by-products that fail."""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from jaxtyping import Bool, Float
from torch import Tensor

from ssl_vit.core.distributed import mean_over_processes, process_index, world_size
from ssl_vit.core.text import plain
from ssl_vit.core.writing import replace_text
from ssl_vit.data.sampler import StepSampler

SKIPPED_FILE = "skipped_steps.json"
WINDOW, LEAST = 100, 50  # losses that a new one is compared with: at most, and at least
DEVIATIONS, SHARE = 10.0, 0.05  # how far above them a spike is, in robust deviations and as a share of their median


@contextmanager
def by_product(what: str, say: Callable[[str], None] = print, *, shared: bool = False) -> Iterator[None]:
    """Leave `what` out with a warning if this block fails: figures, scores, traces and trackers must not end a run.

    Args:
        what: a noun phrase, the warning's beginning.
        shared: all processes work on it together; if there are several, a failure is raised, since the others wait.
    """
    try:
        yield
    except Exception as error:
        if shared and world_size() > 1:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        say(f"WARNING: {plain(what)} left out: {plain(reason, 300)}")


@dataclass
class Faults:
    """What went wrong so far; a checkpoint keeps it, so that a killed run goes on counting."""

    skipped_steps: int = 0
    rewinds: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """What the next loss is compared with; empty where spikes are not looked for."""
    collapse: str = ""
    """When the features collapsed, and how; empty where they did not, or recovered."""

    def to_plain(self) -> dict[str, Any]:
        """In a form that JSON takes."""
        return asdict(self)


class SkippedSteps:
    """Counts skipped steps, and stops after too many in a row."""

    def __init__(self, faults: Faults, sampler: StepSampler | None, folder: Path, max_in_a_row: int) -> None:
        self.faults, self.sampler, self.folder, self.max_in_a_row = faults, sampler, folder, max_in_a_row
        self._in_a_row: list[tuple[int, float]] = []  # step, and the loss of this process
        self._unread: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def note(self, step: int, taken: Bool[Tensor, ""], loss: Float[Tensor, ""]) -> None:
        """Note whether a step was taken; every process calls this.

        On a GPU a step is judged when the next one is noted: its numbers have arrived by then, and the GPU has work.

        Raises:
            FloatingPointError: too many in a row were not. `skipped_steps.json` in the run's folder then lists their
                samples.
        """
        values = torch.stack([taken.double(), loss.detach().double()])
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._unread.append((step, values, arrived))
        else:
            self._unread.append((step, values, None))
            self.settle()
        if len(self._unread) > 1:
            self._judge()

    def settle(self) -> None:
        """Judge all steps noted so far; every process calls this at the same steps.

        Raises:
            FloatingPointError: as `note`.
        """
        while self._unread:
            self._judge()

    def _judge(self) -> None:
        step, values, arrived = self._unread.popleft()
        if arrived is not None:
            arrived.synchronize()
        taken, loss = values.tolist()
        if taken:
            self._in_a_row.clear()
            return
        self.faults.skipped_steps += 1
        self._in_a_row.append((step, loss))
        if len(self._in_a_row) < self.max_in_a_row:
            return
        path = self._write()
        raise FloatingPointError(
            f"max_skipped_steps={self.max_in_a_row}: steps {self._in_a_row[0][0]:,} to {step:,} were skipped, since "
            f"loss or gradients were not finite. Look at the images that {path} lists, lower optim.base_lr, set "
            "optim.clip_grad, or use precision bf16 instead of fp16"
        )

    def _write(self) -> Path:
        """List the samples of the steps in a row, those of all processes."""
        own = [
            {
                "step": step,
                "process": process_index(),
                "loss": loss if math.isfinite(loss) else str(loss),
                "samples": [
                    {"row": key.index, "epoch": key.epoch, "position": key.position}
                    for keys in self.sampler.of_step(step)
                    for key in keys
                ]
                if self.sampler is not None  # of a stream it is not known what a step drew
                else None,
            }
            for step, loss in self._in_a_row
        ]
        entries = sorted(gather_object(own), key=lambda entry: (entry["step"], entry["process"]))
        path = self.folder / SKIPPED_FILE
        if process_index() == 0:
            with by_product(f"list of their samples, {path},"):
                replace_text(path, json.dumps(entries, indent=1) + "\n")
        return path


class SpikeWatch:
    """Finds a loss far above its recent level.

    A spike lies above median + max(10 x 1.4826 x MAD, 5 % of |median|) of the last 100 losses, MAD being their median
    absolute deviation, which 1.4826 turns into the standard deviation of a normal distribution. Nothing is a spike
    before there are 50 losses; spikes and losses that are not finite do not count among them.
    """

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self._recent = deque(faults.recent_losses, maxlen=WINDOW)

    def begins(self, steps_done: int) -> bool:
        """Whether losses may be judged from the next step on, for the first time."""
        return steps_done == LEAST

    def sees_spike(self, loss: Float[Tensor, ""]) -> bool:
        """Judge a step's loss, averaged over all processes, and remember it where it is none; every process calls this.

        The host waits for the device here.
        """
        value = mean_over_processes(loss.detach().float().clone()).item()
        if not math.isfinite(value):
            return False  # the step is skipped anyway
        if len(self._recent) >= LEAST and value > spike_threshold(self._recent):
            return True
        self._recent.append(value)
        self.faults.recent_losses = list(self._recent)
        return False


def spike_threshold(losses: "deque[float] | list[float]") -> float:
    """A loss above this is a spike; see `SpikeWatch`."""
    median = statistics.median(losses)
    deviation = 1.4826 * statistics.median(abs(loss - median) for loss in losses)
    return median + max(DEVIATIONS * deviation, SHARE * abs(median))
