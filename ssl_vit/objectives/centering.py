"""Centring of the teacher against collapse: a moving centre, or Sinkhorn-Knopp."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ssl_vit.core.distributed import max_over_processes, sum_over_processes, world_size
from ssl_vit.objectives.objective import Taken

Centering = Literal["center", "sinkhorn", "none"]


@torch.no_grad()
def centered_probs(
    logits: Float[Tensor, "b k"], center: Float[Tensor, "1 k"], temp: float, centering: Centering, iterations: int
) -> Float[Tensor, "b k"]:
    """The teacher's probabilities, centred by the method `centering`; a centre that is never updated is 0.

    Args:
        iterations: rounds of Sinkhorn-Knopp.
    """
    if centering == "sinkhorn":
        return sinkhorn_knopp(logits, temp, iterations)
    return ((logits.float() - center) / temp).softmax(dim=-1)


class RunningMean:
    """Mean of rows over all micro-batches of a step and all processes.

    A skipped step (fp16 overflow) leaves rows behind; the next step, at another progress, drops them.
    """

    def __init__(self) -> None:
        self._progress: float | None = None
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, rows: Float[Tensor, "n k"], progress: float) -> None:
        """Add the rows of a micro-batch of the step at `progress`."""
        if progress != self._progress or self._sum is None:
            self._progress, self._sum, self._count = progress, rows.new_zeros(1, rows.shape[-1], dtype=torch.float32), 0
        self._sum += rows.sum(dim=0, keepdim=True, dtype=torch.float32)
        self._count += len(rows)

    def move(self, center: Float[Tensor, "1 k"], momentum: float, taken: Taken = None) -> None:
        """Set center = momentum x center + (1 - momentum) x mean and reset the mean.

        The centre does not move if there are no rows or if `taken`, a scalar on the device, is False.
        """
        assert self._sum is not None, "nothing was added"
        count = torch.full_like(self._sum[:, :1], self._count)
        total = sum_over_processes(torch.cat([self._sum, count], dim=1))
        mean = total[:, :-1] / total[:, -1:].clamp(min=1)
        moves = total[:, -1:] > 0
        if taken is not None:
            moves = moves & taken
        center.lerp_(torch.where(moves, mean, center), 1 - momentum)
        self._sum = None


@torch.no_grad()
def sinkhorn_knopp(logits: Float[Tensor, "b k"], temp: float, num_iterations: int = 3) -> Float[Tensor, "b k"]:
    """The teacher's probabilities, balanced so that all prototypes get the same share of the batch (SwAV,
    arXiv:2006.09882, section 3; DINOv2, section 4).

    Computes in logarithms, against over- and underflow, over the rows of all processes, which may have different
    numbers of rows. Rows sum to one.
    """
    scaled = logits.float() / temp
    # Only one factor per prototype and one per row change; each iteration ends with the rows: softmax.
    log_share = -_logsumexp_over_processes(scaled)
    for _ in range(num_iterations - 1):
        log_norm = (scaled + log_share).logsumexp(dim=-1, keepdim=True)
        log_share = -_logsumexp_over_processes(scaled - log_norm)
    return (scaled + log_share).softmax(dim=-1)


def _logsumexp_over_processes(rows: Float[Tensor, "b k"]) -> Float[Tensor, " k"]:
    """logsumexp over the rows of all processes."""
    local = rows.logsumexp(dim=0)
    if world_size() == 1:
        return local
    largest = max_over_processes(local.clone())
    return sum_over_processes((local - largest).exp()).log() + largest
