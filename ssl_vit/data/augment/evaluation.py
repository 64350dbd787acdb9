"""Deterministic crops that bring images to an encoder's size."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.transforms import InterpolationMode

from ssl_vit.data.augment.crops import random_resized_crop
from ssl_vit.data.augment.device import normalize
from ssl_vit.data.transform import Normalization, check_divisible

CROP_PCT = 0.875
"""Share of a resized image's sides that the centre crop keeps, unless something else is known."""
_ELONGATED = 8  # an image is resized to at most so many times the length of its crop


@dataclass(frozen=True)
class EvalTransform:
    """Centre crop of an encoder's size, without randomness.

    The image is resized (bicubic, antialiased, aspect ratio kept) until it just covers `size / crop_pct`, and the
    centre of `size` is cut out. 224 pixels at .875 is the usual "resize 256, centre crop 224".
    """

    size: tuple[int, int]
    """Height and width of the crop in pixels."""
    normalization: Normalization
    crop_pct: float = CROP_PCT
    """Share of the covered height and width that is kept, in (0, 1]."""
    padding: tuple[int, int] = (0, 0)
    """Rows added below and columns added at the right, filled with the channels' mean."""
    view: int | None = None
    """None = the centre crop; a number = one of a series of random crops and flips (area .08-1), on which the papers'
    linear probes are trained. The crop follows from `view` and the row alone."""

    @property
    def padded_size(self) -> tuple[int, int]:
        """Height and width of what `on_device` returns."""
        return self.size[0] + self.padding[0], self.size[1] + self.padding[1]

    def __call__(self, image: UInt8[Tensor, "c h w"], row: int) -> UInt8[Tensor, "c height width"]:
        """Crop the image of row `row` of its source."""
        if self.view is None:
            return centre_crop(image, self.size, self.crop_pct)
        rng = np.random.default_rng((self.view, row))
        image = random_resized_crop(image, self.size, rng, (0.08, 1.0))
        return image.flip(-1) if rng.random() < 0.5 else image

    def on_device(self, images: UInt8[Tensor, "b c h w"], device: torch.device) -> Float[Tensor, "b c height width"]:
        """Move a batch to the device, normalise and pad it."""
        images = normalize(images.to(device, non_blocking=True), self.normalization)
        return F.pad(images, (0, self.padding[1], 0, self.padding[0])) if any(self.padding) else images

    def as_plain(self) -> dict[str, Any]:
        """The settings in the form in which caches and extracted features carry them."""
        plain = asdict(self)
        mean, std = plain.pop("normalization")
        return {**plain, "mean": mean, "std": std}


def centre_crop(
    image: UInt8[Tensor, "c h w"], size: tuple[int, int], crop_pct: float
) -> UInt8[Tensor, "c height width"]:
    """Resize and centre-crop an image, see `EvalTransform`."""
    image = TF.center_crop_image(image, middle((image.shape[1], image.shape[2]), size))
    resized = cover((image.shape[1], image.shape[2]), size, crop_pct)
    image = TF.resize_image(image, resized, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop_image(image, list(size))


def middle(shape: tuple[int, int], size: tuple[int, int]) -> list[int]:
    """Height and width of the middle part of an image from which its centre crop of `size` is cut.

    This is the whole image unless its longer side is more than `_ELONGATED` times what the crop takes of it: 1 x
    100,000 pixels would be resized to 224 x 22,400,000.
    """
    height, width = shape
    # An even number of pixels is left out, so that the centre stays the centre.
    longest_height = _ELONGATED * -(-width * size[0] // size[1])
    longest_width = _ELONGATED * -(-height * size[1] // size[0])
    return [
        side - 2 * max(0, (side - longest) // 2) for side, longest in ((height, longest_height), (width, longest_width))
    ]


def cover(shape: tuple[int, int], size: tuple[int, int], crop_pct: float) -> list[int]:
    """Height and width to which an image is resized so that it just covers `size / crop_pct`."""
    height, width = shape
    box_height, box_width = (int(side / crop_pct) for side in size)
    # In whole numbers: rounding must never make the image a pixel smaller than its crop.
    if box_height * width >= box_width * height:
        return [box_height, width * box_height // height]
    return [height * box_width // width, box_width]


def fit_size(
    size: tuple[int, int], stride: tuple[int, int], indivisible: Literal["refuse", "resize", "pad"] = "refuse"
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Fit an image size to the encoder's stride.

    Args:
        size, stride: height and width in pixels.
        indivisible: refuse a size that the stride does not divide; take the nearest one that it divides; or pad
            the crops up to the next one.

    Returns:
        `size` and `padding` of an `EvalTransform`.

    Raises:
        ValueError: the size is refused; names the nearest ones.
    """
    padding = tuple(-side % step for side, step in zip(size, stride, strict=True))
    if not any(padding):
        return size, (0, 0)
    if indivisible == "pad":
        return size, (padding[0], padding[1])
    if indivisible == "refuse":
        advice = ". indivisible='resize' takes the nearer one, 'pad' fills up to the next"
        check_divisible(f"image_size={size!r}", size, stride, advice)
    height, width = (max(1, (side + step // 2) // step) * step for side, step in zip(size, stride, strict=True))
    return (height, width), (0, 0)
