"""Where a backbone comes from: what checkpoints and exports are told of their run."""

from typing import Any

import torch

from ssl_vit.core.machine import device_name
from ssl_vit.data.sources.source import Source
from ssl_vit.data.sources.stream import Stream
from ssl_vit.objectives.objective import Objective


def facts(objective: Objective, source: Source | Stream, device: torch.device, num_processes: int) -> dict[str, Any]:
    """What the settings of a run do not say, in a form that JSON takes."""
    return {
        "objective": objective.name,
        "num_images": source.num_samples,
        "attribution": source.attribution,
        "hardware": f"{num_processes} x {device_name(device)}",
    }


def provenance(settings: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """What an export is told of its run.

    Args:
        settings: the run's settings as plain values.
        state: `facts` and "step", as a checkpoint keeps them; those of older ones have fewer.
    """
    return {
        "objective": state["objective"],
        "objective_config": settings["objective"],
        "optim": settings["optim"],
        "source": settings["data"]["source"],
        "num_images": state.get("num_images"),
        "attribution": state.get("attribution"),
        "steps": state["step"],
        "batch_size": settings["batch"]["size"],
        "pretrained": settings["encoder"].get("pretrained"),
        "seed": settings["seed"],
        "feature": settings["evaluation"]["feature"],
        "hardware": state.get("hardware"),
        "collapse": state.get("faults", {}).get("collapse") or None,
    }
