"""Augmentation of whole batches on the training device, with parameters drawn per sample in the workers.

Images are floats in [0, 1]. Parameters stay on the CPU: the host knows which images an operation changes and never
waits for the device.
"""

import itertools
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.data.transform import Normalization

# The 24 orders in which ColorJitter may apply brightness (0), contrast (1), saturation (2) and hue (3).
JITTER_ORDERS = tuple(itertools.permutations(range(4)))
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and torchvision weigh red, green and blue


def flip_horizontally(images: Num[Tensor, "b c h w"], rows: Bool[Tensor, " b"]) -> Num[Tensor, "b c h w"]:
    """Mirror the images where `rows` (on the CPU) is True."""
    if not rows.any():
        return images
    chosen, index = _take(images, rows)
    return _put(images, index, chosen.flip(-1))


def normalize(images: Num[Tensor, "b c h w"], normalization: Normalization) -> Float[Tensor, "b c h w"]:
    """Scale to (x - mean) / std per channel; uint8 images are scaled to [0, 1] first.

    Raises:
        ValueError: mean and std do not have one value a channel.
    """
    channels, (mean, std) = images.shape[1], normalization
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"data.mean={mean!r} and data.std={std!r}: need {channels} values, one for each of the {channels} channels"
        )
    shift, scale = (
        torch.tensor(values).reshape(-1, 1, 1).to(images.device, non_blocking=True) for values in normalization
    )
    return (to_unit(images) - shift) / scale


def renormalize(
    images: Float[Tensor, "b c h w"], given: Normalization, wanted: Normalization
) -> Float[Tensor, "b c h w"]:
    """Images normalised by `given`, normalised by `wanted`: (x std + mean - wanted mean) / wanted std per channel."""
    if given == wanted:
        return images
    mean, std, wanted_mean, wanted_std = (
        torch.tensor(values).reshape(-1, 1, 1).to(images.device, non_blocking=True) for values in (*given, *wanted)
    )
    return (images * std + (mean - wanted_mean)) / wanted_std


def to_unit(images: Num[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """uint8 pixels as floats in [0, 1]; floats as they are."""
    return images if images.is_floating_point() else images.float() / 255


def color_jitter(
    images: Float[Tensor, "b c h w"],
    factors: Float[Tensor, "b 4"],
    orders: Int[Tensor, " b"],
) -> Float[Tensor, "b c h w"]:
    """Change brightness, contrast, saturation and hue of each image by its own factors, in its own order.

    The same as torchvision's ColorJitter, image by image. Saturation and hue are skipped unless there are three
    channels.

    Args:
        factors: on the CPU; brightness, contrast and saturation are multiplied by theirs (1 changes nothing), the hue
            turns by its own, a share of the colour wheel (0 changes nothing).
        orders: on the CPU; index into JITTER_ORDERS.
    """
    images = images.clone()
    order = torch.tensor(JITTER_ORDERS)[orders]  # [b 4]: the operation of each round
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
    wanted = factors != neutral
    if images.shape[1] != 3:
        wanted[:, 2:] = False
    for position in range(4):
        for operation in range(4):
            rows = (order[:, position] == operation) & wanted[:, operation]
            if not rows.any():
                continue
            chosen, index = _take(images, rows)  # a copy, which may be changed in place
            factor = factors[rows, operation].to(images.device, non_blocking=True)[:, None, None, None]
            if operation == 0:
                chosen.mul_(factor).clamp_(0, 1)
            elif operation == 1:
                mean = luma(chosen).mean(dim=(-2, -1), keepdim=True)
                chosen.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)
            elif operation == 2:
                grey = luma(chosen)
                chosen.mul_(factor).add_(grey.mul_(1 - factor)).clamp_(0, 1)
            else:
                chosen = shift_hue(chosen, factor[:, 0])
            if index is None:
                images = chosen
            else:
                images.index_copy_(0, index, chosen)
    return images


def to_grey(images: Float[Tensor, "b c h w"], rows: Bool[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
    """Make the images grey where `rows` (on the CPU) is True; of other than three channels none."""
    if images.shape[1] != 3 or not rows.any():
        return images
    chosen, index = _take(images, rows)
    return _put(images, index, luma(chosen).expand_as(chosen))


def solarize(images: Float[Tensor, "b c h w"], rows: Bool[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
    """Invert the pixels of at least 128 / 255 in the images where `rows` (on the CPU) is True."""
    if not rows.any():
        return images
    chosen, index = _take(images, rows)
    return _put(images, index, torch.where(chosen >= 128 / 255, 1 - chosen, chosen))


def gaussian_blur(
    images: Float[Tensor, "b c h w"],
    sigmas: Float[Tensor, " b"],
    radius: int,
    borders: Literal["replicate", "reflect"] = "replicate",
) -> Float[Tensor, "b c h w"]:
    """Blur each image with its own standard deviation.

    Args:
        sigmas: standard deviations in pixels, on the CPU; 0 = no blur.
        radius: half the kernel's width in pixels; three times the largest deviation loses nothing.
        borders: padding: the outermost pixels repeated (Pillow), or the image mirrored (torchvision).
    """
    rows = sigmas > 0
    if not rows.any():
        return images
    if radius >= min(images.shape[-2:]):
        borders = "replicate"  # mirroring needs an image larger than the radius
    chosen, index = _take(images, rows)
    sigma = sigmas[rows]
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma[:, None]) ** 2)
    taps = (taps / taps.sum(dim=1, keepdim=True)).to(chosen, non_blocking=True)
    channels, width = chosen.shape[1], chosen.shape[-1]
    kernels = taps.repeat_interleave(channels, dim=0)[:, None]  # one for each channel of each image
    planes = rearrange(chosen, "b c h w -> 1 (b c) h w")
    groups = planes.shape[1]
    planes = F.conv2d(F.pad(planes, (0, 0, radius, radius), mode=borders), kernels[..., None], groups=groups)
    planes = F.conv2d(F.pad(planes, (radius, radius, 0, 0), mode=borders), kernels[:, :, None], groups=groups)
    return _put(images, index, rearrange(planes, "1 (b c) h w -> b c h w", c=channels, w=width))


def luma(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """Luma of each pixel: ITU-R BT.601 for three channels, else the mean of the channels."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    red, green, blue = images.unbind(dim=1)
    return (_LUMA[0] * red).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])[:, None]


def shift_hue(images: Float[Tensor, "b 3 h w"], turns: Float[Tensor, "b 1 1"]) -> Float[Tensor, "b 3 h w"]:
    """Turn the hue by a share of the colour wheel; saturation and value (of HSV) stay.

    With hue H in sixths of the wheel and chroma C, a channel is the pixel's smallest value + C x clamp(w, 0, 1), where
    w is |H - 3| - 1 for red, 2 - |H - 2| for green and 2 - |H - 4| for blue.
    """
    red, green, blue = images.unbind(dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    # The largest channel decides; where all are equal, chroma is 0 and the hue does not matter. Masks are made by
    # arithmetic: torch.where and comparisons take ten times as long on CPUs.
    not_red, not_green = ((value - red) * 1e12).clamp_(max=1), ((value - green) * 1e12).clamp_(max=1)
    to_red, to_green, to_blue = green - blue, blue - red, red - green
    hue = to_red.add_(not_red * (to_green - to_red + not_green * (to_blue - to_green)))
    hue.div_(chroma.clamp_min(1e-12)).add_(not_green.mul_(2).add_(2).mul_(not_red)).add_(6 * turns)
    hue.sub_((hue / 6).floor_().mul_(6))  # into [0, 6); remainder takes far longer
    changed = torch.empty_like(images)
    for channel, (centre, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        weight = (hue - centre).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        torch.add(least, weight.mul_(chroma), out=changed[:, channel])
    return changed


def _take(images: Tensor, rows: Bool[Tensor, " b"]) -> tuple[Tensor, Int[Tensor, " r"] | None]:
    """The chosen images and their index on the device; None and the batch itself where all are chosen."""
    if rows.all():
        return images, None
    index = rows.nonzero().flatten().to(images.device, non_blocking=True)
    return images[index], index


def _put(images: Tensor, index: Int[Tensor, " r"] | None, changed: Tensor) -> Tensor:
    return changed if index is None else images.index_copy(0, index, changed)
