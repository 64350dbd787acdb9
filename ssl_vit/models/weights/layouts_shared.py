"""What tells how the backbones of one family are written in timm and in transformers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ssl_vit.data.transform import pair
from ssl_vit.models.weights.layouts import Tensors

SIZE = int | tuple[int, int]
"""Type of a size in config.json: one number stands for both sides."""

Settings = dict[str, Any]
"""Entries of transformers' config.json whose types are checked."""
Names = dict[str, str | tuple[str, ...]]
"""timm's name of a part or parameter, and transformers' name of it; or its parts, joined along the first dimension."""


@dataclass(frozen=True)
class Layout:
    """A class of transformers, and the models of timm that are the same function."""

    architecture: str
    """Name of transformers' class."""
    model_type: str
    prefix: str
    """Of the backbone's parameters within transformers' larger models."""
    eps: float
    """Of timm's norms. A smaller one is accepted: beside a token's variance, of about 1, the difference is lost."""
    settings: Mapping[str, tuple[Any, Any]]
    """Entries of config.json that tell the architecture: type, and the value where it is not said."""
    fits: Callable[[nn.Module], bool]
    """Whether a timm model belongs to the family."""
    describe: Callable[[Any], Settings]
    """The entries of config.json for a timm model."""
    arch: Callable[[Settings], str]
    """timm's name of the architecture of these widths; of none that there is where they are of no architecture."""
    near: str
    """timm's name of an architecture that the arguments make any other of."""
    arguments: Callable[[Settings], dict[str, Any]]
    """Arguments of timm's architecture."""
    odd: Callable[[Settings], str | None]
    """What timm's and transformers' models of these settings do differently; None where they agree."""
    names: Callable[[Settings], Names]
    own: Callable[[Settings], Tensors] = lambda settings: {}
    """Tensors that transformers' class has beside the backbone's."""
    shaped: Callable[[str, Tensor], Tensor] = lambda name, value: value
    """A tensor in the shape that it has in transformers, where its name is the given one."""


def under(ours: str, theirs: str, parts: Mapping[str, str | tuple[str, ...]]) -> Names:
    """The names of a block's parts, with timm's and transformers' names of the block before them."""
    return {
        f"{ours}.{part}": f"{theirs}.{name}" if isinstance(name, str) else tuple(f"{theirs}.{one}" for one in name)
        for part, name in parts.items()
    }


def plain(size: tuple[int, ...]) -> int | list[int]:
    """A size as transformers and timm write it: one number for both sides where they are equal."""
    return size[0] if size[0] == size[1] else list(size)


def grid_of(settings: Settings) -> tuple[int, int]:
    """Rows and columns of patches in an image of the size that is told."""
    image, patch = pair(settings["image_size"]), pair(settings["patch_size"])
    return image[0] // patch[0], image[1] // patch[1]


def not_whole(settings: Settings) -> str | None:
    """The reason why an image of the size that is told has no whole number of patches, if so."""
    image, patch = pair(settings["image_size"]), pair(settings["patch_size"])
    if any(side % part for side, part in zip(image, patch, strict=True)):
        return f"patches of {patch[0]} x {patch[1]} do not divide images of {image[0]} x {image[1]}"
    return None


def ratio(hidden: int, width: int) -> float:
    """What timm multiplies a width by, and rounds down, for a hidden layer of this width."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width
