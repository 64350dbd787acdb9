"""A training step with fused and with plain attention, on this device, in the settings of a config."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ssl_vit.benchmarks.rounds import alternate, machine, ratios
from ssl_vit.config import RunConfig
from ssl_vit.distributed import autocast_dtype, resolve_precision
from ssl_vit.models.vit import set_fused_attention
from ssl_vit.objectives.objective import Objective
from ssl_vit.optim import build_optimizer, clip_gradients, set_schedule


class Step(NamedTuple):
    """The two halves of a training step, ready to be called in turn."""

    forward_backward: Callable[[], None]
    """Forward and backward of one micro-batch."""
    update: Callable[[], None]
    """Everything that follows once all micro-batches of a step are through."""


def prepare_step(config: RunConfig, objective: Objective, num_images: int, device: torch.device) -> Step:
    """A training step on a micro-batch made up of noise.

    Args:
        config: a run's settings, without `auto`.
        objective: what they build, on the device.
        num_images: size of the micro-batch.
    """
    precision = resolve_precision(config.precision, device)
    dtype = autocast_dtype(precision)
    optimizer = build_optimizer(objective.train(), config.optim, precision)
    encoder = objective.encoder
    transform = config.objective.build_transform(
        encoder.image_size, encoder.patch_size, config.data.mean, config.data.std
    )
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (encoder.in_chans, 256, 256), dtype=np.uint8))
    samples = [transform(pixels, rng) for _ in range(num_images)]
    collated = {name: torch.stack([item[name] for item in samples]) for name in samples[0]}

    def forward_backward() -> None:
        batch = transform.on_device(collated, device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss = objective(batch, 0.5)["loss"]
        loss.backward()

    def update() -> None:
        set_schedule(optimizer, config.optim, 0.5, config.batch.size)
        if config.optim.clip_grad is not None:
            clip_gradients(objective, config.optim)
        optimizer.step()
        objective.after_step(0.5)
        optimizer.zero_grad()

    return Step(forward_backward, update)


def compare_attention(config: RunConfig, *, steps: int = 5, rounds: int = 5) -> dict:
    """Images per second of whole training steps on a batch made up of noise.

    Args:
        config: a run's settings, without `auto`.
        steps: steps of a round.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = config.build_objective().to(device)
    encoder, size = objective.encoder, config.batch.per_device or config.batch.size
    step = prepare_step(config, objective, size, device)

    def work(fused: bool) -> Callable[[], int]:
        def run() -> int:
            set_fused_attention(objective, fused)
            for _ in range(steps):
                step.forward_backward()
                step.update()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return steps * size

        return run

    rates = alternate({"fused attention": work(True), "plain attention": work(False)}, rounds)
    return {
        "what": f"training step of {type(objective).__name__}, {config.encoder.arch} {encoder.embed_dim} wide, "
        f"{encoder.num_patches} patches, batch {size}, precision {resolve_precision(config.precision, device)}",
        "rates": rates,
        "ratios": {name: vars(ratio) for name, ratio in ratios(rates, "fused attention").items()},
        "machine": machine(),
    }
