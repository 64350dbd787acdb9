"""Random crops, in uint8, in the loader's workers; every draw comes from the sample's own generator."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ssl_vit.core.settings import check_ranges


@dataclass(frozen=True)
class OrientationConfig:
    """How images are flipped and turned."""

    flip_prob: float = 0.5
    """Probability of a horizontal flip."""
    flip_vertical_prob: float = 0.0
    """Probability of a vertical flip, for images without an up, such as those of microscopes and satellites."""
    quarter_turn_prob: float = 0.0
    """Probability of a turn by 90, 180 or 270 degrees, equally often: .75 for images without an up."""

    def __post_init__(self) -> None:
        check_ranges(self, flip_prob="[0, 1]", flip_vertical_prob="[0, 1]", quarter_turn_prob="[0, 1]")


def draw_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draw a box as Inception does: area uniform in `scale`, log aspect ratio uniform in `ratio`.

    After ten draws that do not fit, take the largest centred box whose aspect ratio is allowed.

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
    """Cut out a random box and resize it to `size` (height, width) pixels: bicubic, antialiased.

    The aspect ratio is drawn around that of `size`, so that a non-square size does not distort the image.
    """
    stretch = size[1] / size[0]
    box = draw_crop(image.shape[1], image.shape[2], rng, scale, (3 / 4 * stretch, 4 / 3 * stretch))
    return F.resized_crop(image, *box, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)


def random_view(
    image: UInt8[Tensor, "c h w"],
    size: tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float],
    orientation: OrientationConfig,
) -> UInt8[Tensor, "c {size[0]} {size[1]}"]:
    """A random crop with the turns and vertical flips of `orientation`; horizontal flips happen on the device.

    A probability of 0 draws no number, so that crops are the same as without the setting.
    """
    turned = orientation.quarter_turn_prob and rng.random() < orientation.quarter_turn_prob
    turns = int(rng.integers(1, 4)) if turned else 0
    is_flipped = orientation.flip_vertical_prob and rng.random() < orientation.flip_vertical_prob
    # A quarter turn swaps height and width.
    crop = random_resized_crop(image, (size[1], size[0]) if turns % 2 else size, rng, scale)
    crop = torch.rot90(crop, turns, (1, 2)) if turns else crop
    return crop.flip(1) if is_flipped else crop
