"""Measures what a run costs on this machine: memory, input and step."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from ssl_vit.core.machine import num_cpus, resolve_precision
from ssl_vit.core.settings import section
from ssl_vit.data.sources.source import Source
from ssl_vit.data.transform import Transform
from ssl_vit.data.workers import choose_num_workers
from ssl_vit.models.vit import choose_attention
from ssl_vit.objectives.objective import Objective
from ssl_vit.training.config import RunConfig
from ssl_vit.training.step import Step, prepare_step

_MIB = 2**20
_CPU_WORK = 20_000_000_000  # parameters x patches x images that are measured at once on a CPU
_CPU_IMAGES = 8  # but no fewer images than these
_ROUNDS = 2  # steps that are timed at least, after one to warm up
_SECONDS = 3.0  # that they take at least: the first ones are slow


def build_on_meta(config: RunConfig) -> Objective:
    """The objective of a config without `auto`, without memory for its weights.

    Raises:
        ValueError: settings that do not fit each other.
    """
    with torch.device("meta"):
        with section("encoder"):
            encoder = config.encoder.build()
        with section("objective"):
            return config.objective.build(encoder)


@dataclass(frozen=True)
class Memory:
    """What training holds at all times, in MiB; all of it is fp32."""

    parameters: float
    """All parameters, a teacher's included."""
    teacher: float
    """The teacher's among them."""
    gradients: float
    optimizer: float
    """AdamW's two moments."""
    total: float


def model_memory(objective: Objective) -> Memory:
    """Memory of parameters and what belongs to each of them; the objective may be on the meta device."""
    named = list(objective.named_parameters())
    held = sum(parameter.nbytes for _, parameter in named) / _MIB
    teacher = sum(parameter.nbytes for name, parameter in named if name.startswith("teacher_")) / _MIB
    learns = sum(parameter.nbytes for _, parameter in named if parameter.requires_grad) / _MIB
    return Memory(held, teacher, gradients=learns, optimizer=2 * learns, total=held + 3 * learns)


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
    # Weights to start from take as long as fresh ones.
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, pretrained=None))
    precision = resolve_precision(config.precision, device)
    objective = config.build_objective().to(device)
    size = config.batch.size // config.batch.num_micro(1)
    if device.type == "cpu":
        work = objective.encoder.num_patches * sum(parameter.numel() for parameter in objective.parameters())
        size = min(size, max(_CPU_IMAGES, _CPU_WORK // work))
    choose_attention(objective, objective.encoder.num_patches, device, precision)
    while True:
        try:
            step = prepare_step(config, objective, size, device)
            activations = _saved_for_backward(objective, step)
            step.update()
            forward_backward, update = _time(step, device)
            break
        except torch.OutOfMemoryError:
            if size == 1:
                raise ValueError(
                    "batch.per_device: not even one image fits on the device; take a smaller arch"
                ) from None
            size //= 2
    seconds = config.batch.size * forward_backward / size + update
    return StepCost(config.batch.size / seconds, size, precision, activations / _MIB)


def _time(step: Step, device: torch.device) -> tuple[float, float]:
    """Seconds of forward and backward of a micro-batch, and of the update."""

    def timed(work: Callable[[], None]) -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(times) < _ROUNDS or time.perf_counter() - start < _SECONDS:
        times.append((timed(step.forward_backward), timed(step.update)))
    forward_backward, update = zip(*times, strict=True)
    return statistics.median_low(forward_backward), statistics.median_low(update)


def _saved_for_backward(objective: Objective, step: Step) -> int:
    """Bytes that the graph of a micro-batch keeps, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step.forward_backward()
    return sum(kept.values())


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
