"""Alternating rounds: what is compared is measured in turn, so that a noisy machine is noisy for all."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torchvision

from ssl_vit.core.machine import cpu_name

Name = TypeVar("Name")


@dataclass(frozen=True)
class Ratio:
    """How many times the baseline's rate a contender reaches: median over rounds, and the range."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def turns(names: Sequence[Name], rounds: int) -> Iterator[Name]:
    """Each name once a round, every other round in reverse order."""
    for number in range(rounds):
        yield from reversed(names) if number % 2 else names


def alternate(
    contenders: dict[str, Callable[[], int]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Images per second of each contender in each round, in `turns`.

    Args:
        contenders: each works for a while and returns how many images it did; it is called once beforehand.
        rounds: how often each is measured.
        clock: returns seconds.
    """
    for work in contenders.values():
        work()
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for name in turns(list(contenders), rounds):
        start = clock()
        images = contenders[name]()
        rates[name].append(images / (clock() - start))
    return rates


def contender(call: Callable[[], object], num_images: int, num_calls: int = 1) -> Callable[[], int]:
    """Return a contender for `alternate`: it calls `call` so many times, `num_images` each, and waits for the GPU."""

    def work() -> int:
        for _ in range(num_calls):
            call()
        synchronize()
        return num_calls * num_images

    return work


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(rates: dict[str, list[float]], baseline: str) -> dict[str, Ratio]:
    """Each contender over the baseline of the same round."""
    found = {}
    for name, values in rates.items():
        each = [value / base for value, base in zip(values, rates[baseline], strict=True)]
        found[name] = Ratio(statistics.median(each), min(each), max(each))
    return found


def ratio_lines(result: dict) -> list[str]:
    """A line for each contender: its median rate, and its ratio to the baseline."""
    return [
        f"{name:36} {statistics.median(rates):8.1f} images/s   {Ratio(**result['ratios'][name])}"
        for name, rates in result["rates"].items()
    ]


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "cpu": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "fp32 products": torch.get_float32_matmul_precision(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
    }
