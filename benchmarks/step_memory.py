"""Memory of whole training steps: what is held at all times, and what a batch needs on top."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.flags import defaults_of
from benchmarks.rounds import machine
from ssl_vit.core.machine import resolve_precision
from ssl_vit.core.settings import as_plain
from ssl_vit.models.vit import choose_attention
from ssl_vit.training.config import RunConfig, parse_run
from ssl_vit.training.device.memory import build_on_meta, model_memory
from ssl_vit.training.step import prepare_step

ARCHS = tuple(f"vit_{size}_patch16_224" for size in ("small", "base", "large"))
SMALL_BATCHES = (2, 4)  # measured on CPUs, where the batch that is asked for would take minutes


def configs_of(archs: Sequence[str], batch: int, settings: list[str], dino: list[str]) -> dict[str, RunConfig]:
    """Settings of MAE and of DINO for each arch, by name; `dino` are flags for DINO alone."""
    return {
        f"{objective} {arch}": parse_run(
            defaults_of(objective), [f"--encoder.arch={arch}", f"--batch.size={batch}", *own, *settings]
        ).resolve(100_000)[0]
        for objective, own in {"mae": [], "dino": dino}.items()
        for arch in archs
    }


def peak_of(step: Callable[[], None], device: torch.device) -> float:
    """MiB that a call needs at its peak above what stood before.

    On CPUs counted over tensors: unlike the process's own peak, that does not depend on what the allocator keeps.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    kineto: Any = profiler.profiler.kineto_results
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))) / 2**20


def measure_step_memory(config: RunConfig, batch: int, device: torch.device) -> dict:
    """MiB of training steps with so many images at once.

    On CUDA the peak of two steps. On CPUs tensors of forward and backward are counted at two small batches and
    extrapolated along the straight line through both; parameters, gradients and moments are added as they are.

    Returns:
        `held`: parameters, gradients and the optimizer's moments. `rest`: activations and what else comes and goes;
        None where the batch does not fit. `measured_at`: the batches.
    """
    held = model_memory(build_on_meta(config), config.optim).total
    if device.type != "cuda":
        small = {size: _peak(config, size, device) for size in SMALL_BATCHES}
        (few, low), (more, high) = small.items()
        return {"held": held, "rest": low + (high - low) / (more - few) * (batch - few), "measured_at": list(small)}
    try:
        rest = _peak_on_cuda(config, batch, device) - held
    except torch.OutOfMemoryError:
        rest = None
    # Out here the exception is gone, and with it the tensors that its frames held.
    gc.collect()
    torch.cuda.empty_cache()
    return {"held": held, "rest": rest, "measured_at": [batch]}


def _peak(config: RunConfig, batch: int, device: torch.device) -> float:
    objective = config.build_objective().to(device)
    choose_attention(objective, objective.encoder.attention_length, device, resolve_precision(config.precision, device))
    step = prepare_step(config, objective, batch, device)
    # With gradients in place: at a small batch it would be their sum that peaks, and no line would lead from there.
    for parameter in objective.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return peak_of(step.forward_backward, device)


def _peak_on_cuda(config: RunConfig, batch: int, device: torch.device) -> float:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with device:  # where large weights are drawn sooner
        objective = config.build_objective()
    objective = objective.to(device)
    choose_attention(objective, objective.encoder.attention_length, device, resolve_precision(config.precision, device))
    step = prepare_step(config, objective, batch, device)
    for _ in range(2):  # the second beside the optimizer's moments
        step.forward_backward()
        step.update()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def memory_table(configs: Mapping[str, RunConfig], batch: int, on_row: Callable[[str], None] = lambda _: None) -> dict:
    """Memory of each config's step, plain and with gradient checkpointing.

    Args:
        configs: settings by the name that the table gives them, without `auto`.
        batch: images at once.
        on_row: told the name of each row that is done, since a CPU takes minutes for a large one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, config in configs.items():
        for checkpointing in (False, True):
            encoder = replace(config.encoder, grad_checkpointing=checkpointing)
            found = measure_step_memory(replace(config, encoder=encoder), batch, device)
            rows.append({"name": name, "grad_checkpointing": checkpointing, **found})
            on_row(f"{name}{', checkpointing' * checkpointing}")
    precisions = {resolve_precision(config.precision, device) for config in configs.values()}
    return {
        "what": f"memory of a training step at batch {batch}, precision {' and '.join(sorted(precisions))}",
        "batch": batch,
        "extrapolated": device.type != "cuda",
        "step_memory": rows,
        "settings": {name: as_plain(config) for name, config in configs.items()},
        "machine": machine(),
    }


def as_lines(result: dict) -> list[str]:
    """The result as a table, in GiB."""
    lines = [f"{'GiB':32} checkpointing   held   rest  total"]
    for row in result["step_memory"]:
        rest = row["rest"]
        sizes = [row["held"], rest, row["held"] + rest] if rest is not None else [row["held"]]
        shown = " ".join(f"{size / 1024:6.2f}" for size in sizes)
        if rest is None:
            shown += f"  does not fit at batch {result['batch']}"
        lines.append(f"{row['name']:32} {'yes' if row['grad_checkpointing'] else 'no':13} {shown}")
    lines.append("held: parameters, gradients, optimizer; rest: activations and what else comes and goes in a step")
    if result["extrapolated"]:
        measured = " and ".join(str(size) for size in SMALL_BATCHES)
        lines.append(
            f"The rest was measured at batches {measured} and extrapolated to {result['batch']} on a straight line."
        )
    return lines
