"""The processes of a run: start and end, checks, and collectives."""

import argparse
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil
import torch
import torch.distributed as dist
import yaml
from accelerate import InitProcessGroupKwargs, PartialState
from jaxtyping import Num
from torch import Tensor

from ssl_vit.core.machine import use_all_cpus
from ssl_vit.core.watch import MAX_WAIT, Watch

T = TypeVar("T")
PROCESS_GROUP_KWARGS = InitProcessGroupKwargs(timeout=timedelta(minutes=MAX_WAIT))


_watch: Watch | None = None


def start_processes(max_wait: float | None = None) -> PartialState:
    """Join the other processes of a launch and use this process's share of the CPUs; a single process is the main one.

    From then on a `Watch` names each process that gives no sign of life.

    Args:
        max_wait: minutes without a sign of life after which the others end; None keeps the limit.

    Raises:
        ValueError: see `check_num_processes`.
    """
    # The main process does work for which the others wait longer than the default limit.
    # Without an accelerator `cpu` must be True, or the processes of a torchrun do not find each other.
    state = PartialState(cpu=not torch.accelerator.is_available(), **PROCESS_GROUP_KWARGS.to_kwargs())
    use_all_cpus(cast(torch.device, state.device))
    check_num_processes(state.num_processes)
    global _watch
    if _watch is None and dist.is_initialized() and state.num_processes > 1:
        # A clone, since the main thread may block the original store for hours.
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
    """Call `work` before this process ends because another one gave no sign of life for `max_wait`."""
    if _watch is not None:
        _watch.at_end = work


def check_num_processes(num_processes: int) -> None:
    """Refuse processes that did not find each other; warn if fewer run than the launcher was asked for.

    On CPUs `accelerate launch` silently starts one process, whatever number it was given.

    Raises:
        ValueError: the launcher started more processes than found each other.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != num_processes:
        raise ValueError(f"{started} processes were started and {num_processes} found each other; use torchrun")
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # not started by accelerate launch
        return
    asked = _asked_processes(psutil.Process(os.getppid()).cmdline())
    if asked > num_processes:
        warnings.warn(
            f"{num_processes} process runs instead of {asked}. On CPUs start them with "
            f"`torchrun --standalone --nproc_per_node {asked} scripts/...`",
            stacklevel=2,
        )


def _asked_processes(command: list[str]) -> int:
    """Number of processes in an `accelerate launch` command line, or in the config file that it names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--config_file", "--config-file")
    script = next((i for i, word in enumerate(command) if i > 2 and word.endswith(".py")), len(command))
    given, _ = parser.parse_known_args(command[:script])
    if given.num_processes is None and given.config_file is not None:
        return int((yaml.safe_load(Path(given.config_file).read_text()) or {}).get("num_processes", 1))
    return given.num_processes or 1


_collectives_off = False


@contextmanager
def without_collectives() -> Iterator[None]:
    """Disable collectives in this block; other ranks may not execute it."""
    global _collectives_off
    before, _collectives_off = _collectives_off, True
    try:
        yield
    finally:
        _collectives_off = before


def world_size() -> int:
    """Number of training processes on all machines; 1 while collectives are disabled."""
    return dist.get_world_size() if dist.is_initialized() and not _collectives_off else 1


def process_index() -> int:
    """Rank of this process; 0 is the main process."""
    return dist.get_rank() if dist.is_initialized() and not _collectives_off else 0


def note_progress() -> None:
    """Tell the watch that the main thread got something done and so waits for no other process."""
    if _watch is not None:
        _watch.progress += 1


def lost_process(error: RuntimeError) -> bool:
    """Whether an error means that another process of the run has ended or cannot be reached."""
    # gloo raises plain RuntimeErrors.
    return world_size() > 1 and (isinstance(error, dist.DistError) or bool(_LOST.search(str(error))))


_LOST = re.compile(r"gloo|connection (closed|reset|refused)|broken pipe|timed? ?out", re.IGNORECASE)


def on_main_process(work: Callable[[], T]) -> T:
    """Call `work` in the main process and return its result in all processes; every process calls this.

    Raises:
        OSError, ValueError: raised by `work`; every process raises it.
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
    """Take the maximum of each element over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gather_with_gradient(values: Num[Tensor, "b ..."]) -> Num[Tensor, "n ..."]:
    """Concatenate the rows of all processes, by rank; a row's gradient flows back to the process that it came from.

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
