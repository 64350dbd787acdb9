"""What is done to a model before its first step: Accelerate's preparation, shards (FSDP2), compiled blocks."""

import gc
import importlib.util
import warnings
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from timm.layers.drop import DropPath
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from ssl_vit.core.machine import autocast_dtype
from ssl_vit.models.blocks import CompilableDropPath
from ssl_vit.objectives.objective import Objective
from ssl_vit.training.config import RunConfig


def prepare(
    accelerator: Accelerator, objective: Objective, optimizer: torch.optim.Optimizer, precision: str
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Hand model and optimizer to Accelerate; under FSDP2 with the numbers of DDP.

    Accelerate's own policy there would cast parameters, inputs and the loss itself to the run's precision. Parameters
    and the sums of gradients stay fp32 instead, and autocast decides what is computed in half precision.

    Raises:
        ValueError: FSDP of the first version, or in fp16.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare(objective, optimizer)
    if not accelerator.is_fsdp2:
        raise ValueError("fsdp_version=1: its checkpoints are not supported; set fsdp_version: 2, or use DDP")
    if precision == "fp16":
        raise ValueError("precision='fp16': is not supported with FSDP; use bf16")
    plugin = cast(Any, accelerator.state.fsdp_plugin)
    plugin.mixed_precision_policy = None
    plugin.cpu_ram_efficient_loading = False  # every process builds the same weights from the seed
    dtype = autocast_dtype(precision)
    if dtype is not None:
        objective.forward = torch.autocast(accelerator.device.type, dtype=dtype)(objective.forward)
    # Buffers are not sharded, and fully_shard leaves them where they are.
    objective.to(accelerator.device)
    return accelerator.prepare(objective, optimizer)


def release_reducer(model: nn.Module) -> None:
    """Take DDP's hooks off the parameters of a model that trains no more, so that its objective can be called alone."""
    for name in ("reducer", "logger"):
        if hasattr(model, name):
            delattr(model, name)
    gc.collect()  # the hooks go with the reducer


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are cut among the processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def unsharded(config: RunConfig, model: nn.Module, objective: Objective, device: torch.device) -> Objective:
    """The objective with unsharded parameters on every process, for other work than training; a copy if it is sharded.

    Every process calls this. Shards can be called through the prepared module alone.
    """
    if not is_sharded(model):
        return objective
    copy = config.build_objective().to(device)
    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    copy.load_state_dict(cast("dict[str, torch.Tensor]", tensors))
    return copy.train()


LEAST_STEPS = 500  # `auto` compiles runs of at least so many steps: they win back the half minute that it takes
_PROGRAMS = 64  # compiled variants of one kind of block: crop sizes, with and without gradients, encoder and decoder


def resolve_compile(
    setting: bool | Literal["auto"],
    device: torch.device,
    num_steps: int,
    is_sharded: bool,
    has_plain_blocks: bool = True,
) -> bool:
    """Whether to compile: with `auto` on GPUs that Triton serves, in runs that are long enough.

    Compiled blocks of other kinds than a plain ViT's have not run on a GPU yet, so that `auto` leaves them as they are.

    Raises:
        ValueError: it is asked for where it cannot work.
    """
    if setting == "auto":
        able = device.type == "cuda" and importlib.util.find_spec("triton") is not None
        able = able and has_plain_blocks and torch.cuda.get_device_capability(device) >= (7, 0)
        return able and not is_sharded and num_steps >= LEAST_STEPS and _is_able_to_compile(device)
    if setting and is_sharded:
        raise ValueError("compile=True: blocks that FSDP shards cannot be compiled; use auto or false")
    return setting


def _is_able_to_compile(device: torch.device) -> bool:
    """Compile something small: a machine may lack a C compiler or Python's headers."""
    try:
        torch.compile(torch.nn.Softplus())(torch.ones(8, device=device))
    except Exception as error:  # a run can do without compiling, whatever fails
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"compile=auto: torch.compile does not work here, so blocks stay as they are ({reason})", stacklevel=2
        )
        return False
    return True


def compile_blocks(objective: Objective) -> None:
    """Compile what the objective names, in place; names of parameters stay. The objective must be on its device.

    `torch.compiler.set_stance("force_eager")` runs them eagerly, for batches of other sizes.
    """
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _PROGRAMS)
    for module in objective.compilable():
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                setattr(module, name, CompilableDropPath(child.drop_prob, device))
        module.compile(dynamic=False)
