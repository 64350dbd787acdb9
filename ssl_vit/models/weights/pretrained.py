"""Weights to start from: our own exports, timm's models, transformers' folders and the papers' checkpoints."""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from timm.models import adapt_input_conv, convnext, eva, swin_transformer, swin_transformer_v2
from torch import Tensor, nn

from ssl_vit.core.manifest import hash_tensors
from ssl_vit.core.paths import as_path
from ssl_vit.core.reading import entry, read_tensors
from ssl_vit.data.transform import Normalization, pair
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.patches import sincos_positions
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
from ssl_vit.models.weights.exchange import LAYOUTS, Found, transformers_to_timm
from ssl_vit.models.weights.layouts import Tensors, from_transformers, is_transformers
from ssl_vit.models.weights.papers import fit_positions, from_papers, read_reference

MODEL_FILE = "model.safetensors"
# Widths of the papers' Vision Transformers, and timm's names of them.
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1408: "giant", 1536: "giant"}
# Names of the official code to timm's. Those of plain ViTs are in papers.py.
_RENAMING: dict[str, Callable[[dict[str, Tensor], Any], dict[str, Tensor]]] = {
    module.__name__: module.checkpoint_filter_fn for module in (convnext, eva, swin_transformer, swin_transformer_v2)
}


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
            `.safetensors` file or an official `.pth` (MAE, DINO, DINOv2, DINOv3, EVA-02, Swin, ConvNeXt); the name of a
            timm model, with its tag.

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
    known = timm.list_pretrained(["vit_*", "deit*", "eva*", "swin*", "convnext*"])
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    hint = f"; did you mean timm's {near[0]}?" if near else ", and no timm model has this name"
    raise ValueError(f"{name}: no such file or folder{hint}")


def load_pretrained(encoder: Encoder, name: str) -> None:
    """Load the weights that `encoder.pretrained` names into an encoder, strictly.

    Position tables of another size, and relative ones of other windows, are resized (bicubic). A first convolution of 3
    channels is adapted to another number: for one channel its weights are summed; for more they are repeated in order
    and scaled by 3 / channels, so that the output is the same where all channels are equal. The norm of a classifier
    that pools before it normalises becomes the final norm.

    Raises:
        ValueError: there are no such weights, or they have another architecture; see `load_strictly`.
    """
    load_found(encoder, open_pretrained(name))


def load_found(encoder: Encoder, found: Pretrained) -> None:
    """Load weights that were found into an encoder, as `load_pretrained` does."""
    tensors = found.tensors()
    try:
        load_strictly(encoder.model, fit(encoder, tensors, found), Path(found.name))
    except ValueError as error:
        if found.config is not None:
            raise
        what = f"these weights do not tell their architecture, and {encoder.config.arch} was taken"
        raise ValueError(f"{error}; {what}: name theirs with --encoder.arch") from error
    encoder.is_pretrained, encoder.read_sha256 = True, hash_tensors(dict(tensors))


def fit(encoder: Encoder, tensors: Mapping[str, Tensor], found: Pretrained) -> Tensors:
    """The tensors under timm's names, with positions and input channels fitted to the encoder.

    Raises:
        ValueError: names or shapes are of another architecture.
    """
    model: Any = encoder.model
    fitted = _in_timms_names(model, tensors)
    table, wanted = fitted.get("pos_embed"), getattr(model, "pos_embed", None)
    if table is not None and wanted is not None and table.ndim == 3 and table.shape[-1] == wanted.shape[-1]:
        grid = None
        if found.config is not None:  # with patches of other sizes the weights do not fit, as is said below
            sides = zip(pair(found.config.image_size), encoder.stride, strict=True)
            rows, columns = (size // patch for size, patch in sides)
            grid = (rows, columns)
        fitted["pos_embed"] = fit_positions(encoder, table, grid, antialias=found.antialias)
    first = f"{model.pretrained_cfg['first_conv']}.weight"
    projection = fitted.get(first)
    if projection is not None and projection.ndim == 4 and projection.shape[1] == 3 != encoder.in_chans:
        fitted[first] = adapt_input_conv(encoder.in_chans, projection)
    _fit_bias_tables(model, fitted, found.config)
    for name, wanted in model.state_dict().items():  # in small ConvNeXts linear layers are 1 x 1 convolutions
        value = fitted.get(name)
        if value is not None and value.shape[:2] == wanted.shape[:2] and value.numel() == wanted.numel():
            fitted[name] = value.reshape(wanted.shape)
    return {name: value.float() if value.is_floating_point() else value for name, value in fitted.items()}


def _in_timms_names(model: Any, tensors: Mapping[str, Tensor]) -> Tensors:
    """Weights of a backbone's official code under timm's names, as timm renames them; timm's own are left as they are.

    Raises:
        ValueError: names or shapes are of another architecture.
    """
    own = model.state_dict().keys()
    renamed = dict(tensors)
    if "norm.weight" not in renamed and "norm.weight" in own:  # of a classifier that pools before it normalises
        renamed = {re.sub(r"^fc_norm\.", "norm.", name): value for name, value in renamed.items()}
    renamed = {name: value for name, value in renamed.items() if not name.startswith("fc_norm.")}
    rename = _RENAMING.get(type(model).__module__)
    if rename is None or renamed.keys() == own:
        return renamed
    for name in [name for name in renamed if name.endswith(".attn.qkv.bias") and name not in own]:
        if name.replace("qkv.bias", "q_bias") in own:
            continue
        query, _, value = renamed.pop(name).chunk(3)  # those of keys are masked in DINOv3's code
        if query.any() or value.any():
            raise ValueError(f"{name} is not 0, and the architecture has none: use --encoder.arch vit_..._dinov3_qkvb")
    try:
        return rename(renamed, model)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"the weights do not fit {type(model).__name__}: {said}") from error


def _fit_bias_tables(model: nn.Module, tensors: Tensors, config: EncoderConfig | None) -> None:
    """Resize Swin's relative position tables, in place, to the windows of the model.

    Args:
        config: what the weights were trained with; None: their windows were square.
    """
    own: dict[str, Any] = _windows(model)
    tables = {name: f"{name}.relative_position_bias_table" for name in own}
    shapes = {table: own[name].relative_position_bias_table.shape for name, table in tables.items()}
    if all(tensors[table].shape == shape for table, shape in shapes.items() if table in tensors):
        return
    given = {}
    if config is not None:
        with torch.device("meta"):
            given = _windows(config.build().model)
    for name, table in tables.items():
        wanted, value = shapes[table], tensors.get(table)
        if value is None or value.shape[1:] != wanted[1:] or value.shape == wanted:
            continue  # what does not fit is said when it is loaded
        tensors[table] = resize_rel_pos_bias_table(
            value.float(),
            new_window_size=own[name].window_size,
            new_bias_shape=wanted,
            old_window_size=given[name].window_size if name in given else None,
        )


def _windows(model: nn.Module) -> dict[str, Any]:
    return {name: part for name, part in model.named_modules() if hasattr(part, "relative_position_bias_table")}


def infer_config(tensors: Mapping[str, Tensor]) -> EncoderConfig | None:
    """The architecture of a plain ViT from its weights; None for other families and widths other than the papers'.

    Weights do not tell the number of heads; it is that of timm's architecture of the same width.
    """
    projection = tensors.get("patch_embed.proj.weight")
    if projection is None or projection.ndim != 4 or projection.shape[0] not in _SIZES:
        return None
    if any(re.search(r"backbone\.|dist_token|gamma_1|\.(q_proj|q_bias|fc1_g|w1)", name) for name in tensors):
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
        config, read = _config_of_timm(described, folder / CONFIG_FILE), _read_linked
    else:
        raise ValueError(f"{folder / CONFIG_FILE}: neither ssl_vit's, timm's nor transformers'")
    file = folder / (BACKBONE_FILE if (folder / BACKBONE_FILE).is_file() else MODEL_FILE)
    normalization, crop_pct = read_normalisation(described, folder / CONFIG_FILE)
    return Pretrained(str(folder), config, lambda: _without_head(read(file)), normalization, crop_pct)


def _read_linked(file: Path) -> Tensors:
    return read_tensors(file, links=True)  # files in the hub's cache are links


def _open_transformers(folder: Path, described: dict[str, Any]) -> Pretrained:
    config, tensors = _of_transformers(folder, described)
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


def _of_transformers(folder: Path, described: dict[str, Any]) -> tuple[EncoderConfig | None, Callable[[], Tensors]]:
    """The settings of a model of transformers, and what reads its weights."""
    file, config_file = folder / MODEL_FILE, folder / CONFIG_FILE
    if described["model_type"] == "timm_wrapper":
        prefix = "timm_model."
        config = _config_of_timm(described, config_file)
        return config, lambda: _without_head({k.removeprefix(prefix): v for k, v in _read_linked(file).items()})
    if described["model_type"] not in LAYOUTS:
        config = infer_config(from_transformers(_read_linked(file)))
        return config, lambda: from_transformers(_read_linked(file))

    def read() -> Found:
        return transformers_to_timm(described, _read_linked(file), config_file)

    found = read()
    channels = found.model_args["in_chans"]
    config = EncoderConfig.from_timm(found.arch, (channels, *found.image_size), found.model_args)
    return config, lambda: read().tensors


def _config_of_timm(described: dict[str, Any], file: Path) -> EncoderConfig:
    """The settings in a config.json of timm."""
    arch = entry(described, "architecture", str, file)
    size = entry({"pretrained_cfg": described, **described}, "pretrained_cfg.input_size", list[int], file)
    arguments = entry({"model_args": {}, **described}, "model_args", dict | None, file)
    try:
        return EncoderConfig.from_timm(arch, size, arguments or {})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


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
    config = EncoderConfig.from_timm(name, cfg.input_size, {})

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


def _without_head(tensors: Tensors) -> Tensors:
    """The tensors of a timm model without its classifier, whose norm ConvNeXt keeps."""
    return {name: value for name, value in tensors.items() if not re.match(r"head(_dist)?\.(?!norm\.)", name)}
