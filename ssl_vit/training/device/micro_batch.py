"""How many images a device takes at once: found by trying, before a run or after it ran out of memory."""

import dataclasses
import gc
from collections.abc import Callable

import torch
from accelerate import Accelerator

from ssl_vit.core.distributed import max_over_processes, without_collectives
from ssl_vit.models.vit import choose_attention
from ssl_vit.objectives.objective import Objective
from ssl_vit.training.config import RunConfig
from ssl_vit.training.device.prepare import is_sharded
from ssl_vit.training.step import prepare_step

_GIB = 2**30
_NOTHING_FITS = "not even one image fits on the device; use --encoder.grad_checkpointing true or a smaller arch"


def micro_batch_sizes(share: int, limit: int | None = None) -> list[int]:
    """Micro-batch sizes that divide a process's share of the batch, at most `limit`, ascending."""
    return [size for size in range(1, min(limit or share, share) + 1) if share % size == 0]


def largest_that_fits(sizes: list[int], attempt: Callable[[int], None]) -> int | None:
    """The largest of ascending sizes at which `attempt` does not run out of memory; None if none fits."""
    found, low, high = None, 0, len(sizes)
    while low < high:
        # The largest first: it mostly fits, and then no other is tried.
        middle = high - 1 if high == len(sizes) and found is None and low == 0 else (low + high) // 2
        if _fits(attempt, sizes[middle]):
            found, low = sizes[middle], middle + 1
        else:
            high = middle
    return found


def _fits(attempt: Callable[[int], None], size: int) -> bool:
    try:
        attempt(size)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    # Here the exception is freed, and with it the tensors that its frames held.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return fits


def try_sizes(
    config: RunConfig, objective: Objective, device: torch.device, sizes: list[int], num_processes: int
) -> int | None:
    """The largest of `sizes` at which steps of an objective fit on this device; its weights change.

    A step is what training does to a micro-batch of noise: transform, forward and backward, update, and another forward
    and backward beside the optimizer's moments. Processes do this each on its own.
    """

    # Each size would be compiled and recorded anew.
    config = dataclasses.replace(config, compile=False, cuda_graphs=False)

    def attempt(size: int) -> None:
        learns = sum(parameter.nbytes for parameter in objective.parameters() if parameter.requires_grad)
        # DDP may keep a second copy of all gradients.
        buckets = torch.empty(learns if num_processes > 1 else 0, dtype=torch.uint8, device=device)
        try:
            step = prepare_step(config, objective, size, device)
            step.forward_backward()
            step.update()
            step.forward_backward()
        finally:
            objective.zero_grad()
            del buckets

    with without_collectives():
        return largest_that_fits(sizes, attempt)


def has_limit(device: torch.device) -> bool:
    """Whether a device raises an error when memory runs out; elsewhere the system ends the process."""
    return device.type != "cpu"


def choose_micro_batch(config: RunConfig, accelerator: Accelerator, precision: str) -> tuple[RunConfig, str]:
    """Set `batch.per_device` to the most images that fit, the same on all processes.

    Returns:
        The settings, and a line that says what was found.

    Raises:
        ValueError: not even one image fits, or the model is sharded.
    """
    if accelerator.is_fsdp2:
        raise ValueError("batch.auto=True: tries whole models, and FSDP shards them; give --batch.per_device N")
    device, share = accelerator.device, config.batch.size // accelerator.num_processes
    if not has_limit(device):
        return config, "batch.auto: nothing is tried on a CPU, whose memory ends without an error to go by"
    objective = config.build_objective().to(device)
    choose_attention(objective, objective.encoder.attention_length, device, precision)
    sizes = micro_batch_sizes(share, config.batch.per_device)
    own = try_sizes(config, objective, device, sizes, accelerator.num_processes) or 0
    del objective
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    # The smallest over all processes: their devices may differ or be in use.
    found = -int(max_over_processes(torch.tensor(-own, device=device)))
    if found == 0:
        raise ValueError(f"batch.auto=True: {_NOTHING_FITS}")
    batch = dataclasses.replace(config.batch, per_device=found)
    return dataclasses.replace(config, batch=batch), f"batch.per_device {found}: the most of {share} that fit"


def explain_out_of_memory(
    config: RunConfig, objective: Objective, device: torch.device, per_device: int, num_processes: int
) -> str:
    """What to set after a run ran out of memory with `per_device` images at once; the run cannot go on afterwards."""
    text = f"out of memory with {per_device} images at once"
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        text += f": tensors held up to {peak / _GIB:.1f} of {total / _GIB:.1f} GiB"
    if is_sharded(objective):  # it cannot be called by one process alone
        return f"{text}; set a smaller --batch.per_device: the batch of a step stays {config.batch.size}"
    objective.zero_grad()
    sizes = [size for size in micro_batch_sizes(config.batch.size // num_processes) if size < per_device]
    found = try_sizes(config, objective, device, sizes, num_processes)
    if found is None:
        return f"{text}; {_NOTHING_FITS}"
    return f"{text}. As tried, {found} fit: --batch.per_device {found}; the batch of a step stays {config.batch.size}"
