"""FSDP2: models whose parameters, gradients and optimizer state are cut among the processes."""

from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from ssl_vit.core.machine import autocast_dtype
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


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are cut among the processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(config: RunConfig, model: nn.Module, objective: Objective, device: torch.device) -> Objective:
    """The objective with whole parameters on every process, for what is done beside training: itself, or a copy.

    Every process calls this. Shards can be called through the prepared module alone.
    """
    if not is_sharded(model):
        return objective
    copy = config.build_objective().to(device)
    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    copy.load_state_dict(cast("dict[str, torch.Tensor]", tensors))
    return copy.train()
