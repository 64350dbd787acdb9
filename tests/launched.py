"""Several runs in one set of processes, as torchrun starts them, with what a test plants in them.

The argument is a JSON file with a list of jobs; the exit code of each, or its error, is written beside it.
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from ssl_vit.core.distributed import end_processes, process_index, start_processes
from ssl_vit.training.config import parse_run
from ssl_vit.training.loop import set_up, train
from ssl_vit.training.step import Step
from tests.conftest import OBJECTIVES


def shard_on_cpus(accelerator: Accelerator) -> None:
    """Let Accelerate use FSDP2, which it offers on accelerators alone, in the way of configs/accelerate/fsdp2.yaml."""
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
    )
    assert accelerator.is_fsdp2


def plant(kind: Any, what: str, process: int, steps: list[int], num_steps: int) -> Any:
    """A forward in some steps of one process: its input `nan`, or its loss `inf` or 100 more with equal gradients; or
    no `memory` for the gradient of more than two images in any."""
    forward = kind.forward

    def broken(self: Any, batch: dict, progress: float) -> dict[str, torch.Tensor]:
        hit = process_index() == process and round(progress * num_steps) in steps
        if hit and what == "nan":
            batch = {
                name: value * float("nan") if value.is_floating_point() else value for name, value in batch.items()
            }
        parts = forward(self, batch, progress)
        if what == "memory" and len(batch["images"]) > 2:
            parts["loss"].register_hook(no_memory)
        more = {"inf": float("inf"), "jump": 100.0}.get(what, 0.0) if hit else 0.0
        return {**parts, "loss": parts["loss"] + more}

    return mock.patch.object(kind, "forward", broken)


def no_memory(_: torch.Tensor) -> None:
    raise torch.OutOfMemoryError


def out_of_memory_above(*limits: int) -> Callable[..., Step]:
    """As `prepare_step`, on devices that take so many images, one number a process."""

    def prepare(config: object, objective: object, num_images: int, device: object) -> Step:
        def forward_backward() -> None:
            if num_images > limits[dist.get_rank()]:
                raise torch.OutOfMemoryError

        return Step(forward_backward, lambda: None)

    return prepare


def work(job: dict) -> int | str:
    """Run one job: `objective`, `flags`, `fsdp2`, `plant` and `fits` (see above)."""
    AcceleratorState._reset_state()
    defaults, small = OBJECTIVES[job["objective"]]
    config = parse_run(defaults, [*small, *job["flags"]])
    with ExitStack() as stack:
        if job.get("fsdp2"):
            init = Accelerator.__init__

            def sharding(self: Accelerator, *args: Any, **kwargs: Any) -> None:
                init(self, *args, **kwargs)
                shard_on_cpus(self)

            stack.enter_context(mock.patch.object(Accelerator, "__init__", sharding))
        if "plant" in job:
            kind = type(config.resolve(40)[0].build_objective())
            stack.enter_context(plant(kind, *job["plant"], num_steps=config.num_steps(40)))
        stack.enter_context(mock.patch("ssl_vit.training.faults.LEAST", 2))
        if "fits" in job:
            stack.enter_context(mock.patch("ssl_vit.training.device.micro_batch.has_limit", return_value=True))
            stack.enter_context(
                mock.patch("ssl_vit.training.device.micro_batch.prepare_step", out_of_memory_above(*job["fits"]))
            )
        try:
            run = set_up(config)
            assert run.accelerator.num_processes == 2
            return train(run)
        except (FloatingPointError, ValueError) as error:
            return str(error)


if __name__ == "__main__":
    jobs = Path(sys.argv[1])
    start_processes()
    results = [work(job) for job in json.loads(jobs.read_text())]
    if process_index() == 0:
        jobs.with_suffix(".results").write_text(json.dumps(results))
    end_processes()
