"""Pictures of what a masked autoencoder sees and what it makes of it, as in He et al. (2022), figure 2."""

from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ssl_vit.data.transform import Normalization
from ssl_vit.visualize.grid import channel_caption, draw_grid, to_rgb

COLUMNS = ("original", "masked", "reconstruction", "reconstruction + visible")

_REMOVED = 0.85  # light grey: black could pass for part of a dark picture


def draw_reconstructions(
    images: Float[Tensor, "b c h w"],
    reconstruction: Float[Tensor, "b n p"],
    keep: Int[Tensor, "b k"],
    *,
    patch_size: tuple[int, int],
    normalization: Normalization,
    norm_pix_loss: bool,
    path: Path,
    title: str,
) -> None:
    """Write a PNG with a row for each image: original, masked, reconstruction, reconstruction + visible.

    Arguments and errors are those of `reconstruction_panels`, and:

    Args:
        path: the file; its folder is made where it does not exist.
        title: a line above the figure; "" = none.
    """
    panels = reconstruction_panels(
        images,
        reconstruction,
        keep,
        patch_size=patch_size,
        normalization=normalization,
        norm_pix_loss=norm_pix_loss,
    )
    draw_grid(panels, COLUMNS, path, title=title, caption=caption_of(images.shape[1], norm_pix_loss))


def reconstruction_panels(
    images: Float[Tensor, "b c h w"],
    reconstruction: Float[Tensor, "b n p"],
    keep: Int[Tensor, "b k"],
    *,
    patch_size: tuple[int, int],
    normalization: Normalization,
    norm_pix_loss: bool,
) -> Float[Tensor, "b 4 h w 3"]:
    """The four pictures of `COLUMNS` for each image, RGB in [0, 1], on the CPU.

    Images of one or two channels are shown by their first, as grey; of more than three, by their first three.

    Args:
        images: normalised by `normalization`.
        reconstruction: predicted patches, row-major; a patch's pixels in the order (row, column, channel).
        keep: indices of the visible patches.
        patch_size: (height, width) in pixels.
        norm_pix_loss: the prediction is of patches normalised by their own mean and deviation. These are not
            predicted, so they are taken from the original.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    images, reconstruction = images.detach().float().cpu(), reconstruction.detach().float().cpu()
    height, width = images.shape[-2:]
    if height % patch_size[0] or width % patch_size[1]:
        raise ValueError(f"patch_size={patch_size}: does not divide the image size {(height, width)}")
    patches = _patchify(images, patch_size)
    if patches.shape != reconstruction.shape:
        raise ValueError(
            f"the reconstruction has shape {tuple(reconstruction.shape)}, "
            f"but these images and patches make {tuple(patches.shape)}"
        )
    if norm_pix_loss:
        deviation = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        reconstruction = reconstruction * deviation + patches.mean(dim=-1, keepdim=True)

    def show(shown: Tensor) -> Tensor:
        return to_rgb(_unpatchify(shown, images.shape, patch_size), normalization)

    visible = torch.zeros(patches.shape[:2]).scatter_(1, keep.cpu(), 1.0)[..., None]
    visible_pixels = rearrange(
        _unpatchify(visible.expand_as(patches), images.shape, patch_size)[:, :1], "b 1 h w -> b h w 1"
    )
    original, reconstructed = show(patches), show(reconstruction)
    return torch.stack(
        [
            original,
            torch.where(visible_pixels > 0, original, _REMOVED),
            reconstructed,
            torch.where(visible_pixels > 0, original, reconstructed),
        ],
        dim=1,
    )


def _patchify(images: Float[Tensor, "b c h w"], patch_size: tuple[int, int]) -> Float[Tensor, "b n p"]:
    return rearrange(images, "b c (rows ph) (cols pw) -> b (rows cols) (ph pw c)", ph=patch_size[0], pw=patch_size[1])


def _unpatchify(
    patches: Float[Tensor, "b n p"], shape: Sequence[int], patch_size: tuple[int, int]
) -> Float[Tensor, "b c h w"]:
    return rearrange(
        patches,
        "b (rows cols) (ph pw c) -> b c (rows ph) (cols pw)",
        rows=shape[-2] // patch_size[0],
        ph=patch_size[0],
        pw=patch_size[1],
    )


def caption_of(num_channels: int, norm_pix_loss: bool) -> str:
    sentences = []
    if norm_pix_loss:
        sentences.append(
            "The model predicts patches normalised by themselves: patch mean and contrast are taken from the original."
        )
    return " ".join([*sentences, *channel_caption(num_channels)])
