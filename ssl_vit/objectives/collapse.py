"""Measures collapse in self-distillation and explains it in plain words."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.core.distributed import max_over_processes, world_size
from ssl_vit.objectives.recipes import choose_num_prototypes

RECIPE_LR = {"linear": 5e-4, "sqrt": 4e-3}
"""optim.base_lr of DINO and of DINOv2, by optim.lr_scaling."""
LEAST_AT_ONCE = 64
"""Images of a micro-batch of all processes: the fewest with which losses that take a statistic over it are known to
learn."""
_SMALL_AT_ONCE = f"batch.size {{}} is small: {LEAST_AT_ONCE} or more, without accumulation."


def feature_std(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Spread of L2-normalised features: mean of their standard deviation over dimensions, times sqrt(d).

    Near 1 if features point in all directions, 0 if all are equal (SimSiam, arXiv:2011.10566, figure 2).
    """
    return F.normalize(features.float(), dim=-1).std(dim=0).mean() * math.sqrt(features.shape[-1])


def rankme(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """RankMe (Garrido et al. 2023, arXiv:2210.02885, equation 1): exponential of the entropy of the singular values.

    The number of dimensions that the features use, at most min(n, d).
    """
    # svdvals raises on NaN; the non-finite loss is reported elsewhere.
    values = torch.linalg.svdvals(features.float().nan_to_num())
    shares = values / values.sum().clamp_min(1e-12) + 1e-7
    return (-(shares * shares.log()).sum()).exp()


class PrototypeUse:
    """Prototypes that were the likeliest of any sample since the last reading."""

    def __init__(self) -> None:
        self._used: Bool[Tensor, " k"] | None = None
        self._seen = 0

    def note(self, probs: Float[Tensor, "n k"]) -> None:
        """Count the likeliest prototype of every sample."""
        if self._used is None:
            self._used = torch.zeros(probs.shape[-1], dtype=torch.bool, device=probs.device)
        self._used.index_fill_(0, probs.argmax(dim=-1), True)  # an assignment would wait for the device
        self._seen += len(probs)

    def read(self) -> Float[Tensor, ""]:
        """Share of used prototypes, of min(samples, prototypes), over all processes; resets the count."""
        assert self._used is not None, "nothing was noted"
        used = max_over_processes(self._used.to(torch.uint8)).sum()
        # Every process has seen the same number of samples.
        share = used / min(self._seen * world_size(), len(self._used))
        self._used, self._seen = None, 0
        return share


def diagnose(
    values: Mapping[str, float], objective: Mapping[str, Any], run: Mapping[str, Any] | None = None
) -> str | None:
    """Explain the collapse that the averages of a log interval show, and what to change; None if they show none.

    Settings of the run that alone explain a collapse come first, then general advice.

    Args:
        values: teacher_entropy and kl in nats; feature_std (0 to 1) of the teacher's class tokens; prototypes_used
            (0 to 1).
        objective: settings of DINO or DINOv2, resolved.
        run: known settings, as in a run's config.yaml, and `num_images` of its source.
    """
    uniform = math.log(objective["num_prototypes"])
    entropy, kl = values["teacher_entropy"], values["kl"]
    is_uniform = entropy > 0.98 * uniform and abs(kl) < 0.02 * uniform
    if is_uniform:
        what = (
            f"The loss stands at ln K = {uniform:.2f}: teacher and student give every prototype the same probability "
            f"(teacher entropy {entropy:.2f})."
        )
        advice = (
            "a lower objective.teacher_temp and objective.warmup_teacher_temp, a longer objective.freeze_last_layer, "
            "objective.head_batch_norm true"
        )
    elif entropy < 0.02 * uniform and abs(kl) < 0.05 * uniform and values["prototypes_used"] < 0.1:
        what = (
            f"All images share the same few prototypes ({values['prototypes_used']:.1%} of those that could be in use)."
        )
        advice = "a higher objective.teacher_temp, fewer prototypes (objective.num_prototypes)"
    elif values["feature_std"] < 0.05:
        what = f"All images get nearly the same features (spread {values['feature_std']:.3f} of 1)."
        advice = "a slower teacher (a higher objective.ema_momentum), objective.head_batch_norm true"
    else:
        return None
    found = causes({**(run or {}), "objective": objective}, is_uniform=is_uniform)
    return " ".join([what, *found, f"{'Else try' if found else 'Try'} {advice}, or half the optim.base_lr."])


def diagnose_views(values: Mapping[str, float], run: Mapping[str, Any] | None = None) -> str | None:
    """As `diagnose`, for losses without prototypes (LeJEPA, SimDINO).

    Args:
        values: feature_std (0 to 1) of the class tokens; projection_rank, the share of the dimensions that a batch's
            projections could use and do.
        run: known settings, as in a run's config.yaml.
    """
    if values["feature_std"] < 0.05:
        what = f"All images get nearly the same features (spread {values['feature_std']:.3f} of 1)."
    elif values["projection_rank"] < 0.1:
        what = f"The projections use few dimensions ({values['projection_rank']:.1%} of those that they could)."
    else:
        return None
    settings = run or {}
    if (settings.get("objective") or {}).get("loss") == "coding_rate":
        found = causes(settings, is_uniform=False)
        advice = "a lower objective.coding_coeff or objective.coding_eps"
    else:
        batch = (settings.get("batch") or {}).get("size")
        found = [_SMALL_AT_ONCE.format(batch)] if isinstance(batch, int) and batch < LEAST_AT_ONCE else []
        advice = "a higher objective.weight"
    return " ".join([what, *found, f"{'Else try' if found else 'Try'} {advice}, or half the optim.base_lr."])


def causes(settings: Mapping[str, Any], *, is_uniform: bool) -> list[str]:
    """Sentences on settings that alone explain a collapse, the surest first; docs/when_it_goes_wrong.md lists them.

    Args:
        settings: as in a run's config.yaml, and `num_images`; missing ones are skipped.
        is_uniform: True if all prototypes get the same probability, an effect of centring; False if all images look
            the same.
    """
    objective, optim = settings.get("objective") or {}, settings.get("optim") or {}
    batch, num_images = _number(settings.get("batch") or {}, "size"), _number(settings, "num_images")
    found = []
    for name, remedy in (("ema_momentum", "auto, or .99 and more"), ("ema_momentum_end", "1")):
        if _number(objective, name) < 0.9:
            momentum = f"objective.{name} {_number(objective, name):g}"
            found.append(f"{momentum} makes the teacher a copy of the student: {remedy}.")
    base_lr, recipe = _number(optim, "base_lr"), RECIPE_LR.get(optim.get("lr_scaling", ""), math.nan)
    # Smaller batches tolerate more, by the square root for Adam, and Muon twice as much as Adam.
    most = min(4.5 * max(1.0, (512 / batch) ** 0.5), 18.0) * (2 if optim.get("optimizer") == "muon" else 1)
    if base_lr > most * recipe:
        found.append(f"optim.base_lr {base_lr:g} is {base_lr / recipe:.3g} times the recipe's {recipe:g}: lower it.")
    has_prototypes = objective.get("loss") != "coding_rate"
    if has_prototypes:
        found += _causes_of_prototypes(objective, num_images, is_uniform=is_uniform)
    decays = [_number(optim, name) for name in ("weight_decay", "weight_decay_end")]
    if any(decay > 1 for decay in decays):
        found.append(
            f"optim.weight_decay {max(decay for decay in decays if decay > 1):g} is above 1; the recipes end at .4."
        )
    if _number(optim, "warmup") == 0:
        found.append("optim.warmup 0 starts at the full learning rate: auto.")
    if batch < LEAST_AT_ONCE:
        found.append(
            f"batch.size {batch:g} is small: use 256 or more, with accumulation if memory is short (batch.per_device)."
            if has_prototypes
            else _SMALL_AT_ONCE.format(f"{batch:g}")
        )
    return found


def _causes_of_prototypes(objective: Mapping[str, Any], num_images: float, *, is_uniform: bool) -> list[str]:
    found, centering = [], objective.get("centering")
    if centering == "none" or (centering == "center" and _number(objective, "center_momentum") == 1):
        setting = "objective.centering none" if centering == "none" else "objective.center_momentum 1"
        found.append(f"{setting} leaves the teacher without a centre: objective.centering center or sinkhorn.")
    temp, at_start = _number(objective, "teacher_temp"), _number(objective, "warmup_teacher_temp")
    if is_uniform and max(temp, at_start) > 0.07:
        found.append(f"objective.teacher_temp {max(temp, at_start):g} is too high, above .07.")
    elif is_uniform and temp > 0.04 and _number(objective, "teacher_temp_warmup") == 0:
        found.append(f"objective.teacher_temp_warmup 0 starts at {temp:g}: .3, from .04 on.")
    elif not is_uniform and min(temp, at_start) < 0.02:
        found.append(f"objective.teacher_temp {min(temp, at_start):g} is too low, below .02.")
    prototypes = _number(objective, "num_prototypes")
    if num_images > 0 and prototypes > 4 * choose_num_prototypes(int(num_images)):
        found.append(f"objective.num_prototypes {prototypes:,.0f} are many for {num_images:,.0f} images: auto.")
    return found


def _number(section: Mapping[str, Any], key: str) -> float:
    value = section.get(key)
    return float(value) if isinstance(value, int | float) else math.nan  # all comparisons with NaN are False
