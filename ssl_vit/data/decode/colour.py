"""Colour profiles of images: an image that carries one is converted to sRGB."""

import io
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageCms
from torch import Tensor

_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}
_STRIP = 2**22  # pixels that are converted at once
_LARGEST = 2**22  # bytes of a profile, of which a few are kept; those of printers have up to three million
_ROUNDING = 2  # levels of 255: profiles of sRGB differ by 1


def to_srgb(pixels: UInt8[Tensor, "c h w"], profile: bytes) -> UInt8[Tensor, "c h w"]:
    """Grey, RGB and either with alpha in sRGB; other numbers of channels as they are.

    A profile that is damaged, of another kind of colours, or that of sRGB is passed over.
    """
    colours = {1: 1, 2: 1, 3: 3, 4: 3}.get(pixels.shape[0])
    transform = _transform(profile, "L" if colours == 1 else "RGB") if colours else None
    if transform is None:
        return pixels
    array = pixels[:colours].permute(1, 2, 0).contiguous().numpy()
    out = np.empty_like(array)
    lines = max(1, _STRIP // array.shape[1])
    for top in range(0, len(array), lines):  # each takes several times its memory
        part = array[top : top + lines]
        image = Image.fromarray(part[..., 0] if colours == 1 else part)
        out[top : top + lines] = np.array(ImageCms.applyTransform(image, transform))[..., :colours]
    applied = torch.from_numpy(out).permute(2, 0, 1)
    return torch.cat([applied, pixels[colours:]]) if len(pixels) > len(applied) else applied


def inks_to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """A CMYK or L*a*b* image as RGB; CMYK without a profile by the plain rule of Pillow."""
    transform = _transform(profile, image.mode) if profile else None
    if transform is None and image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        transform = ImageCms.buildTransform(lab, ImageCms.createProfile("sRGB"), "LAB", "RGB")
    applied = ImageCms.applyTransform(image, transform) if transform is not None else None
    return image.convert("RGB") if applied is None else applied


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From pixels of this mode to RGB; None where there is nothing to do, or no way to tell what."""
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
