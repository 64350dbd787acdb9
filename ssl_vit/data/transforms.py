"""Crops, in uint8, in the loader's workers. Everything random comes from the sample's own generator."""

import math

import numpy as np
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F


def draw_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draw a box as Inception does: area uniform in `scale`, log aspect ratio uniform in `ratio`.

    Ten draws that do not fit end in the largest centred box whose aspect ratio is allowed.

    Returns:
        top, left, height and width of the box in pixels.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, box_height, box_width
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_width, box_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - box_height) // 2, (width - box_width) // 2, max(box_height, 1), max(box_width, 1)


def random_resized_crop(
    image: UInt8[Tensor, "c h w"],
    size: tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float],
) -> UInt8[Tensor, "c {size[0]} {size[1]}"]:
    """A random box of the image, resized to `size` (height, width) pixels: bicubic, antialiased.

    The aspect ratio is drawn around that of `size`, so that a non-square size does not distort.
    """
    stretch = size[1] / size[0]
    box = draw_crop(image.shape[1], image.shape[2], rng, scale, (3 / 4 * stretch, 4 / 3 * stretch))
    return F.resized_crop(image, *box, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
