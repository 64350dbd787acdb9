"""Backbones from timm to transformers and back, for all families but plain Vision Transformers."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from ssl_vit.core.reading import entry
from ssl_vit.data.transform import pair
from ssl_vit.models.weights.layouts import Tensors
from ssl_vit.models.weights.layouts_pyramids import CONVNEXT, CONVNEXT_V2, SWIN, SWIN_V2
from ssl_vit.models.weights.layouts_shared import SIZE, Layout, Names, Settings, plain
from ssl_vit.models.weights.layouts_tokens import DEIT, DINOV3

LAYOUTS = {one.model_type: one for one in (SWIN, SWIN_V2, CONVNEXT, CONVNEXT_V2, DEIT, DINOV3)}
"""By transformers' model_type."""
# What a timm model does with its inputs beside its parameters and the settings that torch prints.
_ATTRIBUTES = (
    *("num_heads", "scale", "num_prefix_tokens", "rotate_half"),
    *("window_size", "shift_size", "pretrained_window_size"),
    *("temperature", "min_period", "max_period", "normalize_coords", "grid_offset", "grid_indexing"),
)
# Parts of a timm model behind the final norm, and of transformers' that belong to no backbone or are computed.
_HEAD = re.compile(r"(head(?!\.norm)|head_dist|fc_norm|attn_pool)(\.|$)")
_ELSEWHERE = re.compile(
    r"(pooler|(cls_|distillation_)?classifier|decoder)\."
    r"|(embeddings\.)?mask_token$|.*\.relative_(position_index|coords_table)$"
)
_MAY_BE_ZERO = {"num_register_tokens", "pretrained_window_sizes"}


class Found(NamedTuple):
    """A backbone of transformers for timm."""

    arch: str
    """timm's name of the architecture."""
    model_args: dict[str, Any]
    """Arguments with which `timm.create_model` builds exactly this architecture."""
    tensors: Tensors
    """The weights under timm's names, without a head; they load strictly where `num_classes=0`."""
    image_size: tuple[int, int]
    """Height and width of the images that it is for."""


def timm_to_transformers(model: nn.Module, image_size: int | tuple[int, int]) -> tuple[dict[str, Any], Tensors]:
    """A timm model without its head as config.json and weights of transformers' class of the same architecture.

    Args:
        image_size: of the images that the folder is for. SwinModel and DeiTModel take no other.

    Returns:
        The content of config.json; the weights on the CPU, under the names of files on the hub.

    Raises:
        ValueError: transformers has no class that is the same function at this size; names the part.
    """
    layout = next((one for one in LAYOUTS.values() if one.fits(model)), None)
    if layout is None:
        raise ValueError(f"no class of transformers is known for timm's {type(model).__name__}; export to timm")
    config = {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        "dtype": "float32",
        **{name: default for name, (_, default) in layout.settings.items()},
        **layout.describe(model),
        "image_size": plain(pair(image_size)),
        "layer_norm_eps": layout.eps,
    }
    settings = _read(layout, config, Path("config.json"))
    reason = _difference(model, _built(layout.near, layout.arguments(settings))) or layout.odd(settings)
    if reason is not None:
        raise ValueError(f"transformers' {layout.architecture} cannot be this backbone: {reason}; export to timm")
    tensors = {name: value.detach().float().cpu() for name, value in model.state_dict().items()}
    renamed: Tensors = {}
    for ours, theirs in _parameters(layout.names(settings)):
        if ours in tensors:
            parts = tensors[ours].chunk(len(theirs))
            renamed |= {name: layout.shaped(name, part).clone() for name, part in zip(theirs, parts, strict=True)}
    return config, {**renamed, **layout.own(settings)}


def transformers_to_timm(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], file: Path = Path("config.json")
) -> Found:
    """A backbone of transformers under timm's names; what belongs to no backbone (pooler, heads, decoder) is left out.

    Args:
        config: content of config.json.
        tensors: weights beside it, of the class itself or of one with a head.
        file: what errors name.

    Raises:
        ValueError: the model type is none of `LAYOUTS`; timm has no model that is the same function; a setting has
            another type; or the weights are not those that the settings tell.
    """
    layout = LAYOUTS.get(entry(config, "model_type", str, file))
    if layout is None:
        known, kind = ", ".join(LAYOUTS), config["model_type"]
        raise ValueError(f"{file}: model_type={kind}: is not known; take one of {known}, or timm's weights")
    settings = _read(layout, config, file)
    blocks = sum(settings["depths"]) if "depths" in settings else settings["num_hidden_layers"]
    if blocks > len(tensors):
        raise ValueError(f"{file}: tells of {blocks:,} blocks, and the weights have {len(tensors):,} tensors")
    if (reason := layout.odd(settings)) is not None:
        raise ValueError(f"{file}: timm has no such {layout.architecture}: {reason}; take timm's weights")
    arch, arguments = _timm_arguments(layout, settings)
    wanted = _built(arch, arguments).state_dict()
    given = {name.removeprefix(f"{layout.prefix}."): value for name, value in tensors.items()}
    found: Tensors = {}
    for ours, theirs in _parameters(layout.names(settings)):
        if ours in wanted and all(name in given for name in theirs):
            found[ours] = torch.cat([given.pop(name) for name in theirs])
    left = [name for name, value in given.items() if value.numel() and not _ELSEWHERE.match(name)]
    if left:
        raise ValueError(f"{file}: timm's {arch} has no place for {left[0]}; take timm's weights")
    for name, value in wanted.items():
        shape = tuple(found[name].shape) if name in found else None
        if shape is None or _squeezed(shape) != _squeezed(value.shape):
            said = "is missing" if shape is None else f"has shape {shape}"
            raise ValueError(f"{file}: {name} {said}, and {tuple(value.shape)} is what the settings tell")
        found[name] = found[name].reshape(value.shape)
    return Found(arch, arguments, found, pair(settings["image_size"]))


def _read(layout: Layout, config: Mapping[str, Any], file: Path) -> Settings:
    settings = {}
    for name, (kind, default) in layout.settings.items():
        value = entry({name: default, **config}, name, kind, file)
        settings[name] = tuple(value) if kind is SIZE and isinstance(value, list) else value
        numbers = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int | float)]
        least = 0 if isinstance(value, bool) or name in _MAY_BE_ZERO else 1e-20
        if any(not least <= number <= 2**20 for number in numbers):
            raise ValueError(f"{file}: {name}={value}: expected numbers above 0 and up to {2**20:,}")
    if settings["layer_norm_eps"] > layout.eps:
        raise ValueError(f"{file}: layer_norm_eps={settings['layer_norm_eps']}: timm's {layout.eps:g} is the most")
    return settings


def _timm_arguments(layout: Layout, settings: Settings) -> tuple[str, dict[str, Any]]:
    """timm's architecture, and the arguments in which it differs from it."""
    arch, arguments = layout.arch(settings), layout.arguments(settings)
    if not timm.is_model(arch):
        return layout.near, arguments
    few = {name: arguments[name] for name in ("img_size", "in_chans") if name in arguments}
    return arch, arguments if _difference(_built(arch, few), _built(arch, arguments)) else few


def _built(arch: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A model of timm without memory for its weights."""
    try:
        with torch.device("meta"):
            return timm.create_model(arch, num_classes=0, **arguments)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"timm builds no {arch} with {arguments}: {' '.join(str(error).split())}") from error


def _parameters(names: Names) -> Iterator[tuple[str, list[str]]]:
    """The names of parameters, of which few have a table's whole name."""
    for ours, theirs in names.items():
        for kind in ("", ".weight", ".bias"):
            yield f"{ours}{kind}", [f"{one}{kind}" for one in ([theirs] if isinstance(theirs, str) else theirs)]


def _difference(model: nn.Module, twin: nn.Module) -> str | None:
    """The first part in which two timm models differ as functions up to the final norm; None where they do not."""
    ours, theirs = _described(model), _described(twin)
    for name in (*ours, *theirs):
        mine, wanted = ours.get(name, "missing"), theirs.get(name, "nothing")
        if ours.get(name) != theirs.get(name):
            return f"{name or 'the model'} is {mine}, and would be {wanted}"
    return None


def _described(model: Any) -> dict[str, str]:
    """Kind, settings and shapes of a model's parts in words. 1 x 1 convolutions read as linear layers."""
    found = {}
    for name, module in model.named_modules():
        if _HEAD.match(name) or isinstance(module, nn.Dropout | nn.Identity | DropPath | nn.Sequential | nn.ModuleList):
            continue
        kinds = (kind for kind in type(module).__mro__ if kind.__module__.startswith(("timm.", "torch.")))
        kind, said = "LayerNorm" if isinstance(module, nn.LayerNorm) else next(kinds).__name__, module.extra_repr()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
            kind, has_bias = "Linear", module.bias is not None
            said = f"in_features={module.in_channels}, out_features={module.out_channels}, bias={has_bias}"
        settings = [f"{key}={getattr(module, key)}" for key in _ATTRIBUTES if hasattr(module, key)]
        found[name] = f"{kind}({', '.join(filter(None, (said, *settings)))})"
    for name, value in model.state_dict().items():
        if not _HEAD.match(name):
            grid = f" for a grid of {model.patch_embed.grid_size}" if name == "pos_embed" else ""
            found[name] = f"of shape {_squeezed(value.shape)}{grid}"
    return found


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(side for side in shape if side != 1)
