"""Frozen models: a teacher, or weights to stay near to, that an objective reads from elsewhere and never changes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_vit.core.manifest import hash_tensors


class Frozen:
    """A model that does not learn and is not part of the objective that holds it.

    It is no submodule: no checkpoint, optimizer, gradient bucket or shard holds it, and every process has it whole. It
    stays in eval mode. A run that resumes reads it again from where it came from, and goes on only if the SHA-256 of
    its weights is the one that the checkpoint noted; see `check_frozen`. List it in `Objective.frozen`.

    Args:
        model: any module, with its weights; it is put into eval mode, and its parameters need no gradient from then on.
        name: what it is for, such as "teacher"; one for each frozen model of an objective.
        came_from: how errors name its weights: the setting and its value, `objective.teacher='...'`.
        sha256: of the weights that were read, where they were then fitted to a size, which rounds differently on other
            machines; None computes that of the model's.
    """

    def __init__(self, model: nn.Module, name: str, came_from: str, sha256: str | None = None) -> None:
        self.name, self.came_from, self._sha256 = name, came_from, sha256
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor, **how: Any) -> Any:
        """Call the model on the device of `images`, without gradients."""
        return self.on(images.device)(images, **how)

    def on(self, device: torch.device) -> Any:
        """The model, moved to a device; for other methods than forward, inside of `torch.no_grad`."""
        self.model.to(device)
        return self.model

    @property
    def num_bytes(self) -> int:
        """Memory of its parameters."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    @property
    def sha256(self) -> str:
        """SHA-256 of its parameters and buffers: names, types, shapes and values. It is computed once."""
        if self._sha256 is None:
            state = self.model.state_dict()
            self._sha256 = hash_tensors({name: value.detach().cpu() for name, value in state.items()})
        return self._sha256


def hashes(models: Sequence[Frozen]) -> dict[str, str]:
    """SHA-256 of the weights of each frozen model, by its name: what a checkpoint notes."""
    return {model.name: model.sha256 for model in models}


def check_frozen(models: Sequence[Frozen], noted: Mapping[str, str], where: str) -> None:
    """Refuse frozen models that are not those that a run began with.

    Args:
        noted: what `hashes` gave then.
        where: the checkpoint that noted it.

    Raises:
        ValueError: the weights of one of them have another SHA-256, or one is there on one side alone.
    """
    more = sorted(noted.keys() - {model.name for model in models})
    if more:
        raise ValueError(f"{where}: was trained with a {more[0]}, and the settings name none; name it, or --fresh")
    for model in models:
        if model.name not in noted:
            raise ValueError(f"{model.came_from}: {where} was trained without a {model.name}; leave it out, or --fresh")
        if model.sha256 != noted[model.name]:
            raise ValueError(
                f"{model.came_from}: the {model.name}'s weights are not those that {where} was trained with (SHA-256 "
                f"{model.sha256[:12]}... instead of {noted[model.name][:12]}...); give the old ones, or --fresh"
            )
