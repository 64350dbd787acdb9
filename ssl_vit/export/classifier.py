"""A fine-tuned classifier as a folder that timm reads, from disk or from the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from ssl_vit.data.transform import Normalization
from ssl_vit.models.weights.backbone import describe, write_pair
from ssl_vit.models.weights.proof import prove_equal
from ssl_vit.objectives.finetune import FineTune

MODEL_FILE = "model.safetensors"


def export_classifier(
    objective: FineTune,
    folder: Path,
    *,
    class_names: Sequence[str],
    normalization: Normalization,
    crop_pct: float,
    provenance: dict[str, Any],
) -> Path:
    """Write `model.safetensors` and `config.json`, and prove that timm gives the trained logits from them.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads the classifier, with class names and normalisation.

    Raises:
        RuntimeError: timm gives other logits.
    """
    encoder, classifier = objective.backbone(), objective.tested_classifier()
    described = describe(encoder, normalization=normalization, provenance=provenance, crop_pct=crop_pct)
    num_classes = objective.config.classes
    described["num_classes"] = described["pretrained_cfg"]["num_classes"] = num_classes
    arguments, described["global_pool"] = encoder.timm_arguments(
        objective.pooled, norm_pooled=objective.pooled == "mean"
    )
    described["model_args"] |= arguments
    if len(class_names) == num_classes:
        described["label_names"] = list(class_names)
    tensors = {**encoder.model.state_dict(), **prefixed("fc_norm", classifier.fc_norm)}
    for name, head in zip(encoder.head_names, classifier.heads, strict=True):
        tensors |= prefixed(name, head)

    def prove(written: Path) -> None:
        loaded = timm.create_model(f"local-dir:{written}", pretrained=True)
        prove_equal(objective, encoder, lambda images: objective.logits(images).values(), loaded, what="logits")

    return write_pair(folder, MODEL_FILE, tensors, described, prove)


def prefixed(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module by the names that they have where it is called `name`."""
    return {f"{name}.{key}": value for key, value in module.state_dict().items()}
