"""Export the result of a run: its backbone in our own format, or a fine-tuned classifier."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_vit.core.reading import entry, read_tensors, settings_of
from ssl_vit.core.settings import section
from ssl_vit.data.transform import Normalization
from ssl_vit.export.classifier import export_classifier, export_distilled
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.weights.backbone import export_backbone, load_strictly
from ssl_vit.objectives.finetune import FineTune, FineTuneConfig
from ssl_vit.runs.checkpoint import MODEL_FILE, STATE_FILE, newest_checkpoint
from ssl_vit.runs.folder import CONFIG_FILE
from ssl_vit.runs.trained import is_fine_tuned, open_trained, read_settings, read_state


def export_run(path: Path, weights: str | None = None, out: Path | None = None) -> Path:
    """Export a backbone in our own format, or the classifier of a fine-tuning; returns the file.

    Args:
        path, weights: see `open_trained`; a run may be finished or not.
        out: the folder to write to; None = the run's.

    Raises:
        ValueError: the folder holds no complete checkpoint, or a run that has nothing to export.
    """
    if out is None and not (path / CONFIG_FILE).is_file():
        raise ValueError(f"{path}: holds no run ({CONFIG_FILE} is missing); name the folder to write to with --out")
    if is_fine_tuned(path):
        if weights is not None:
            raise ValueError(f"weights={weights!r}: {path} is a fine-tuned classifier, whose newest weights leave")
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
    """Export the classifier of a fine-tuning to timm; returns the file."""
    return write_classifier(*_fine_tuned(run), folder)


def export_distilled_run(run: Path, folder: Path) -> Path:
    """Export the distilled DeiT of a fine-tuning to transformers; returns the folder."""
    objective, settings, class_names, _ = _fine_tuned(run)
    return export_distilled(objective, folder, class_names=class_names, **_preprocessing(settings))


def _fine_tuned(run: Path) -> tuple[FineTune, dict[str, Any], list[str], int]:
    """Objective, settings, classes and step of a fine-tuning's newest checkpoint. The teacher is not needed."""
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        raise ValueError(f"{run}: has no complete checkpoint yet")
    settings, state = read_settings(run), read_state(checkpoint)
    class_names = entry(state, "class_names", list[str], checkpoint / STATE_FILE)
    with section("encoder"):
        encoder = EncoderConfig.from_plain(settings["encoder"]).build()
    with section("objective"):
        objective = FineTune(settings_of(FineTuneConfig, settings["objective"]), encoder)
    load_strictly(objective, read_tensors(checkpoint / MODEL_FILE), run)
    return objective, settings, class_names, state["step"]


def _preprocessing(settings: dict[str, Any]) -> dict[str, Any]:
    data = settings["data"]
    return {
        "normalization": Normalization(tuple(data["mean"]), tuple(data["std"])),
        "crop_pct": settings["evaluation"]["crop_pct"],
    }


def write_classifier(
    objective: FineTune, settings: dict[str, Any], class_names: Sequence[str], step: int, folder: Path
) -> Path:
    """Export a fine-tuned classifier with what the plain settings of its run say of it; returns the file."""
    return export_classifier(
        objective,
        folder,
        class_names=class_names,
        **_preprocessing(settings),
        provenance={
            "objective": objective.name,
            "objective_config": settings["objective"],
            "pretrained": settings["encoder"]["pretrained"],
            "source": settings["data"]["source"],
            "steps": step,
            "batch_size": settings["batch"]["size"],
            "seed": settings["seed"],
        },
    )
