"""Transforms of whole batches on the training device, with parameters drawn per sample in the workers."""

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor


def flip_horizontally(images: UInt8[Tensor, "b c h w"], flip: Bool[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
    """Mirror the images where `flip` is True."""
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


def normalize(
    images: UInt8[Tensor, "b c h w"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "b c h w"]:
    """Scale uint8 images to [0, 1], then to (x - mean) / std per channel.

    Raises:
        ValueError: mean and std do not have one value a channel.
    """
    channels = images.shape[1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"data.mean={mean!r} and data.std={std!r}: need {channels} values, one for each of the {channels} channels"
        )
    shift = torch.tensor(mean, device=images.device).reshape(-1, 1, 1)
    scale = torch.tensor(std, device=images.device).reshape(-1, 1, 1)
    return (images.float() / 255 - shift) / scale
