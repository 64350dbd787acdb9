"""Draws what a masked autoencoder sees of an image and how it fills in the rest, as in He et al. (2022), figure 2."""

from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ssl_vit.data.transform import Normalization
from ssl_vit.models.patches import patchify, unpatchify
from ssl_vit.objectives.objective import Reconstruction
from ssl_vit.visualize.grid import channel_caption, draw_grid, to_rgb

COLUMNS = ("original", "masked", "filled in")

_REMOVED = 0.85  # light grey: black could pass for part of a dark image


def draw_reconstructions(
    images: Float[Tensor, "b c h w"], reconstruction: Reconstruction, normalization: Normalization, path: Path
) -> None:
    """Write a figure with the columns of `reconstruction_panels` and a row for each image.

    Raises:
        ValueError: see `reconstruction_panels`.
    """
    panels = reconstruction_panels(images, reconstruction, normalization)
    caption = caption_of(images.shape[1], reconstruction.norm_pix_loss)
    draw_grid(panels, COLUMNS, path, title=reconstruction.title, caption=caption)


def reconstruction_panels(
    images: Float[Tensor, "b c h w"], reconstruction: Reconstruction, normalization: Normalization
) -> Float[Tensor, "b 3 h w 3"]:
    """The `COLUMNS` of each image, RGB in [0, 1], on the CPU; channels are shown as by `to_rgb`.

    Visible patches are shown as they are in both: what is predicted for them is not trained, and looks like noise.
    Mean and contrast of patches that are predicted normalised by their own are taken from the original.

    Args:
        images: normalised by `normalization`.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    images, predicted = images.detach().float().cpu(), reconstruction.patches.detach().float().cpu()
    patch_size, (height, width) = reconstruction.patch_size, images.shape[-2:]
    if height % patch_size[0] or width % patch_size[1]:
        raise ValueError(f"patch_size={patch_size}: does not divide the image size {(height, width)}")
    patches = patchify(images, patch_size)
    if patches.shape != predicted.shape:
        raise ValueError(
            f"the reconstruction has shape {tuple(predicted.shape)}, "
            f"but these images and patches make {tuple(patches.shape)}"
        )
    if reconstruction.norm_pix_loss:
        deviation = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        predicted = predicted * deviation + patches.mean(dim=-1, keepdim=True)

    def show(shown: Tensor) -> Tensor:
        return to_rgb(unpatchify(shown, images.shape, patch_size), normalization)

    visible = reconstruction.visible.cpu()[..., None].expand_as(patches)
    visible_pixels = rearrange(unpatchify(visible, images.shape, patch_size)[:, :1], "b 1 h w -> b h w 1")
    original, predicted = show(patches), show(predicted)
    masked, filled_in = (torch.where(visible_pixels, original, hidden) for hidden in (_REMOVED, predicted))
    return torch.stack([original, masked, filled_in], dim=1)


def caption_of(num_channels: int, norm_pix_loss: bool) -> str:
    sentences = []
    if norm_pix_loss:
        sentences.append(
            "The model predicts patches normalised by themselves: patch mean and contrast are taken from the original."
        )
    return " ".join([*sentences, *channel_caption(num_channels)])
