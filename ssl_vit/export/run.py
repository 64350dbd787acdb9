"""What a run leaves in our own form: its backbone, or the classifier of a fine-tuning."""

from pathlib import Path
from typing import Any

from ssl_vit.core.reading import entry, read_tensors, settings_of
from ssl_vit.core.settings import section
from ssl_vit.data.transform import Normalization
from ssl_vit.export.classifier import export_classifier
from ssl_vit.models.vit import ViTConfig
from ssl_vit.models.weights.backbone import export_backbone, load_strictly
from ssl_vit.objectives.finetune import FineTune, FineTuneConfig
from ssl_vit.runs.checkpoint import MODEL_FILE, STATE_FILE, newest_checkpoint
from ssl_vit.runs.folder import CONFIG_FILE
from ssl_vit.runs.trained import is_fine_tuned, open_trained, read_settings, read_state


def export_run(path: Path, weights: str | None = None, out: Path | None = None) -> Path:
    """Export a backbone in our own form, and of a fine-tuning its classifier; returns the file.

    Args:
        path, weights: see `open_trained`; a run may be finished or not.
        out: the folder to write to; None = the run's.

    Raises:
        ValueError: the folder holds no whole checkpoint, or a run that has nothing to export.
    """
    if out is None and not (path / CONFIG_FILE).is_file():
        raise ValueError(f"{path}: holds no run ({CONFIG_FILE} is missing); name the folder to write to with --out")
    if is_fine_tuned(path):
        return export_fine_tuned(path, out or path)
    trained = open_trained(path, weights)
    return export_backbone(
        trained.encoder,
        out or path,
        normalization=trained.normalization,
        provenance=trained.provenance,
        crop_pct=trained.crop_pct,
    )


def export_fine_tuned(run: Path, folder: Path) -> Path:
    """Export the classifier of a fine-tuning; returns the file."""
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        raise ValueError(f"{run}: has no whole checkpoint yet")
    settings, state = read_settings(run), read_state(checkpoint)
    names = entry(state, "class_names", list[str], checkpoint / STATE_FILE)
    with section("encoder"):
        encoder = ViTConfig.from_plain(settings["encoder"]).build()
    with section("objective"):
        objective = FineTune(settings_of(FineTuneConfig, settings["objective"]), encoder)
    load_strictly(objective, read_tensors(checkpoint / MODEL_FILE), run)
    return export_classifier(objective, folder, **export_settings(settings, tuple(names), state["step"]))


def export_settings(config: dict[str, Any], class_names: tuple[str, ...], step: int) -> dict[str, Any]:
    """What `export_classifier` is told, out of a run's plain settings."""
    return {
        "class_names": class_names,
        "normalization": Normalization(tuple(config["data"]["mean"]), tuple(config["data"]["std"])),
        "crop_pct": config["evaluation"]["crop_pct"],
        "provenance": {
            "objective": "FineTune",
            "objective_config": config["objective"],
            "pretrained": config["encoder"]["pretrained"],
            "source": config["data"]["source"],
            "steps": step,
            "batch_size": config["batch"]["size"],
            "seed": config["seed"],
        },
    }
