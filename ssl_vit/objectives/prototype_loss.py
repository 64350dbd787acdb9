"""DINO's and iBOT's losses from the inputs of the head's last layer, in chunks of rows.

Logits of 65,536 prototypes are the largest tensors of a step. Here only a chunk's logits exist at once, and their
gradient is turned into that of features and prototypes immediately: the same sums and precision in less memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK_NUMBERS = 2**22  # logits per chunk: 16 MiB in fp32


def cross_entropy(logits: Float[Tensor, "n k"], targets: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """Minus the sum of targets x log-softmax for each row, in fp32. A row's targets need not sum to one."""
    return targets.sum(dim=-1) * logits.logsumexp(dim=-1) - (targets * logits).sum(dim=-1)


def num_terms(views: int, teachers: int) -> int:
    """Number of pairs of a student's view and a different view of the teacher.

    Raises:
        ValueError: there are none, or the teacher has views that the student lacks.
    """
    if teachers > views or views * teachers <= teachers:
        raise ValueError(
            f"the student has {views} views and the teacher {teachers}: the student must see all views of the "
            "teacher and at least two"
        )
    return (views - 1) * teachers


def dino_prototype_loss(
    features: Float[Tensor, "s b d"],
    prototypes: Float[Tensor, "k d"],
    teacher_probs: Float[Tensor, "t b k"],
    student_temp: float = 0.1,
) -> Float[Tensor, ""]:
    """`dino_loss` of the logits features x prototypes (DINO, arXiv:2104.14294, equation 2).

    For a student view the sum over teacher views equals one cross-entropy with the sum of their probabilities.
    """
    views, batch, _ = features.shape
    teachers = len(teacher_probs)
    total = teacher_probs.sum(dim=0, dtype=torch.float32)

    def targets(rows: slice) -> Float[Tensor, "c k"]:
        # All rows belong to one view: no chunk crosses the end of a view.
        view, start = divmod(rows.start, batch)
        images = slice(start, start + rows.stop - rows.start)
        return total[images] - teacher_probs[view, images] if view < teachers else total[images].clone()

    weights = torch.full((views * batch,), 1 / (num_terms(views, teachers) * batch), device=features.device)
    rows = rearrange(features, "s b d -> (s b) d")
    return _prototype_loss(rows, prototypes, targets, weights, student_temp, batch)


def ibot_prototype_loss(
    features: Float[Tensor, "m d"],
    prototypes: Float[Tensor, "k d"],
    teacher_probs: Float[Tensor, "m k"],
    weights: Float[Tensor, " m"],
    student_temp: float = 0.1,
) -> Float[Tensor, ""]:
    """`ibot_loss` of the logits features x prototypes (iBOT, arXiv:2111.07832, equation 3).

    Args:
        weights: see `masked_patch_weights`.
    """
    return _prototype_loss(
        features,
        prototypes,
        lambda rows: teacher_probs[rows].float().clone(),
        weights,
        student_temp,
        max(1, len(features)),
    )


def masked_patch_weights(masks: Bool[Tensor, "*v n"], masked: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Weight of each masked patch: 1 / (masked patches of its crop) / (number of all crops).

    Args:
        masked: indices of the masked patches in the flattened `masks`.
    """
    weights = masks / masks.sum(dim=-1, keepdim=True).clamp(min=1)
    return weights.flatten().index_select(0, masked) / masks[..., 0].numel()


def _prototype_loss(
    features: Float[Tensor, "n d"],
    prototypes: Float[Tensor, "k d"],
    targets: Callable[[slice], Float[Tensor, "c k"]],
    weights: Float[Tensor, " n"],
    temp: float,
    period: int,
) -> Float[Tensor, ""]:
    """Weighted sum of the rows' cross-entropies.

    Args:
        targets: returns the targets of a chunk of rows, in fp32; the result is overwritten.
        period: no chunk of rows crosses a multiple of this.
    """
    size = max(1, min(period, CHUNK_NUMBERS // len(prototypes)))
    chunks = [
        slice(start, min(start + size, first + period))
        for first in range(0, len(features), period)
        for start in range(first, min(first + period, len(features)), size)
    ]
    if torch.is_autocast_enabled(features.device.type):
        dtype = torch.get_autocast_dtype(features.device.type)
    else:
        dtype = features.dtype
    return _PrototypeLoss.apply(features, prototypes, targets, weights, temp, chunks, dtype)  # pyright: ignore[reportReturnType]


class _PrototypeLoss(torch.autograd.Function):
    """Loss and both gradients in one pass over the rows; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        prototypes: Tensor,
        targets: Callable[[slice], Tensor],
        weights: Tensor,
        temp: float,
        chunks: list[slice],
        dtype: torch.dtype,
    ) -> Tensor:
        loss = torch.zeros((), device=features.device)
        wants_gradient = any(ctx.needs_input_grad)
        rows, columns = features.to(dtype), prototypes.to(dtype)
        of_features = torch.zeros_like(features, dtype=torch.float32) if wants_gradient else None
        of_prototypes = torch.zeros_like(prototypes, dtype=torch.float32) if wants_gradient else None
        # The weights are too small for half precision; divided by the largest they lie in [0, 1].
        largest = weights.max() if len(weights) else weights.new_ones(())
        for chunk in chunks:
            logits = (rows[chunk] @ columns.T).float().div_(temp)
            target = targets(chunk)
            mass = target.sum(dim=-1)
            logsumexp = logits.logsumexp(dim=-1)
            row_losses = mass * logsumexp - torch.linalg.vecdot(target, logits)
            loss += (row_losses * weights[chunk]).sum()
            if of_features is not None and of_prototypes is not None:
                softmax = logits.sub_(logsumexp[:, None]).exp_()
                gradient = torch.sub(softmax.mul_(mass[:, None]), target, out=target)
                gradient = gradient.mul_((weights[chunk] / largest)[:, None]).to(dtype)
                of_features[chunk] = gradient @ columns
                if dtype == torch.float32:
                    of_prototypes.addmm_(gradient.T, rows[chunk])
                else:
                    of_prototypes += gradient.T @ rows[chunk]
        ctx.save_for_backward(of_features, of_prototypes, largest / temp)
        ctx.dtypes = features.dtype, prototypes.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_features, of_prototypes, scale = ctx.saved_tensors
        scale = grad * scale
        wants = ctx.needs_input_grad
        return (
            (of_features * scale).to(ctx.dtypes[0]) if wants[0] else None,
            of_prototypes.mul_(scale).to(ctx.dtypes[1]) if wants[1] else None,
            *[None] * 5,
        )
