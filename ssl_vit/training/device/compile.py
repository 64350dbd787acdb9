"""torch.compile, block by block: blocks of a kind share one compiled program, which takes seconds to make."""

import importlib.util
import warnings
from typing import Any, Literal

import torch
from timm.layers.drop import DropPath

from ssl_vit.models.blocks import CompilableDropPath
from ssl_vit.objectives.objective import Objective

LEAST_STEPS = 500  # `auto` compiles runs of at least so many steps: they win back the half minute that it takes
_PROGRAMS = 64  # of one kind of block: sizes of crops, with gradients and without, encoder and decoder


def resolve_compile(setting: bool | Literal["auto"], device: torch.device, num_steps: int, is_sharded: bool) -> bool:
    """Whether to compile: with `auto` on GPUs that Triton serves, in runs that are long enough.

    Raises:
        ValueError: it is asked for where it cannot work.
    """
    if setting == "auto":
        able = device.type == "cuda" and importlib.util.find_spec("triton") is not None
        able = able and torch.cuda.get_device_capability(device) >= (7, 0)
        return able and not is_sharded and num_steps >= LEAST_STEPS and _is_able_to_compile(device)
    if setting and is_sharded:
        raise ValueError("compile=True: blocks that FSDP shards cannot be compiled; use auto or false")
    return setting


def _is_able_to_compile(device: torch.device) -> bool:
    """Try it on something small: a machine may lack a C compiler or Python's headers."""
    try:
        torch.compile(torch.nn.Softplus())(torch.ones(8, device=device))
    except Exception as error:  # whatever goes wrong in there, a run can do without
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"compile=auto: torch.compile does not work here, so blocks stay as they are ({reason})", stacklevel=2
        )
        return False
    return True


def compile_blocks(objective: Objective) -> None:
    """Compile what the objective names, in place; names of parameters stay. The objective must be on its device.

    `torch.compiler.set_stance("force_eager")` runs them as they were written, for batches of other sizes.
    """
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _PROGRAMS)
    for module in objective.compilable():
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                setattr(module, name, CompilableDropPath(child.drop_prob, device))
        module.compile(dynamic=False)
