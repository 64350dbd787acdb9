"""What depends on where a run runs: precision, threads, agreement between processes, signals."""

import argparse
import math
import os
import platform
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import numpy as np
import psutil
import torch
import torch.distributed as dist
import yaml
from accelerate import InitProcessGroupKwargs, PartialState
from jaxtyping import Num
from torch import Tensor

from ssl_vit.core.watch import MAX_WAIT, Watch
from ssl_vit.data.workers import num_cpus, num_local_processes

# Windows has no SIGUSR1.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
OUT_OF_TIME = 100  # stands beside the signals, and above all of them
# 128 + signal is the shell's convention, and 75 is sysexits.h's "try again".
EXIT_STOPPED: dict[int, int] = {**{number: 128 + number for number in SIGNALS}, OUT_OF_TIME: 75}
EXIT_COLLAPSED = 3
T = TypeVar("T")
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(minutes=MAX_WAIT))


def resolve_precision(precision: str, device: torch.device) -> str:
    """Turn `auto` into bf16 where the device computes it in hardware, and into no (fp32) elsewhere.

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


_watch: Watch | None = None


def start_processes(max_wait: float | None = None) -> PartialState:
    """Find the other processes of a launch, and give each its share of the CPUs; alone, this one is the main one.

    From then on one that gives no sign of life is named.

    Args:
        max_wait: minutes after which the others end then; None = as it is.

    Raises:
        ValueError: see `check_num_processes`.
    """
    # Some work is done by the main process while the others wait, for longer than the default limit.
    # Without an accelerator Accelerate must be told so, or the processes of a torchrun do not find each other.
    state = PartialState(cpu=not torch.accelerator.is_available(), **PATIENCE.to_kwargs())
    use_all_cpus(cast(torch.device, state.device))
    check_num_processes(state.num_processes)
    global _watch
    if _watch is None and dist.is_initialized() and state.num_processes > 1:
        # A store of its own, since a call of the main thread may wait in its for hours.
        store = dist.distributed_c10d._get_default_store().clone()
        _watch = Watch(store, state.process_index, state.num_processes)
        _watch.start()
    if _watch is not None and max_wait is not None:
        _watch.max_wait, _watch.flag = max_wait, "--max_wait"
    return state


def end_processes() -> None:
    """Leave the other processes of a launch."""
    global _watch
    if _watch is not None:
        _watch.close()
        _watch = None
    if dist.is_initialized():
        PartialState().destroy_process_group()


def when_others_hang(work: Callable[[], None]) -> None:
    """What to do before this process ends since another one gave no sign of life for `max_wait`."""
    if _watch is not None:
        _watch.at_end = work


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What a resolved precision has the encoder computed in; None = as it is."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def device_name(device: torch.device) -> str:
    """The product name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({cpu_name()})" if device.type == "cpu" else device.type


def cpu_name() -> str:
    """The product name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def use_all_cpus(device: torch.device) -> None:
    """Give a process that trains on the CPU its share of the CPUs.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1 on their own; any larger number was asked for and stays.
    """
    if device.type == "cpu" and int(os.environ.get("OMP_NUM_THREADS", "1")) <= 1:
        torch.set_num_threads(max(1, num_cpus() // num_local_processes()))


def check_num_processes(num_processes: int) -> None:
    """Find processes that do not know of each other, and say so where fewer run than were asked for.

    `accelerate launch` starts one process on CPUs whatever it was asked for, without a word.

    Raises:
        ValueError: the launcher started several processes, and each believes to be alone.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != num_processes:
        raise ValueError(f"{started} processes were started and {num_processes} found each other; use torchrun")
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # not started by accelerate launch
        return
    asked = _asked_processes(psutil.Process(os.getppid()).cmdline())
    if asked > num_processes:
        warnings.warn(
            f"{asked} processes were asked for and {num_processes} runs. On CPUs start them with "
            f"`torchrun --standalone --nproc_per_node {asked} scripts/...`",
            stacklevel=2,
        )


def _asked_processes(command: list[str]) -> int:
    """Processes that an `accelerate launch` command line, or the config file it names, asks for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--config_file", "--config-file")
    script = next((i for i, word in enumerate(command) if i > 2 and word.endswith(".py")), len(command))
    given, _ = parser.parse_known_args(command[:script])
    if given.num_processes is None and given.config_file is not None:
        return int((yaml.safe_load(Path(given.config_file).read_text()) or {}).get("num_processes", 1))
    return given.num_processes or 1


def seed_step(seed: int, step: int, micro: int, process_index: int) -> None:
    """Seed what is drawn on the device (drop path), the one place where the process count may show."""
    # The last word keeps it apart from what is drawn of data, as in `sample_rng`.
    torch.manual_seed(int(np.random.SeedSequence((seed, step, micro, process_index, 4)).generate_state(1)[0]))


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Let objectives in this block work without the other processes, which may not be doing the same."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size() -> int:
    """Training processes on all machines."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def process_index() -> int:
    """Number of this process among all, 0 for the main one."""
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def lost_process(error: RuntimeError) -> bool:
    """Whether an error means that another process of the run has ended or cannot be reached."""
    # gloo has no exception of its own.
    return world_size() > 1 and (isinstance(error, dist.DistError) or bool(_LOST.search(str(error))))


_LOST = re.compile(r"gloo|connection (closed|reset|refused)|broken pipe|timed? ?out", re.IGNORECASE)


def on_main_process(work: Callable[[], T]) -> T:
    """Do something in the main process alone, and give all processes what it returns; every process calls this.

    Raises:
        OSError, ValueError: in every process, where the main one came upon it.
    """
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if process_index() == 0:
        try:
            outcome[0] = work()
        except (OSError, ValueError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def mean_over_processes(values: Tensor) -> Tensor:
    """Average a tensor over all processes, in place."""
    return sum_over_processes(values).div_(world_size()) if world_size() > 1 else values


def max_over_processes(values: Tensor) -> Tensor:
    """The largest of each element over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gather_with_gradient(values: Num[Tensor, "b ..."]) -> Num[Tensor, "n ..."]:
    """The rows of all processes, in their order; gradients flow back to the process a row came from.

    Every process must hold the same number of rows.
    """
    return cast(Tensor, _Gather.apply(values)) if world_size() > 1 else values


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(world_size())]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return sum_over_processes(grad.contiguous()).chunk(world_size())[dist.get_rank()]


class StopSignal:
    """Notes Ctrl-C, SIGTERM and SIGUSR1, so that the loop can save before it ends; a second Ctrl-C ends at once.

    All processes agree on the step to stop at. They ask each other over gloo, which works on the host and never
    waits for the accelerator.

    Args:
        deadline: when to stop without any signal, in `time.monotonic` seconds.
    """

    def __init__(self, deadline: float = math.inf) -> None:
        self.received, self._deadline = 0, deadline
        self._group: Any = None
        if world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        # Started by `accelerate launch`, which forwards no signals: its death is the signal.
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Catch the signals inside this block."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self) -> int:
        """The signal that any process received, 0 for none; call once a step on every process.

        OUT_OF_TIME where the deadline has passed.
        """
        if time.monotonic() > self._deadline:
            self.received = self.received or OUT_OF_TIME
        if self._launcher is not None and os.getppid() != self._launcher:
            self.received = self.received or signal.SIGTERM
        if _watch is not None:
            _watch.progress += 1
        if self._group is None:
            return self.received
        flag = torch.tensor(self.received)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag)
