"""Whether a run that goes on from trained weights still is as good as these."""

from collections.abc import Mapping, Sequence
from typing import Any

from ssl_vit.evaluation.scores import newcombe_interval

TITLES = {"eval_knn": "k-NN", "eval_linear": "the linear probe"}


def fallen(line: Mapping[str, Any], start: Mapping[str, Any], num_images: int) -> str | None:
    """What of a line of scores lies below the start, in words; None if nothing does, or if chance explains it.

    Args:
        line, start: of metrics.jsonl, the start's of step 0; shares of `num_images` tested images.
    """
    for name, title in TITLES.items():
        now, before = line.get(name), start.get(name)
        if now is None or before is None:
            continue
        difference, low, high = newcombe_interval(now, num_images, before, num_images)
        if high < 0:
            return (
                f"{title} is {100 * now:.1f} %, {-100 * difference:.1f} points below the weights that the run started "
                f"from (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
            )
    return None


def first_fall(lines: Sequence[Mapping[str, Any]], num_images: int) -> tuple[int, str] | None:
    """The first step whose scores fell below those of step 0, and `fallen`'s words; None if none did."""
    start = next((line for line in lines if line["step"] == 0), None)
    for line in lines if start is not None else ():
        if start is not None and (words := fallen(line, start, num_images)) is not None:
            return line["step"], words
    return None


def what_to_change(optim: Mapping[str, Any], objective: Mapping[str, Any]) -> str:
    """What a run that fell below its start should set otherwise, by what it has set: settings as in config.yaml."""
    advice = [f"lower optim.base_lr ({optim.get('base_lr')}; a tenth of what suits fresh weights is usual)"]
    if not optim.get("freeze_backbone_until"):
        advice.append("let heads learn first (optim.freeze_backbone_until 0.1, optim.unfreeze_ramp 0.02)")
    if objective.get("anchor") == "none":
        advice.append("anchor it (objective.anchor gram)")
    elif "anchor" in objective:
        advice.append(f"raise objective.anchor_weight ({objective.get('anchor_weight')})")
    if optim.get("layer_decay", 1.0) == 1 and objective.get("layer_decay", 1.0) == 1:
        advice.append("change the first blocks least (optim.layer_decay 0.9)")
    return "; ".join(advice) + "; or train for less long, and keep the best (checkpoint.keep_best)"
