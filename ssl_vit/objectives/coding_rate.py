"""SimDINO's loss: Wu et al., "Simplifying DINO via Coding Rate Regularization", ICML 2025 (arXiv:2502.10385).

Views of an image agree on a direction, and the coding rate of a batch keeps the directions of different images apart.
The loss is - coefficient x agreement - coding rate; there are no prototypes, temperatures or centre.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.core.distributed import gather_with_gradient
from ssl_vit.objectives.prototype_loss import num_terms


def view_agreement(student: Float[Tensor, "s b d"], teacher: Float[Tensor, "t b d"]) -> Float[Tensor, ""]:
    """Mean cosine between a teacher's view and the student's views of the same image (SimDINO, arXiv:2502.10385).

    Views are stacked first, global ones before local ones; a teacher's view is not compared with the student's view of
    the same index.

    Args:
        student, teacher: features of any length.

    Returns:
        A number in [-1, 1], in fp32: the mean over images and pairs of views.

    Raises:
        ValueError: there is no pair of different views.
    """
    pairs = num_terms(len(student), len(teacher))
    with torch.autocast(student.device.type, enabled=False):
        views, targets = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
        same = (views[: len(targets)] * targets).sum()
        return ((views * targets.sum(dim=0)).sum() - same) / (pairs * student.shape[1])


def coding_rate(features: Float[Tensor, "v b d"], eps: float) -> Float[Tensor, " v"]:
    """Coding rate of each view's features F, as SimDINO scales it (arXiv:2502.10385):

        gamma / 2 x log det(I + d / (m eps) F'F),    gamma = (d + m) / (d m),

    over the m images of all processes, with gradients to all of them. It is highest where the features fill all
    directions alike, and lowest where they are equal. The determinant is that of the Cholesky factor, in fp32.

    Args:
        features: L2-normalised, or averages of such.
        eps: precision of the code; the smaller it is, the more counts a direction that few features use.

    Returns:
        A number per view, in fp32; NaN where a feature is not finite.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = rearrange(gather_with_gradient(rearrange(features.float(), "v b d -> b v d")), "m v d -> v m d")
        _, num, dim = rows.shape
        spread = torch.eye(dim, device=rows.device) + dim / (num * eps) * rows.mT @ rows
        # Neither raises nor waits for the device where it fails: a loss that is not finite skips the step.
        factor, _ = torch.linalg.cholesky_ex(spread)
        return (dim + num) / (dim * num) * factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)


def patch_agreement(
    student: Float[Tensor, "m d"], teacher: Float[Tensor, "m d"], weights: Float[Tensor, " m"]
) -> Float[Tensor, ""]:
    """Weighted sum of the cosines of a student's masked patches to the teacher's (SimDINOv2, arXiv:2502.10385).

    Args:
        weights: see `masked_patch_weights`.
    """
    with torch.autocast(student.device.type, enabled=False):
        return (F.cosine_similarity(student.float(), teacher.float(), dim=-1) * weights).sum()
