"""The result of a fine-tuning: a timm classifier in the layout that timm reads from a folder or from the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from ssl_vit.data.transform import Normalization
from ssl_vit.models.vit import ViT, set_fused_attention
from ssl_vit.models.weights.backbone import TOLERANCE, describe, write_pair
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
    """Write `model.safetensors` and `config.json`, and prove that timm loads them as what was trained.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the classifier, with class names and
    normalisation.

    Raises:
        RuntimeError: what was written does not give the classifier's logits.
    """
    encoder, classifier = objective.backbone(), objective.tested_classifier()
    assert isinstance(encoder, ViT)
    described = describe(encoder, normalization=normalization, provenance=provenance, crop_pct=crop_pct)
    num_classes = classifier.head.out_features
    described["num_classes"] = described["pretrained_cfg"]["num_classes"] = num_classes
    described["global_pool"] = "avg" if objective.config.pool == "mean" else "token"
    described["model_args"] |= {"global_pool": described["global_pool"], "fc_norm": objective.config.pool == "mean"}
    if len(class_names) == num_classes:
        described["label_names"] = list(class_names)
    tensors = {**encoder.vit.state_dict(), **classifier.state_dict()}
    return write_pair(folder, MODEL_FILE, tensors, described, lambda written: _prove_equal(objective, encoder, written))


def _prove_equal(objective: FineTune, encoder: ViT, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    device = next(encoder.parameters()).device
    images = torch.randn(2, encoder.in_chans, *encoder.image_size, generator=generator).to(device)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).to(device).eval()
    set_fused_attention(loaded, all(part.fused_attn for part in encoder.modules() if hasattr(part, "fused_attn")))
    training = objective.training
    objective.eval()
    with torch.inference_mode():
        expected = objective.logits(images)["head"]
        difference = float((expected - loaded(images)).abs().max())
    objective.train(training)
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"{folder}: the exported classifier's logits differ from the trained ones by {difference}")
