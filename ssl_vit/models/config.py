"""The settings of an encoder: any architecture of timm's families that learn without labels."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import timm
import torch
from torch import nn

from ssl_vit.core.reading import settings_of
from ssl_vit.core.settings import check_ranges
from ssl_vit.data.transform import pair
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.hierarchical import ConvNeXt, Swin
from ssl_vit.models.rope import RoPEViT
from ssl_vit.models.vit import HybridViT, ViT

# No encoder exceeds these (the largest published has 22 billion parameters); a file that asks for more is a mistake, or
# meant to take the machine's memory.
_ALLOWED = {
    "image_size": "[1, 65536] pixels",
    "patch_size": "[1, 4096] pixels",
    "in_chans": "[1, 4096]",
    "embed_dim": "[1, 65536]",
    "depth": "[0, 1000]",
    "num_heads": "[1, 4096]",
    "mlp_ratio": "(0, 1000]",
    "layer_scale": "(0, inf)",
    "drop_path_rate": "[0, 1)",
}
_MOST_PARAMETERS, _MOST_BLOCKS = 25e9, 500
_WIDEST, _SMALLEST_PATCH = 1_664, 8  # of timm's, for what is left to the architecture
# Settings that only Vision Transformers have; other families take theirs through model_args.
_OF_VITS = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "layer_scale")
# Arguments of timm's factories that have a setting of their own, or none since they would not change the architecture.
_NOT_ARGUMENTS = {
    "img_size": "image_size",
    "in_chans": "in_chans",
    "drop_path_rate": "drop_path_rate",
    "num_classes": None,
    "global_pool": None,
    "class_token": None,
    "patch_drop_rate": None,
    "pos_drop_rate": None,
    "features_only": None,
    "out_indices": None,
    "pretrained": "pretrained",
    "pretrained_cfg": None,
    "pretrained_cfg_overlay": None,
    "pretrained_strict": None,
    "checkpoint_path": "pretrained",
    "cache_dir": None,
    "scriptable": None,
    "exportable": None,
    "no_jit": None,
    "device": None,
    "dtype": None,
}
_FAMILIES: dict[str, type[Encoder]] = {
    "timm.models.vision_transformer": ViT,
    "timm.models.deit": ViT,
    "timm.models.vision_transformer_hybrid": HybridViT,
    "timm.models.eva": RoPEViT,
    "timm.models.swin_transformer": Swin,
    "timm.models.swin_transformer_v2": Swin,
    "timm.models.convnext": ConvNeXt,
}
# What comes nearest to families of timm that are not supported; {} is the size.
_NEAREST = {
    "hiera": "swin_{}_patch4_window7_224",
    "mvitv2": "swin_{}_patch4_window7_224",
    "swin_transformer_v2_cr": "swinv2_{}_window8_256",
    "maxxvit": "swinv2_{}_window8_256",
    "beit": "vit_{}_patch16_224",
    "naflexvit": "vit_{}_patch16_dinov3",
    "vision_transformer_relpos": "vit_{}_patch16_224",
    "cait": "deit3_{}_patch16_224",
    "xcit": "vit_{}_patch16_224",
    "vision_transformer_hybrid": "vit_{}_r26_s32_224",
}


@dataclass(frozen=True)
class EncoderConfig:
    """Which backbone to build. Settings left at `null` are those of the architecture."""

    arch: str = "vit_base_patch16_224"
    """Name of a timm model: a Vision Transformer (vit_*, deit_*, also with RoPE as vit_*_dinov3 and eva02_*, or behind
    a CNN as vit_*_r*_s*), swin_*, swinv2_*, convnext_* or convnextv2_*; `timm.list_models("swin*")` lists them."""
    image_size: int | tuple[int, int] = 224
    """Training size in pixels: one number, or [height, width]. The size of a patch, or 32 in Swin and ConvNeXt, must
    divide it."""
    patch_size: int | tuple[int, int] | None = None
    """Size of a ViT's patch in pixels: one number, or [height, width]."""
    in_chans: int = 3
    """Channels of the images."""
    drop_path_rate: float = 0.0
    """Stochastic depth: the rate of the last block."""
    drop_path_schedule: Literal["linear", "uniform"] = "linear"
    """Rate of the other blocks: growing linearly from 0 at the first, or the same in all (DINOv2)."""
    pos_embed: Literal["learned", "sincos"] = "learned"
    """Position table: learned, or the fixed 2-D sine-cosine table of MAE."""
    embed_dim: int | None = None
    """Width of a ViT's tokens."""
    depth: int | None = None
    """Number of a ViT's blocks. With 0 the encoder only projects patches: a baseline to compare encoders with."""
    num_heads: int | None = None
    """Attention heads of a ViT's block."""
    mlp_ratio: float | None = None
    """Width of the MLP's hidden layer over the width of the tokens, in a ViT."""
    layer_scale: float | None = None
    """Initial factor of each residual branch (LayerScale) of a ViT; DINOv2's is 1e-5."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the architecture in timm, such as {depths: [2, 2, 6, 2], window_size: 4} for Swin. A
    patch_size is that of the stem in Swin and ConvNeXt, and of the CNN's outputs in a hybrid."""
    grad_checkpointing: bool = False
    """Recompute blocks (also MAE's decoder's) in the backward pass: less memory for a third more time."""
    pretrained: str | None = None
    """Weights to start from: folder of a run or an export, .safetensors or official .pth file, or a timm model's name.
    Encoder settings that are not given are those of these weights."""

    FAMILIES: ClassVar[dict[str, type[Encoder]]] = _FAMILIES

    def __post_init__(self) -> None:
        check_ranges(self, **_ALLOWED)
        object.__setattr__(self, "model_args", {name: _plain(name, v) for name, v in self.model_args.items()})
        for name in self.model_args:
            own = _NOT_ARGUMENTS.get(name, "layer_scale" if name == "init_values" else None)
            if own is not None:
                raise ValueError(f"model_args={self.model_args!r}: {name} is set by encoder.{own}")
            if name in _NOT_ARGUMENTS:
                raise ValueError(f"model_args={self.model_args!r}: {name} is no argument of an architecture")
        if (number := self._most_parameters()) > _MOST_PARAMETERS:
            raise ValueError(
                f"embed_dim={self.embed_dim}, depth={self.depth}, image_size={self.image_size}: would be up to "
                f"{number / 1e9:,.0f} billion parameters, and {_MOST_PARAMETERS / 1e9:.0f} billion are the most"
            )

    def _most_parameters(self) -> float:
        """Rough upper bound of the number of parameters, computed before anything is built."""
        width = _WIDEST if self.embed_dim is None else self.embed_dim
        patch = (_SMALLEST_PATCH,) * 2 if self.patch_size is None else pair(self.patch_size)
        height, across = pair(self.image_size)
        tokens = height * across / (patch[0] * patch[1])
        blocks = (self.depth or 0) * (4 + 2 * (4.0 if self.mlp_ratio is None else self.mlp_ratio)) * width**2
        return blocks + width * (tokens + self.in_chans * patch[0] * patch[1])

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "EncoderConfig":
        """The config from plain YAML or JSON values, in which tuples are lists.

        Raises:
            ValueError: a setting that this version does not know, or a value of another type.
        """
        return settings_of(cls, values)

    @classmethod
    def from_timm(cls, arch: str, input_size: Sequence[int], arguments: Mapping[str, Any]) -> "EncoderConfig":
        """The config of a timm model.

        Args:
            input_size: channels, height and width.
            arguments: of timm's factory. Those that an encoder sets itself, or that change no backbone, are left out.

        Raises:
            ValueError: the architecture is not supported, or an argument has no such value.
        """
        family = cls(arch).family()
        names = {"init_values": "layer_scale"}
        given = {names.get(name, name): value for name, value in arguments.items() if value is not None}
        own = {name: given.pop(name) for name in _OF_VITS if name in given and name not in family.other_settings}
        if given.get("patch_size") == 4 and not issubclass(family, ViT):  # of all hierarchical architectures
            del given["patch_size"]
        if len(input_size) != 3:
            raise ValueError(f"input_size={list(input_size)}: must be channels, height and width")
        in_chans, *size = input_size
        size = given.get("img_size") or size
        left_out = {"fc_norm", *_NOT_ARGUMENTS, *family.arguments(cls(arch))}
        return cls.from_plain(
            {
                "arch": arch,
                "image_size": size[0] if isinstance(size, list) and size[1:] == size[:1] else size,
                "in_chans": given.get("in_chans", in_chans),
                "model_args": {name: value for name, value in given.items() if name not in left_out},
                **own,
            }
        )

    @property
    def timm_overrides(self) -> dict[str, Any]:
        """Arguments of `timm.create_model` for those settings that differ from the architecture's own."""
        names = {"layer_scale": "init_values"}
        given = {names.get(name, name): getattr(self, name) for name in _OF_VITS if getattr(self, name) is not None}
        return given | self.model_args

    def family(self) -> type[Encoder]:
        """The class of encoders that the architecture belongs to.

        Raises:
            ValueError: timm does not have the architecture, or it belongs to no supported family.
        """
        name = self.arch.split(".")[0]
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, _supported(), n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else 'timm.list_models("vit_*") lists them'
            raise ValueError(f"arch={self.arch!r}: timm {timm.__version__} has no model of that name; {hint}")
        module = timm.models.model_entrypoint(name).__module__
        if module not in _FAMILIES:
            raise ValueError(_why_not(self.arch, module))
        return _FAMILIES[module]

    def suited_to(self, arch: str) -> "EncoderConfig":
        """These settings, meant as defaults, without those that an architecture of another family does not have."""
        try:
            family = replace(self, arch=arch).family()
        except ValueError:  # said when it is built
            return self
        others = family.other_settings if family is self.family() else (*family.other_settings, "model_args")
        return replace(self, **{name: {} if name == "model_args" else _default(name) for name in others})

    def build(self) -> Encoder:
        """Build the encoder with fresh weights, also where `pretrained` names some: `load_pretrained` reads those.

        Raises:
            ValueError: timm does not have the architecture, it is of no supported family, or sizes do not fit.
        """
        family = self.family()
        if not issubclass(family, ViT):
            for name in (*_OF_VITS, "pos_embed"):
                if getattr(self, name) != _default(name):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r}: {self.arch} is no Vision Transformer; leave it out; sizes "
                        f"are set by model_args, such as {family.example}"
                    )
        for name in family.arguments(self).keys() & self.model_args.keys():
            raise ValueError(f"model_args={self.model_args!r}: {name} is the same in all encoders; leave it out")
        # Of a hybrid it is the patch of the CNN's outputs, in timm's words; of a hierarchical network the stem's.
        if "patch_size" in self.model_args and issubclass(family, ViT) and not issubclass(family, HybridViT):
            raise ValueError(f"model_args={self.model_args!r}: patch_size is set by encoder.patch_size")
        if self.embed_dim is not None and self.num_heads is not None and self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim={self.embed_dim}: must be a multiple of num_heads={self.num_heads}")
        arguments = family.arguments(self) | self.timm_overrides
        if self.model_args:
            self._check_size_of_model(arguments)
        model = self._create(arguments)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            module = timm.models.model_entrypoint(self.arch.split(".")[0]).__module__
            raise ValueError(f"arch={self.arch!r}: {_BATCH_NORM}; {_nearest(self.arch, module)}")
        return family(model, self, arguments)

    def _check_size_of_model(self, arguments: dict[str, Any]) -> None:
        """Refuse what would not fit into memory, before any is allocated."""
        with torch.device("meta"):
            number = sum(parameter.numel() for parameter in self._create(arguments).parameters())
        if number > _MOST_PARAMETERS:
            raise ValueError(
                f"model_args={self.model_args!r}: would be {number / 1e9:,.0f} billion parameters, and "
                f"{_MOST_PARAMETERS / 1e9:.0f} billion are the most"
            )

    def _create(self, arguments: dict[str, Any]) -> nn.Module:
        try:
            return timm.create_model(
                self.arch.split(".")[0],
                num_classes=0,
                in_chans=self.in_chans,
                drop_path_rate=self.drop_path_rate,
                **arguments,
            )
        # timm's own checks, e.g. that the heads divide the width, and what Python says of a wrong argument.
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            given = "".join(f", {key}={value!r}" for key, value in self.timm_overrides.items())
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"arch={self.arch!r}{given}: timm cannot build it: {said}") from error


_BATCH_NORM = (
    "has BatchNorm, with which the number of processes, accumulation and skipped steps would change what is learned"
)


def _default(setting: str) -> Any:
    return EncoderConfig.__dataclass_fields__[setting].default


def _plain(name: str, value: Any) -> Any:
    """A value of `model_args`, with tuples as lists.

    Raises:
        ValueError: it is neither a number, a word, true, false or null, nor a list of such; or far too large.
    """
    if isinstance(value, list | tuple):
        if len(value) > 1_000:
            raise ValueError(f"model_args={{{name!r}: ...}}: a list of {len(value)} values; 1,000 are the most")
        entries = [_plain(name, entry) for entry in value]
        # Blocks are built one at a time, also those that are only counted.
        if name == "depths" and sum(entry for entry in entries if isinstance(entry, int)) > _MOST_BLOCKS:
            raise ValueError(f"model_args={{{name!r}: {value!r}}}: is larger than that of any backbone")
        return entries
    if not isinstance(value, bool | int | float | str | None):
        raise ValueError(f"model_args={{{name!r}: {value!r}}}: must be a number, a word, true, false, null or a list")
    if isinstance(value, int | float) and not abs(value) <= 65_536:
        raise ValueError(f"model_args={{{name!r}: {value!r}}}: is larger than that of any backbone")
    return value


def _supported() -> list[str]:
    return [name for module in _FAMILIES for name in timm.list_models(module=module.rpartition(".")[2])]


def _why_not(arch: str, module: str) -> str:
    with torch.device("meta"):
        model = timm.create_model(arch.split(".")[0], num_classes=0)
    reason = f"comes from {module}, a family that is not supported"
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
        reason = _BATCH_NORM
    return f"arch={arch!r}: {reason}; {_nearest(arch, module)}"


def _nearest(arch: str, module: str) -> str:
    """Words that name the supported architecture that comes nearest."""
    found = re.search(r"tiny|small|base|large|huge", arch)
    size = found[0] if found else "tiny"
    patterns = [pattern for name, pattern in _NEAREST.items() if module.endswith(f".{name}")]
    for pattern in [*patterns, "convnext_{}"]:
        for chosen in (size, "base", "tiny"):
            if timm.is_model(pattern.format(chosen)):
                return f"use {pattern.format(chosen)}"
    raise AssertionError("timm has no convnext_tiny")
