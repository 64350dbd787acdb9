"""Signs of collapse in self-distillation, and what they mean in plain words."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.distributed import max_over_processes, world_size


def feature_std(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Spread of L2-normalised features: mean over dimensions of their deviation, times sqrt(d).

    Near 1 where features point everywhere, 0 where all are the same (SimSiam, arXiv:2011.10566, figure 2).
    """
    return F.normalize(features.float(), dim=-1).std(dim=0).mean() * math.sqrt(features.shape[-1])


def rankme(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """RankMe (Garrido et al. 2023, arXiv:2210.02885, equation 1): exponential of the entropy of the singular values.

    How many dimensions the features make use of, at most min(n, d).
    """
    # Not finite after a loss that was not, which is told of in better words than svdvals has.
    values = torch.linalg.svdvals(features.float().nan_to_num())
    shares = values / values.sum().clamp_min(1e-12) + 1e-7
    return (-(shares * shares.log()).sum()).exp()


class PrototypeUse:
    """Which prototypes were some sample's likeliest one since the last reading."""

    def __init__(self) -> None:
        self._used: Bool[Tensor, " k"] | None = None
        self._seen = 0

    def note(self, probs: Float[Tensor, "n k"]) -> None:
        """Count the likeliest prototype of every sample."""
        if self._used is None:
            self._used = torch.zeros(probs.shape[-1], dtype=torch.bool, device=probs.device)
        self._used.index_fill_(0, probs.argmax(dim=-1), True)  # unlike an assignment does not wait for the device
        self._seen += len(probs)

    def read(self) -> Float[Tensor, ""]:
        """Prototypes in use over those that could be (as many as samples, or all), over all processes; starts anew."""
        assert self._used is not None, "nothing was noted"
        used = max_over_processes(self._used.to(torch.uint8)).sum()
        # Every process has seen as many as this one.
        share = used / min(self._seen * world_size(), len(self._used))
        self._used, self._seen = None, 0
        return share


def diagnose(values: Mapping[str, float], num_prototypes: int) -> str | None:
    """Say in one sentence whether the averages of a log interval mean collapse; None where they do not.

    Args:
        values: teacher_entropy and kl in nats; feature_std (0 to 1) of the teacher's class tokens; prototypes_used
            (0 to 1).
    """
    uniform = math.log(num_prototypes)
    entropy, kl = values["teacher_entropy"], values["kl"]
    if entropy > 0.98 * uniform and abs(kl) < 0.02 * uniform:
        return (
            f"The loss stands at ln K = {uniform:.2f}: teacher and student give every prototype the same probability "
            f"(teacher entropy {entropy:.2f}). Sharpen the teacher with a lower objective.teacher_temp and "
            "objective.warmup_teacher_temp, lengthen objective.freeze_last_layer, or halve optim.base_lr."
        )
    if entropy < 0.02 * uniform and abs(kl) < 0.05 * uniform and values["prototypes_used"] < 0.1:
        return (
            f"All images fall on the same few prototypes ({values['prototypes_used']:.1%} of those that could be). "
            "Make sure that the teacher is centred (objective.centering), raise objective.teacher_temp, or halve "
            "optim.base_lr."
        )
    if values["feature_std"] < 0.05:
        return (
            f"All images get nearly the same features (spread {values['feature_std']:.3f} of 1). Make sure that the "
            "teacher is centred (objective.centering) and moves slowly (objective.ema_momentum .99 or more), then "
            "halve optim.base_lr."
        )
    return None
