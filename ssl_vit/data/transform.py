"""The contract between an image of a source and a batch of an objective."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width; one number stands for both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check_divisible(setting: str, size: tuple[int, int], stride: tuple[int, int], advice: str = "") -> None:
    """Refuse a height or width that the stride does not divide.

    Args:
        setting: what the error begins with, `name=value`.
        advice: what the error ends with.

    Raises:
        ValueError: in that form; names the nearest lengths that are divisible.
    """
    for axis, length, step in zip(("height", "width"), size, stride, strict=True):
        if length < step or length % step:
            nearest = dict.fromkeys((max(length // step, 1) * step, (length // step + 1) * step))
            raise ValueError(
                f"{setting}: the {axis} {length} is no multiple of {step}, the encoder's stride; the "
                f"nearest that are: {' and '.join(map(str, nearest))}{advice}"
            )


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, for pixel values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class InputSpec(NamedTuple):
    """What an encoder takes: what the transform of an objective must know of it."""

    image_size: tuple[int, int]
    """Height and width in pixels."""
    stride: tuple[int, int]
    """Pixels of one output token, height and width."""
    normalization: Normalization

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of output tokens."""
        return self.image_size[0] // self.stride[0], self.image_size[1] // self.stride[1]


@runtime_checkable
class Transform(Protocol):
    """Turns images into batches of an objective, in two places.

    Calling it turns one decoded image into one sample (uint8, in a loader worker), drawing everything random from
    the sample's own generator. `on_device` turns a collated batch, still on the CPU, into the objective's batch on the
    training device.
    """

    def __call__(self, image: UInt8[Tensor, "c h w"], rng: np.random.Generator) -> dict[str, Tensor]: ...

    def on_device(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]: ...
