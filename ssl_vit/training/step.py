"""One training step, the same for the loop, the search for a micro-batch, the doctor and the benchmarks."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ssl_vit.core.machine import autocast_dtype, resolve_precision
from ssl_vit.objectives.objective import Objective
from ssl_vit.training.config import RunConfig
from ssl_vit.training.device.cuda_graphs import BlockGraphs
from ssl_vit.training.device.prepare import compile_blocks
from ssl_vit.training.optim import build_optimizer, clip_gradients, clip_groups, set_schedule

Part = Callable[[str], AbstractContextManager[Any]]


class TrainingStep:
    """Forward and backward of each micro-batch, then clipping, optimizer, teacher and centre.

    Args:
        model: the objective as Accelerate prepared it, through which forward is called.
        accelerator: None = one process without loss scaling, which computes in `precision`.
    """

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        graphs: BlockGraphs,
        *,
        accelerator: Accelerator | None = None,
        precision: str = "no",
    ) -> None:
        self.config, self.objective, self.model, self.optimizer = config, objective, model, optimizer
        self.graphs, self.accelerator = graphs, accelerator
        self.num_micro = 1 if accelerator is None else config.batch.num_micro(accelerator.num_processes)
        self.device = next(objective.parameters()).device
        self._dtype = autocast_dtype(precision) if accelerator is None else None
        self._clip_groups = clip_groups(objective, config.optim)
        self.part: Part = lambda name: nullcontext()
        """The context that each part of the step runs in: a profiler's."""

    def forward_backward(self, batches: Iterator[dict[str, Tensor]], step: int, progress: float) -> dict[str, Tensor]:
        """Add up the gradients of a step's micro-batches.

        Returns:
            The objective's scalars, averaged over the micro-batches of this process.
        """
        losses: dict[str, Tensor] = {}
        for micro in range(self.num_micro):
            with self.part("data wait"):
                batch = next(batches)
            process = 0 if self.accelerator is None else self.accelerator.process_index
            seed_step(self.config.seed, step, micro, process)
            parts = self.micro_batch(batch, progress, is_last=micro == self.num_micro - 1)
            for name, value in parts.items():
                share = value / self.num_micro
                losses[name] = losses[name] + share if name in losses else share
        return losses

    def micro_batch(self, batch: dict[str, Tensor], progress: float, *, is_last: bool = True) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; with the last one, gradients are averaged over the processes.

        Returns:
            The objective's scalars, detached.
        """
        accelerator = self.accelerator
        with nullcontext() if is_last or accelerator is None else accelerator.no_sync(self.model):
            with (
                self.part("forward"),
                self.graphs.active(),
                torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype is not None)
                if accelerator is None
                else nullcontext(),
            ):
                losses = self.model(batch, progress)
            with self.part("backward"):
                loss = poison_nonfinite(losses["loss"]) / self.num_micro
                loss.backward() if accelerator is None else accelerator.backward(loss)
        return {name: value.detach() for name, value in losses.items()}

    def update(self, losses: dict[str, Tensor], progress: float) -> tuple[dict[str, float], Bool[Tensor, ""]]:
        """Take the step, unless a gradient is not finite, and add "grad_norm" to `losses`.

        Returns:
            The learning rate and weight decay, for the log; whether the step was taken, on the device.
        """
        settings = set_schedule(self.optimizer, self.config.optim, progress, self.config.batch.size)
        with self.part("optimizer"):
            if self.accelerator is not None:
                self.accelerator.unscale_gradients(self.optimizer)
            losses["grad_norm"] = clip_gradients(self._clip_groups, self.config.optim.clip_grad)
            taken = take_step(self.accelerator, self.optimizer, losses["grad_norm"])
        with self.part("after step"):
            self.objective.after_step(progress, taken)
        self.optimizer.zero_grad()
        return settings, taken


def seed_step(seed: int, step: int, micro: int, process_index: int) -> None:
    """Seed what is drawn on the device (drop path), the one place where the process count may show."""
    # The last word keeps it apart from what is drawn of data, as in `sample_rng`.
    torch.manual_seed(int(np.random.SeedSequence((seed, step, micro, process_index, 4)).generate_state(1)[0]))


def poison_nonfinite(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the loss; if it is not finite, its gradients become NaN, so that all processes skip the step.

    An infinite loss may have finite gradients, and only its own process knows of it. NaN gradients reach the other
    processes in the reduction of gradients, without a message of their own.
    """
    return loss * (1 + (loss - loss).detach())  # x 1.0, which changes no bit, or x NaN


def take_step(
    accelerator: Accelerator | None, optimizer: torch.optim.Optimizer, grad_norm: Float[Tensor, ""]
) -> Bool[Tensor, ""]:
    """Step the optimizer, unless a gradient is not finite; the same on all processes.

    A fused optimizer reads on the device whether it may step, so the host does not wait for the backward pass. Under
    fp16 the loss scaler decides instead: it waits, skips the step and lowers its scale.

    Returns:
        Whether the step was taken, on the device.
    """
    if accelerator is not None and accelerator.scaler is not None:
        optimizer.step()
        return torch.tensor(not accelerator.optimizer_step_was_skipped, device=grad_norm.device)
    taken = torch.isfinite(grad_norm)
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's
    inner.found_inf = (~taken).float()
    optimizer.step()
    return taken


class Step(NamedTuple):
    """The two halves of a training step on made-up images, ready to be called in turn."""

    forward_backward: Callable[[], None]
    """Forward and backward of one micro-batch."""
    update: Callable[[], None]
    """Everything that follows once all micro-batches of a step are through."""


def prepare_step(
    config: RunConfig,
    objective: Objective,
    batch: int | Callable[[], dict[str, Tensor]],
    device: torch.device,
    precision: str | None = None,
) -> Step:
    """A training step of one process, to be timed or to find out what fits.

    Args:
        config: a run's settings, without `auto`; with `compile` true the objective is compiled in place, and with
            `cuda_graphs` true its blocks are recorded, where there is a GPU. By `auto` neither is done here.
        objective: what they build, on the device.
        batch: the number of images of a micro-batch of noise, or what returns a batch on the device.
        precision: a resolved precision; None = what `config.precision` means on the device.
    """
    precision = precision or resolve_precision(config.precision, device)
    if config.compile is True:
        compile_blocks(objective)
    optimizer = build_optimizer(objective.train(), config.optim, precision)
    graphs = BlockGraphs(config.cuda_graphs is True and device.type == "cuda", must_work=True)
    step = TrainingStep(config, objective, objective, optimizer, graphs, precision=precision)
    draw = _noise(config, objective, batch, device) if isinstance(batch, int) else batch
    losses: dict[str, Tensor] = {}

    def forward_backward() -> None:
        losses.update(step.micro_batch(draw(), 0.5))

    def update() -> None:
        step.update(losses, 0.5)
        losses.clear()

    return Step(forward_backward, update)


def _noise(
    config: RunConfig, objective: Objective, num_images: int, device: torch.device
) -> Callable[[], dict[str, Tensor]]:
    """What turns a collated batch of noise into the objective's batch, as a loader does each time."""
    encoder = objective.encoder
    transform = config.build_transform(encoder)
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (encoder.in_chans, 256, 256), dtype=np.uint8))
    samples = [transform(pixels, rng) for _ in range(num_images)]
    collated = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    if device.type == "cuda":
        collated = {name: value.pin_memory() for name, value in collated.items()}  # as a loader's are
    collated["label"] = torch.zeros(num_images, dtype=torch.int64)  # as of a labelled source; only classifiers look
    return lambda: transform.on_device(collated, device)
