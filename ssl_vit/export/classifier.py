"""A fine-tuned classifier as a folder that timm reads, or transformers, from disk or from the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ssl_vit.core.writing import UNFINISHED, fresh_folder, naming_full_disk, replace_folder, restore_folder, settle
from ssl_vit.data.transform import Normalization
from ssl_vit.export.transformers import load_strictly, write_folder
from ssl_vit.models.weights.backbone import describe, write_pair
from ssl_vit.models.weights.exchange import timm_to_transformers
from ssl_vit.models.weights.layouts import Tensors
from ssl_vit.models.weights.proof import prove_equal
from ssl_vit.objectives.finetune import FineTune
from ssl_vit.runs.trained import Trained

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
    tensors = {**encoder.model.state_dict(), **prefixed("fc_norm", classifier.fc_norm.state_dict())}
    heads = [head.state_dict() for head in classifier.heads]
    if len(heads) > len(encoder.head_names):  # of the same features: the mean of their logits is that of one layer
        heads = [{key: torch.stack([head[key] for head in heads]).mean(dim=0) for key in heads[0]}]
    for name, head in zip(encoder.head_names, heads, strict=True):
        tensors |= prefixed(name, head)

    def prove(written: Path) -> None:
        loaded = timm.create_model(f"local-dir:{written}", pretrained=True)
        prove_equal(objective, encoder, lambda images: objective.logits(images).values(), loaded, what="logits")

    return write_pair(folder, MODEL_FILE, tensors, described, prove)


def export_distilled(
    objective: FineTune, folder: Path, *, class_names: Sequence[str], normalization: Normalization, crop_pct: float
) -> Path:
    """Write a distilled DeiT as transformers' DeiTForImageClassificationWithTeacher, and prove its logits equal.

    Returns:
        The folder, written elsewhere first and then moved into place.

    Raises:
        ValueError: the backbone is no distilled DeiT, or transformers has no class that is the same function.
        RuntimeError: transformers gives other logits.
    """
    encoder, classifier = objective.backbone(), objective.tested_classifier()
    if not hasattr(encoder.model, "dist_token"):
        raise ValueError(
            f"encoder.arch={encoder.config.arch!r}: transformers' DeiTForImageClassificationWithTeacher is a distilled "
            "DeiT; classifiers of other backbones leave as timm's alone"
        )
    config, tensors = timm_to_transformers(encoder.model, encoder.image_size)
    named = list(class_names) if len(class_names) == objective.config.classes else None
    labels = named or [f"LABEL_{number}" for number in range(objective.config.classes)]
    config["architectures"] = ["DeiTForImageClassificationWithTeacher"]
    config["id2label"] = {str(number): name for number, name in enumerate(labels)}
    config["label2id"] = {name: number for number, name in enumerate(labels)}
    tensors = {f"deit.{name}": value for name, value in tensors.items() if not name.startswith("pooler.")}
    for name, head in zip(("cls_classifier", "distillation_classifier"), classifier.heads, strict=True):
        tensors |= prefixed(name, {key: value.detach().float().cpu() for key, value in head.state_dict().items()})
    restore_folder(folder)
    with naming_full_disk(folder), fresh_folder(folder.with_name(f"{UNFINISHED}{folder.name}")) as unfinished:
        write_folder(unfinished, Trained(encoder, normalization, crop_pct, {}, folder), config, tensors)
        loaded = _Logits(unfinished)
        prove_equal(objective, encoder, lambda images: objective.logits(images).values(), loaded, what="logits")
        settle(unfinished, like=unfinished / "config.json")
        replace_folder(unfinished, folder)
    return folder


class _Logits(nn.Module):
    """The logits of the classifier in a folder, as transformers loads it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import DeiTForImageClassificationWithTeacher

        self.model = load_strictly(DeiTForImageClassificationWithTeacher, folder)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def prefixed(name: str, tensors: Tensors) -> Tensors:
    """Tensors by the names that they have where their module is called `name`."""
    return {f"{name}.{key}": value for key, value in tensors.items()}
