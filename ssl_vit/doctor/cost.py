"""Measures what a run costs on this machine: memory, input and step."""

import dataclasses
import math
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64

from ssl_vit.core.machine import num_cpus, resolve_precision
from ssl_vit.data.sources.source import Source
from ssl_vit.data.transform import Transform
from ssl_vit.data.workers import choose_num_workers
from ssl_vit.models.vit import choose_attention
from ssl_vit.training.config import RunConfig
from ssl_vit.training.device.memory import saved_for_backward
from ssl_vit.training.step import Step, prepare_step

_CPU_WORK = 20_000_000_000  # parameters x patches x images that are measured at once on a CPU
_CPU_IMAGES = 8  # but no fewer images than these
_ROUNDS = 2  # steps that are timed at least, after one to warm up
_SECONDS = 3.0  # that they take at least: the first ones are slow


def measure_crops(source: Source, rows: Int64[np.ndarray, " r"], transform: Transform, num_channels: int) -> float:
    """Seconds that the worker's part of a transform takes for an image; unreadable ones are left out."""
    seconds, count = 0.0, 0
    for row in rows.tolist():
        with suppress(ValueError):
            image = source.image(row, num_channels)
            start = time.perf_counter()
            transform(image, np.random.default_rng(row))
            seconds, count = seconds + time.perf_counter() - start, count + 1
    return seconds / max(count, 1)


@dataclass(frozen=True)
class StepCost:
    """A training step as measured."""

    rate: float
    """Images per second of steps of the config's batch, without input."""
    num_images: int
    """Images of the micro-batch that was measured."""
    precision: str
    activations: float
    """MiB that this micro-batch keeps for its backward pass."""


@dataclass(frozen=True)
class PacedStep(StepCost):
    """The step together with its input, in one process."""

    num_workers: int
    """Loader workers to set."""
    run_rate: float
    """Images per second of the run with these workers."""
    hours: float
    """Length of the run at this rate."""


def measure_step(config: RunConfig, device: torch.device) -> StepCost:
    """Time training steps with fresh weights on noise, without any input.

    On a CPU the micro-batch of a large model is small, since the time of an image depends little on it there.
    Elsewhere it is the config's, halved until it fits.
    """
    # A backbone that rests at first is measured as it trains later.
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, freeze_backbone_until=0.0))
    precision = resolve_precision(config.precision, device)
    # Weights to start from take as long as fresh ones, so they are not read.
    objective = config.objective.build(config.encoder.build()).to(device)
    size = config.batch.size // config.batch.num_micro(1)
    if device.type == "cpu":
        work = objective.encoder.num_patches * sum(parameter.numel() for parameter in objective.parameters())
        size = min(size, max(_CPU_IMAGES, _CPU_WORK // work))
    choose_attention(objective, objective.encoder.attention_length, device, precision)
    while True:
        try:
            step = prepare_step(config, objective, size, device)
            activations = saved_for_backward(objective, step.forward_backward)
            step.update()
            forward_backward, update = _seconds(step, device)
            break
        except torch.OutOfMemoryError:
            if size == 1:
                reason = "not even one image fits on the device; take a smaller arch"
                raise ValueError(f"batch.per_device: {reason}") from None
            size //= 2
    seconds = config.batch.size * forward_backward / size + update
    return StepCost(config.batch.size / seconds, size, precision, activations)


def _seconds(step: Step, device: torch.device) -> list[float]:
    """Seconds of forward and backward of a micro-batch, and of the update: the median of several steps."""
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(times) < _ROUNDS or time.perf_counter() - start < _SECONDS:
        marks = [time.perf_counter()]
        for half in step:
            half()
            if device.type == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    return [statistics.median_low(values) for values in zip(*times, strict=True)]


def pace(step_rate: float, input_rate: float, device: torch.device) -> tuple[int, float]:
    """Choose the loader workers that let the input keep up, as far as there are cores.

    Args:
        step_rate: images per second of the step alone.
        input_rate: images per second of the input on one core.

    Returns:
        The number of workers, and images per second of the run with them.
    """
    if device.type == "cpu":
        # Decoded between the steps: a worker would take away the step's cores.
        return choose_num_workers("auto", device), 1 / (1 / step_rate + 1 / input_rate)
    workers = min(max(1, math.ceil(step_rate / input_rate)), max(1, num_cpus() - 1))
    return workers, min(step_rate, workers * input_rate)
