"""Weights to start from: our own exports, timm's models, transformers' folders and the papers' checkpoints."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import adapt_input_conv
from torch import Tensor

from ssl_vit.core.paths import as_path
from ssl_vit.core.reading import entry, read_tensors
from ssl_vit.data.transform import Normalization, pair
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.patches import sincos_positions
from ssl_vit.models.vit import ViT
from ssl_vit.models.weights.backbone import (
    BACKBONE_FILE,
    CONFIG_FILE,
    backbone_file,
    load_strictly,
    read_config,
    read_description,
    read_encoder_config,
    read_normalisation,
    read_weights,
)
from ssl_vit.models.weights.layouts import Tensors, from_transformers, is_transformers
from ssl_vit.models.weights.papers import fit_positions, from_papers, read_reference

MODEL_FILE = "model.safetensors"
# Widths of the papers' Vision Transformers, and timm's names of them.
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1408: "giant", 1536: "giant"}
# Arguments of a timm model that have another name in our settings.
_ARGUMENTS = {"init_values": "layer_scale"}


@dataclass(frozen=True)
class Pretrained:
    """Weights that an encoder can start from, and what is known about them."""

    name: str
    config: EncoderConfig | None
    """Architecture and sizes; None where the weights do not tell."""
    tensors: Callable[[], Tensors]
    """Reads the weights, under timm's names."""
    normalization: Normalization | None = None
    crop_pct: float | None = None
    """Share of a resized image's sides that the weights' own evaluation keeps; None where it is not known."""
    antialias: bool = True
    """Whether a position table is shrunk with antialiasing, as timm does, or without, as most papers' code does."""


def open_pretrained(name: str) -> Pretrained:
    """Find the weights that `encoder.pretrained` names.

    Args:
        name: folder of a run or of an export to timm or transformers, or one from the hub in these layouts; a
            `.safetensors` file; an official `.pth` of MAE, DINO or DINOv2; the name of a timm model, with its tag.

    Raises:
        ValueError: there are no such weights, or reading them would unpickle more than tensors.
    """
    path = as_path(name)
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        if path.suffix == ".safetensors" and _is_ours(path.parent) and path.name == BACKBONE_FILE:
            return _open_folder(path.parent)
        return _open_file(path)
    if timm.is_model(name.split(".")[0]) and "/" not in name:
        return _open_timm(name)
    near = difflib.get_close_matches(name, timm.list_pretrained("vit_*"), n=1, cutoff=0.8)
    hint = f"; did you mean timm's {near[0]}?" if near else ", and no timm model has this name"
    raise ValueError(f"{name}: no such file or folder{hint}")


def load_pretrained(encoder: Encoder, name: str) -> None:
    """Load the weights that `encoder.pretrained` names into an encoder, strictly.

    A position table of another size is resized (bicubic). A patch projection of 3 channels is adapted to another
    number: for one channel its weights are summed; for more they are repeated in order and scaled by 3 / channels, so
    that the output is the same where all channels are equal.

    Raises:
        ValueError: there are no such weights, or they have another architecture; see `load_strictly`.
    """
    assert isinstance(encoder, ViT)
    found = open_pretrained(name)
    tensors = found.tensors()
    load_strictly(encoder.vit, fit(encoder, tensors, found), Path(name))
    encoder.is_pretrained = True


def fit(encoder: ViT, tensors: Mapping[str, Tensor], found: Pretrained) -> Tensors:
    """The tensors with positions and input channels fitted to the encoder."""
    fitted = dict(tensors)
    table, wanted = fitted.get("pos_embed"), encoder.vit.pos_embed
    if table is not None and wanted is not None and table.ndim == 3 and table.shape[-1] == wanted.shape[-1]:
        grid = None
        if found.config is not None:  # with patches of other sizes the weights do not fit, as is said below
            sides = zip(pair(found.config.image_size), encoder.stride, strict=True)
            rows, columns = (size // patch for size, patch in sides)
            grid = (rows, columns)
        fitted["pos_embed"] = fit_positions(encoder, table, grid, antialias=found.antialias)
    projection = fitted.get("patch_embed.proj.weight")
    if projection is not None and projection.ndim == 4 and projection.shape[1] == 3 != encoder.in_chans:
        fitted["patch_embed.proj.weight"] = adapt_input_conv(encoder.in_chans, projection)
    return {name: value.float() if value.is_floating_point() else value for name, value in fitted.items()}


def infer_config(tensors: Mapping[str, Tensor]) -> EncoderConfig | None:
    """The architecture of a ViT from its weights; None for widths other than the papers'.

    Weights do not tell the number of heads; it is that of timm's architecture of the same width.
    """
    projection = tensors.get("patch_embed.proj.weight")
    if projection is None or projection.ndim != 4 or projection.shape[0] not in _SIZES:
        return None
    width, in_chans, *patch = projection.shape
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    if any(name.endswith(".gamma") for name in tensors):
        arch = f"vit_{_SIZES[width]}_patch14{'_reg4' if registers else ''}_dinov2"
    else:
        arch = f"vit_{_SIZES[width]}_patch{14 if width > 1024 else 16}_224"
    if not timm.is_model(arch):
        return None
    positions = tensors.get("pos_embed")
    if positions is None:
        return None
    prefix = 0 if registers else 1
    side = math.isqrt(positions.shape[1] - prefix)
    if side * side != positions.shape[1] - prefix:
        return None
    is_sincos = prefix == 1 and torch.allclose(positions[0].float(), sincos_positions(width, (side, side)), atol=1e-4)
    return EncoderConfig(
        arch=arch,
        image_size=side * patch[0] if patch[0] == patch[1] else (side * patch[0], side * patch[1]),
        patch_size=patch[0] if patch[0] == patch[1] else (patch[0], patch[1]),
        in_chans=in_chans,
        depth=depth,
        pos_embed="sincos" if is_sincos else "learned",
    )


def _is_ours(folder: Path) -> bool:
    try:
        return read_config(folder) is not None
    except ValueError:
        return False


def _open_folder(folder: Path) -> Pretrained:
    if not (folder / CONFIG_FILE).is_file() or (folder / BACKBONE_FILE).is_file():
        backbone_file(folder)  # says what a run's folder lacks
    described = read_description(folder / CONFIG_FILE)
    if "model_type" in described:
        return _open_transformers(folder, described)
    if _is_ours(folder):
        config, read = read_encoder_config(folder), read_weights
    elif "architecture" in described:
        arch = entry(described, "architecture", str, folder / CONFIG_FILE)
        cfg, arguments = described.get("pretrained_cfg", described), described.get("model_args") or {}
        entry({"pretrained_cfg": cfg}, "pretrained_cfg.input_size", list[int], folder / CONFIG_FILE)
        entry({"model_args": arguments}, "model_args", dict, folder / CONFIG_FILE)
        config, read = _config_of_timm(arch, cfg, arguments), _read_linked
    else:
        raise ValueError(f"{folder / CONFIG_FILE}: neither ssl_vit's, timm's nor transformers'")
    file = folder / (BACKBONE_FILE if (folder / BACKBONE_FILE).is_file() else MODEL_FILE)
    normalization, crop_pct = read_normalisation(described, folder / CONFIG_FILE)
    return Pretrained(str(folder), config, lambda: _without_head(read(file)), normalization, crop_pct)


def _read_linked(file: Path) -> Tensors:
    return read_tensors(file, links=True)  # files in the hub's cache are links


def _open_transformers(folder: Path, described: dict[str, Any]) -> Pretrained:
    file = folder / MODEL_FILE

    def tensors() -> Tensors:
        return from_transformers(_read_linked(file))

    found = tensors()
    config = infer_config(found)
    processor = folder / "preprocessor_config.json"
    preprocessing = read_description(processor) if processor.is_file() else {}
    mean, std = (entry(preprocessing, name, list[float] | None, processor) for name in ("image_mean", "image_std"))
    return Pretrained(
        str(folder),
        config,
        tensors,
        None if mean is None or std is None else Normalization(tuple(mean), tuple(std)),
        _crop_of_transformers(preprocessing),
        antialias=described["model_type"] == "dinov2_with_registers",
    )


def _open_file(file: Path) -> Pretrained:
    def tensors() -> Tensors:
        found = read_reference(file)
        return from_transformers(found) if is_transformers(set(found)) else from_papers(found)

    config = infer_config(tensors())
    # Of the papers' code, only DINOv2's with registers antialiases.
    return Pretrained(str(file), config, tensors, antialias=config is not None and "reg4" in config.arch)


def _open_timm(name: str) -> Pretrained:
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:  # no such tag
        cfg = None
    if cfg is None or not cfg.has_weights:
        tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
        hint = f"; it has {', '.join(tags)}" if tags else ""
        raise ValueError(f"{name}: timm has no pre-trained weights of this name{hint}")
    config = _config_of_timm(name, cfg.to_dict(), {})

    def tensors() -> Tensors:
        try:
            model = timm.create_model(name, pretrained=True, num_classes=0)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"timm cannot load its weights: {' '.join(str(error).split())}") from error
        return dict(model.state_dict())

    return Pretrained(name, config, tensors, Normalization(tuple(cfg.mean), tuple(cfg.std)), cfg.crop_pct)


def _crop_of_transformers(preprocessing: Mapping[str, Any]) -> float | None:
    """The centre crop's share of the shorter side; 1 where images are resized and not cropped."""
    size, crop = preprocessing.get("size"), preprocessing.get("crop_size")
    if not preprocessing.get("do_center_crop"):
        return 1.0 if size else None
    whole, kept = (
        value.get("shortest_edge") or value.get("height") if isinstance(value, dict) else value
        for value in (size, crop)
    )
    return min(1.0, kept / whole) if whole and kept else None


def _config_of_timm(arch: str, cfg: Mapping[str, Any], arguments: Mapping[str, Any]) -> EncoderConfig:
    settings = {_ARGUMENTS.get(key, key): value for key, value in arguments.items()}
    own = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "layer_scale")
    in_chans, *size = cfg["input_size"]
    chosen = {key: settings[key] for key in own if settings.get(key) is not None}
    image_size = settings.get("img_size") or (size[0] if size[0] == size[1] else tuple(size))
    return EncoderConfig.from_plain({"arch": arch, "image_size": image_size, "in_chans": in_chans, **chosen})


def _without_head(tensors: Tensors) -> Tensors:
    """The tensors of a timm model without its classifier."""
    return {name: value for name, value in tensors.items() if not name.startswith(("head.", "head_dist."))}
