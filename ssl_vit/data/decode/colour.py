"""Colour profiles: converts images that carry one to sRGB."""

import io
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageCms
from torch import Tensor

from ssl_vit.data.decode.arrays import as_tensor, by_strips

_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}
_LARGEST = 2**22  # bytes of a profile, a few of which are kept in memory; those of printers have up to three million
_ROUNDING = 2  # levels of 255 below which a profile counts as sRGB's own; profiles of sRGB differ by 1


def to_srgb(pixels: UInt8[Tensor, "c h w"], profile: bytes) -> UInt8[Tensor, "c h w"]:
    """Convert grey or RGB pixels, with alpha or without, to sRGB; other numbers of channels stay as they are.

    A profile that is empty, damaged, of another kind of colours, or sRGB's own is ignored.
    """
    colours = {1: 1, 2: 1, 3: 3, 4: 3}.get(pixels.shape[0])
    transform = _transform(profile, "L" if colours == 1 else "RGB") if colours and profile else None
    if transform is None:
        return pixels

    def convert(part: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
        image = Image.fromarray(part[..., 0] if colours == 1 else part)
        return np.array(ImageCms.applyTransform(image, transform))[..., :colours]

    converted = as_tensor(by_strips(convert, pixels[:colours].permute(1, 2, 0).contiguous().numpy()))
    return torch.cat([converted, pixels[colours:]]) if len(pixels) > len(converted) else converted


def inks_to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert a CMYK or L*a*b* image to RGB; CMYK without a profile by Pillow's plain rule."""
    transform = _transform(profile, image.mode) if profile else None
    if transform is None and image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        transform = ImageCms.buildTransform(lab, ImageCms.createProfile("sRGB"), "LAB", "RGB")
    converted = ImageCms.applyTransform(image, transform) if transform is not None else None
    return image.convert("RGB") if converted is None else converted


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from pixels of this mode to RGB; None where the profile is sRGB's own or of no use."""
    if len(profile) > _LARGEST:
        return None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        described: Any = opened.profile
        if described.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    if mode == "RGB":
        colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(len(steps), -1, 3)
    elif mode == "L":
        colours = steps[None]
    else:
        return transform
    moved = np.array(ImageCms.applyTransform(Image.fromarray(colours), transform)).reshape(*colours.shape[:2], -1)
    change = np.abs(moved.astype(int) - colours.reshape(*colours.shape[:2], -1))
    return transform if change.max() > _ROUNDING else None
