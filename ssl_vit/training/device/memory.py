"""Memory of a model in training: parameters, what belongs to them, and what a backward pass needs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssl_vit.core.settings import section
from ssl_vit.objectives.objective import Objective
from ssl_vit.training.config import RunConfig
from ssl_vit.training.optim import OptimConfig, is_matrix_of_block, split_for_muon

_MIB = 2**20
_LIKELY_IMAGES = 10_000  # where settings are checked before it is known how many there are


def build_on_meta(config: RunConfig) -> Objective:
    """The objective of a config without `auto`, without memory for its weights.

    Raises:
        ValueError: settings that do not fit each other.
    """
    with torch.device("meta"):
        with section("encoder"):
            encoder = config.encoder.build()
        with section("objective"):
            return config.objective.build(encoder)


def check_pair(config: RunConfig) -> None:
    """Refuse an encoder, an objective and an optimizer that cannot work together, before any image is read.

    Raises:
        ValueError: settings that do not fit each other.
    """
    likely, _ = config.resolve(_LIKELY_IMAGES, num_classes=2)
    objective = build_on_meta(likely)
    likely.build_transform(objective.encoder)
    if likely.optim.optimizer == "muon":
        split_for_muon(objective, likely.optim)


@dataclass(frozen=True)
class Memory:
    """What training holds at all times, in MiB; all of it is fp32."""

    parameters: float
    """All parameters, a teacher's included."""
    teacher: float
    """The teacher's among them."""
    gradients: float
    optimizer: float
    """AdamW's two moments of each parameter; Muon has one."""
    total: float


def model_memory(objective: Objective, config: OptimConfig) -> Memory:
    """Memory of parameters and what belongs to each of them; the objective may be on the meta device."""
    named = list(objective.named_parameters())
    frozen = sum(model.num_bytes for model in objective.frozen)
    held = (frozen + sum(parameter.nbytes for _, parameter in named)) / _MIB
    teacher = (frozen + sum(parameter.nbytes for name, parameter in named if name.startswith("teacher_"))) / _MIB
    learned = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    gradients = sum(parameter.nbytes for _, parameter in learned) / _MIB
    by_muon = [p.nbytes for name, p in learned if config.optimizer == "muon" and is_matrix_of_block(name, p)]
    optimizer = 2 * gradients - sum(by_muon) / _MIB
    return Memory(held, teacher, gradients, optimizer, total=held + gradients + optimizer)


def saved_for_backward(module: nn.Module, forward_backward: Callable[[], None]) -> float:
    """MiB that the graph of `forward_backward` keeps for its backward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward_backward()
    return sum(kept.values()) / _MIB
