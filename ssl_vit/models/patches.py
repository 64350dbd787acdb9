"""Images as sequences of patches, and back, and the positions of patches."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor


def patchify(images: Shaped[Tensor, "b c h w"], patch_size: tuple[int, int]) -> Shaped[Tensor, "b n p"]:
    """Cut images into patches, row-major, pixels of a patch in (row, column, channel) order."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size[0], q=patch_size[1])


def unpatchify(
    patches: Shaped[Tensor, "b n p"], shape: Sequence[int], patch_size: tuple[int, int]
) -> Shaped[Tensor, "b c h w"]:
    """Join patches, in the order of `patchify`, into images of `shape` (..., height, width)."""
    height, (p, q) = shape[-2] // patch_size[0], patch_size
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=p, q=q)


def sincos_positions(
    embed_dim: int, grid_size: tuple[int, int], num_prefix_tokens: int = 1
) -> Float[Tensor, "n {embed_dim}"]:
    """Position table of MAE (He et al. 2022, after MoCo v3), computed in float64 and returned in float32.

    The first half of the width encodes the column, the second half the row; each half is [sin | cos] over
    frequencies 10000^(-i / (embed_dim / 4)). Prefix tokens (class token first) come first and get zeros.

    Args:
        embed_dim: width, a multiple of 4.
        grid_size: rows and columns of patches.
        num_prefix_tokens: rows of zeros put in front.

    Raises:
        ValueError: the width is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim={embed_dim}: sine-cosine positions need a multiple of 4")
    rows, columns = grid_size
    omega = 10000.0 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim / 4))
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([table.new_zeros(num_prefix_tokens, embed_dim), table]).float()
