"""Steps that must not be taken: losses and gradients that are not finite, and losses that jump."""

import json
import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor

from ssl_vit.data.sampler import StepSampler
from ssl_vit.distributed import mean_over_processes, process_index

SKIPPED_FILE = "skipped_steps.json"
WINDOW, LEAST = 100, 50  # losses that a new one is compared with: at most, and at least
DEVIATIONS, SHARE = 10.0, 0.05  # how far above them a spike is, in robust deviations and as a share of their median


@dataclass
class Faults:
    """What went wrong so far; a checkpoint keeps it, so that a killed run goes on counting."""

    skipped_steps: int = 0
    rewinds: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """What the next loss is compared with; empty where spikes are not looked for."""

    def to_plain(self) -> dict[str, Any]:
        """In a form that JSON takes."""
        return asdict(self)


def spread(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The same loss, whose gradients are NaN where it is not finite itself.

    An infinite loss may have finite gradients, and is known to one process alone. Its gradients reach all processes in
    the reduction that takes place anyway, so that all of them skip the step without a message of its own.
    """
    return loss * (1 + (loss - loss).detach())  # x 1.0, which changes no bit, or x NaN


def take_step(accelerator: Accelerator, optimizer: torch.optim.Optimizer, grad_norm: Float[Tensor, ""]) -> bool:
    """Step the optimizer, unless a gradient is not finite; the same on all processes.

    The host waits for the backward pass here, to read one number. Gradients that fp16 made overflow are the scaler's,
    which skips the step and lowers its scale.
    """
    if accelerator.scaler is None and not torch.isfinite(grad_norm):
        return False
    optimizer.step()
    return not accelerator.optimizer_step_was_skipped


class SkippedSteps:
    """Counts skipped steps, and stops a run in which nothing else happens."""

    def __init__(self, faults: Faults, sampler: StepSampler | None, folder: Path, max_in_a_row: int) -> None:
        self.faults, self.sampler, self.folder, self.max_in_a_row = faults, sampler, folder, max_in_a_row
        self._in_a_row: list[tuple[int, float]] = []  # step, and the loss of this process

    def note(self, step: int, taken: bool, loss: Float[Tensor, ""]) -> None:
        """Note whether a step was taken; every process calls this.

        Raises:
            FloatingPointError: too many in a row were not. `skipped_steps.json` in the run's folder then lists their
                samples.
        """
        if taken:
            self._in_a_row.clear()
            return
        self.faults.skipped_steps += 1
        self._in_a_row.append((step, loss.item()))
        if len(self._in_a_row) < self.max_in_a_row:
            return
        path = self._write()
        raise FloatingPointError(
            f"max_skipped_steps={self.max_in_a_row}: steps {self._in_a_row[0][0]:,} to {step:,} were skipped, since "
            f"loss or gradients were not finite. Look at the pictures that {path} lists, lower optim.base_lr, set "
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
            path.write_text(json.dumps(entries, indent=1) + "\n")
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
    """What a loss must be above to be a spike; see `SpikeWatch`."""
    median = statistics.median(losses)
    deviation = 1.4826 * statistics.median(abs(loss - median) for loss in losses)
    return median + max(DEVIATIONS * deviation, SHARE * abs(median))
