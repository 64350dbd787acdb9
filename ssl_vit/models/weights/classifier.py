"""Trained classifiers of any architecture of timm: by name, or in a folder of timm's layout."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ssl_vit.core.paths import as_path
from ssl_vit.core.reading import entry, read_tensors
from ssl_vit.data.transform import Normalization
from ssl_vit.models.weights.backbone import (
    CONFIG_FILE,
    check_sizes,
    load_strictly,
    read_description,
    read_normalisation,
)

MODEL_FILE = "model.safetensors"
# Arguments of timm's factory that name files or fetch something; a folder's config.json may not.
_NOT_ARGUMENTS = ("pretrained", "checkpoint", "cache", "features_only", "out_indices", "num_classes", "in_chans")


@dataclass(frozen=True)
class NamedClassifier:
    """A trained classifier, before its weights are read."""

    name: str
    in_chans: int
    image_size: tuple[int, int]
    """Height and width in pixels of the images that it was trained on."""
    normalization: Normalization
    num_classes: int
    class_names: tuple[str, ...]
    """In the order of its logits; empty where they are not known."""
    build: Callable[[], nn.Module]
    """Builds the model with fresh weights."""
    read: Callable[[], nn.Module]
    """Builds the model with its trained weights; ValueError if they are damaged or cannot be fetched."""


def open_classifier(name: str) -> NamedClassifier:
    """Find the classifier that a setting names.

    Args:
        name: folder of a finished fine-tuning, or any with a config.json and a model.safetensors in timm's layout; a
            `.safetensors` file beside such a config.json; the name of a timm model, with its tag.

    Raises:
        ValueError: there is none, or it has no head.
    """
    path = as_path(name)
    if path.is_dir():
        found = _open_file(path / MODEL_FILE)
    elif path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError("is no .safetensors file, and others are not unpickled since that can run code")
        found = _open_file(path)
    elif timm.is_model(name.split(".")[0]) and "/" not in name:
        found = _open_timm(name)
    else:
        near = difflib.get_close_matches(name, timm.list_pretrained(), n=1, cutoff=0.8)
        hint = f"; did you mean timm's {near[0]}?" if near else ", and no timm model has this name"
        raise ValueError(f"no such file or folder{hint}")
    if found.num_classes < 1:
        raise ValueError("is a backbone without a classifier; fine-tune it first, or name one that is")
    return found


def _open_file(file: Path) -> NamedClassifier:
    folder, config_file = file.parent, file.parent / CONFIG_FILE
    if not (file.is_file() and config_file.is_file()):
        if (folder / "config.yaml").is_file() and not config_file.is_file():
            raise ValueError(f"holds no classifier yet; `ssl-vit export {folder}` writes that of a fine-tuning")
        if config_file.is_file() and read_description(config_file).get("num_classes") == 0:
            raise ValueError("is a backbone without a classifier; fine-tune it first, or name one that is")
        missing = file if config_file.is_file() else config_file
        raise ValueError(f"{missing} is missing; a classifier is both files, in timm's layout")
    described = read_description(config_file)
    arch = entry(described, "architecture", str, config_file)
    if not timm.is_model(arch):
        raise ValueError(f"{config_file}: architecture={arch!r}: timm {timm.__version__} has no model of that name")
    num_classes = entry(described, "num_classes", int, config_file)
    channels, *size = entry(
        {"pretrained_cfg": described, **described}, "pretrained_cfg.input_size", list[int], config_file
    )
    if len(size) != 2:
        raise ValueError(f"{config_file}: pretrained_cfg.input_size must be channels, height and width")
    given = entry({"model_args": {}, **described}, "model_args", dict | None, config_file) or {}
    arguments = {key: value for key, value in given.items() if not key.startswith(_NOT_ARGUMENTS)}
    in_chans = entry({"in_chans": channels, **given}, "in_chans", int, config_file)

    def build() -> nn.Module:
        try:
            return timm.create_model(arch, num_classes=num_classes, in_chans=in_chans, **arguments)
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{config_file}: timm cannot build it: {' '.join(str(error).split())}") from error

    def read() -> nn.Module:
        tensors = read_tensors(file, links=True)
        check_sizes(build, tensors, file)
        model = build()
        load_strictly(model, tensors, file)
        return model

    return NamedClassifier(
        str(file),
        in_chans,
        (size[0], size[1]),
        read_normalisation(described, config_file)[0],
        num_classes,
        tuple(entry({"label_names": [], **described}, "label_names", list[str] | None, config_file) or ()),
        build,
        read,
    )


def _open_timm(name: str) -> NamedClassifier:
    try:
        cfg: Any = timm.get_pretrained_cfg(name)
    except RuntimeError:  # no such tag
        cfg = None
    if cfg is None or not cfg.has_weights:
        tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise ValueError(f"timm has no weights of this name{'; it has ' + ', '.join(tags) if tags else ''}")

    def read() -> nn.Module:
        try:
            return timm.create_model(name, pretrained=True)
        except (OSError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"timm cannot fetch its weights; name a folder that holds them instead: {said}") from error

    channels, *size = cfg.input_size
    return NamedClassifier(
        name,
        channels,
        (size[0], size[1]),
        Normalization(tuple(cfg.mean), tuple(cfg.std)),
        cfg.num_classes,
        tuple(cfg.label_names or ()),
        lambda: timm.create_model(name),
        read,
    )
