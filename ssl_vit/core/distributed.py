"""The processes of a run: how they find each other, what they agree on, and what they add up."""

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
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(minutes=MAX_WAIT))


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


def note_progress() -> None:
    """Let the other processes know that this one got something done, and so waits for nobody."""
    if _watch is not None:
        _watch.progress += 1


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
