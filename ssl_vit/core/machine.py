"""The machine that a process runs on: CPUs, device and precision."""

import os
import platform
import re
from pathlib import Path

import torch


def num_cpus() -> int:
    """CPUs that this process may use; in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_local_processes() -> int:
    """Training processes on this machine, by the launcher's variables."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def use_all_cpus(device: torch.device) -> None:
    """Give a process that trains on the CPU its share of the CPUs.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1 unasked; a larger number is the user's and stays.
    """
    asked = re.match(r"\s*(\d+)", os.environ.get("OMP_NUM_THREADS", ""))  # of "4,2" the first counts
    if device.type == "cpu" and (asked is None or int(asked[1]) <= 1):
        torch.set_num_threads(max(1, num_cpus() // num_local_processes()))


def device_name(device: torch.device) -> str:
    """The product name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({cpu_name()})" if device.type == "cpu" else device.type


def cpu_name() -> str:
    """The product name of the processor, if the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolve `auto`: bf16 if the device computes it in hardware, else no (fp32).

    Raises:
        ValueError: fp16 on a device other than CUDA, where gradients cannot be scaled.
    """
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"precision='fp16': needs a CUDA device, this is {device.type}; use auto, bf16 or no")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # Emulated bf16 is hundreds of times slower than fp32.
    has_bf16 = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return "bf16" if has_bf16 else "no"


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Autocast dtype for a precision; None disables autocast."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
