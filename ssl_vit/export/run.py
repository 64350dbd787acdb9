"""Export from a run folder, at any time, out of its newest checkpoint."""

import json
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ssl_vit.checkpoint import MODEL_FILE, STATE_FILE, newest_checkpoint
from ssl_vit.config import load_encoder_config, section
from ssl_vit.evaluation.finetune import FineTune, FineTuneConfig
from ssl_vit.evaluation.supervised import export_settings
from ssl_vit.export.backbone import export_backbone, load_strictly, read_tensors
from ssl_vit.export.classifier import export_classifier
from ssl_vit.run_folder import CONFIG_FILE


def export_run(folder: Path) -> Path:
    """Export what a run has learned so far, finished or not; returns the file.

    Of pre-training it is the backbone, of fine-tuning the classifier.

    Raises:
        ValueError: the folder holds no run, no whole checkpoint, or a run that has nothing to export.
    """
    config_file = folder / CONFIG_FILE
    if not config_file.is_file():
        raise ValueError(f"{folder}: holds no run ({CONFIG_FILE} is missing)")
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"{folder}: has no whole checkpoint yet")
    settings = yaml.safe_load(config_file.read_text())
    state = json.loads((checkpoint / STATE_FILE).read_text())
    tensors = read_tensors(checkpoint / MODEL_FILE)
    if state["objective"] == "FineTune":
        return _export_classifier(folder, settings, state, tensors)
    if state["objective"] == "AttentiveProbe":
        backbone = settings["encoder"]["pretrained"]
        raise ValueError(f"{folder}: is an attentive probe, which leaves its backbone as it was: {backbone}")
    with section("encoder"):
        encoder = load_encoder_config(config_file).build()
    prefix = state["backbone"]
    weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    load_strictly(encoder, weights, checkpoint / MODEL_FILE)
    provenance = {
        "objective": state["objective"],
        "objective_config": settings["objective"],
        "source": settings["data"]["source"],
        "steps": state["step"],
        "batch_size": settings["batch"]["size"],
        "seed": settings["seed"],
    }
    mean, std = tuple(settings["data"]["mean"]), tuple(settings["data"]["std"])
    return export_backbone(encoder, folder, mean=mean, std=std, provenance=provenance)


def _export_classifier(
    folder: Path, settings: dict[str, Any], state: dict[str, Any], tensors: dict[str, Tensor]
) -> Path:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings["objective"].items()
    }
    with section("encoder"):
        encoder = load_encoder_config(folder / CONFIG_FILE).build()
    objective = FineTune(FineTuneConfig(**values), encoder)
    load_strictly(objective, tensors, folder)
    return export_classifier(objective, folder, **export_settings(settings, tuple(state["class_names"]), state["step"]))
