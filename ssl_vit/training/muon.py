"""Muon for the weight matrices of blocks, AdamW for all else, in one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_STEPS = 5
_AT_ONCE = 2**26
"""Most elements of matrices that are stepped together; where they are shards, each process gathers all of these."""


class Muon(torch.optim.AdamW):
    """AdamW, except for the parameters of groups with `use_muon`: those take steps of Muon.

    Such a step is the momentum of the gradients, looked ahead as Nesterov's and made orthogonal (Jordan et al. 2024,
    "Muon"). It is scaled by .2 times the root of the matrix's longer side (Liu et al. 2025, arXiv 2502.16982, eq. 4),
    which makes it as large as AdamW's, so that both share learning rate and weight decay.
    """

    def __init__(self, groups: list[dict[str, Any]], *, dtype: torch.dtype, **settings: Any) -> None:
        """
        Args:
            groups: as for AdamW, each with `use_muon`; where it is true, of weights of two or more dimensions.
            dtype: the one in which matrices are made orthogonal.
            settings: AdamW's.
        """
        super().__init__(groups, **settings)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, unless `found_inf` says that a gradient is not finite; no gradient of a matrix is left."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"] if group["use_muon"] else ():
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in alike.items():
                count = max(1, _AT_ONCE // shape.numel())
                for start in range(0, len(parameters), count):
                    self._descend(parameters[start : start + count], group["lr"], group["weight_decay"])
        return super().step(closure)

    def _descend(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        """Step parameters of one shape."""
        momenta, aims = [], []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)  # which AdamW expects of every state it loads
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momenta.append(state["momentum_buffer"].lerp(parameter.grad, 1 - MOMENTUM))
            aims.append(parameter.grad.lerp(momenta[-1], MOMENTUM))
            parameter.grad = None  # so that AdamW passes it by
        shape = parameters[0].shape  # of the whole, also where each process has a shard
        scale = lr * 0.2 * max(shape[0], shape.numel() // shape[0]) ** 0.5
        is_bad = getattr(self, "found_inf", None)  # on the device, as for AdamW's fused kernel
        for parameter, momentum, direction in zip(parameters, momenta, orthogonal(aims, self._dtype), strict=True):
            state, after = self.state[parameter], parameter * (1 - lr * weight_decay) - direction * scale
            for old, new in (
                (state["step"], state["step"] + 1),
                (state["momentum_buffer"], momentum),
                (parameter, after),
            ):
                held, found = _local(old), _local(new)
                held.copy_(found if is_bad is None else torch.where(is_bad > 0, held, found))


def orthogonal(matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Nearly U V^T of matrices U S V^T of one shape, by five steps of a Newton-Schulz iteration in `dtype`.

    Further dimensions are counted among the columns. Singular values end between .7 and 1.2, but for very small ones.
    Shards are gathered first, every process computes the whole, and each keeps its shard.
    """
    whole = [matrix.full_tensor() if isinstance(matrix, DTensor) else matrix for matrix in matrices]
    x = torch.stack(whole).flatten(2).to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_NUM_STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    found = (x.mT if is_tall else x).reshape(len(whole), *whole[0].shape).to(whole[0].dtype)
    return [_sharded_as(matrix, part) for matrix, part in zip(matrices, found, strict=True)]


def _sharded_as(matrix: Tensor, whole: Tensor) -> Tensor:
    if not isinstance(matrix, DTensor):
        return whole
    everywhere = DTensor.from_local(whole, matrix.device_mesh, [Replicate()] * matrix.device_mesh.ndim)
    return everywhere.redistribute(placements=matrix.placements)


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
