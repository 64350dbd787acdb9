"""Draws attention maps: the mean over heads and single heads beside each image."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib import colormaps
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.data.transform import Normalization
from ssl_vit.visualize.grid import Scale, channel_caption, draw_grid, enlarge, to_rgb

_DIMMED = 0.3  # brightness of what is left out in an overlay


def keep_mass(attention: Float[Tensor, "*b rows columns"], mass: float) -> Bool[Tensor, "*b rows columns"]:
    """True for the fewest patches that together hold at least `mass` of a map's attention; DINO's usual value is 0.6.

    Raises:
        ValueError: `mass` is not in (0, 1].
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass={mass!r}: must lie in (0, 1]; the usual value is 0.6")
    flat = attention.flatten(-2)
    shares, order = (flat / flat.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True)
    kept = shares.cumsum(dim=-1) - shares < mass  # the patch that crosses the threshold is the last one in
    return torch.zeros_like(kept).scatter(-1, order, kept).reshape(attention.shape)


def draw_attention(
    images: Float[Tensor, "b c h w"],
    attention: Float[Tensor, "b heads rows columns"],
    *,
    normalization: Normalization,
    path: Path,
    mass: float | None = None,
    max_heads: int = 6,
    patch: int | None = None,
    title: str = "Attention of the class token in the last block",
) -> None:
    """Write a figure with a row for each image: the image, the mean over heads, and the first heads.

    Args:
        images: normalised by `normalization`.
        path: PNG or WebP by its suffix.
        mass: lay the maps over the image, and dim all but the patches that hold this share of a map's attention;
            None shows the maps alone, all of them.
        patch: row-major index of the patch that looks, to be framed; None where it is the class token.
    """
    images = images.detach().float().cpu()
    maps = torch.cat([attention.mean(dim=1, keepdim=True), attention[:, :max_heads]], dim=1).float().cpu()
    shown = to_rgb(images, normalization)[:, None]
    scaled = maps / maps.amax(dim=(-2, -1), keepdim=True).clamp_min(1e-12)  # each map has its own scale
    colours = colour(F.interpolate(scaled, size=images.shape[-2:], mode="nearest"), "inferno")
    if mass is None:
        panels = colours
        sentences = ["Each map is scaled to its own maximum."]
    else:
        kept = F.interpolate(keep_mass(maps, mass).float(), size=images.shape[-2:], mode="nearest")[..., None]
        panels = torch.where(kept > 0, 0.45 * shown + 0.55 * colours, _DIMMED * shown)
        sentences = [
            f"Lit are the fewest patches that hold {mass:.0%} of a map's attention; each map is scaled to its own "
            "maximum."
        ]
    if patch is not None:
        shown, panels = enlarge(shown), enlarge(panels)
        size = shown.shape[2] // attention.shape[-2], shown.shape[3] // attention.shape[-1]
        shown = frame(shown, patch, size)
        sentences.append("The patch that looks is framed.")
    columns = ["image", "mean", *(f"head {head + 1}" for head in range(maps.shape[1] - 1))]
    if attention.shape[1] > max_heads:
        sentences.append(f"The first {max_heads} of {attention.shape[1]} heads are shown.")
    draw_grid(
        torch.cat([shown, panels], dim=1),
        columns,
        path,
        title=title,
        caption=" ".join([*sentences, *channel_caption(images.shape[1])]),
        scale=Scale("inferno", "no attention", "most"),
    )


def colour(values: Float[Tensor, "*b h w"], name: str) -> Float[Tensor, "*b h w 3"]:
    """Values in [0, 1] in the colours of one of matplotlib's maps."""
    table = torch.tensor(colormaps[name](np.arange(256))[:, :3], dtype=torch.float32)
    return table[(values.clamp(0, 1) * 255).round().long()]


def frame(panels: Float[Tensor, "b v h w 3"], patch: int, patch_size: tuple[int, int]) -> Float[Tensor, "b v h w 3"]:
    """The same panels with a frame about one patch, red within white, so that it is seen on any ground."""
    height, width = panels.shape[2:4]
    row, column = divmod(patch, width // patch_size[1])
    thick = max(1, height // 96)
    framed = panels.clone()
    for shade, inset in (((1.0, 1.0, 1.0), -thick), ((0.85, 0.1, 0.1), 0)):
        top, left = max(row * patch_size[0] + inset, 0), max(column * patch_size[1] + inset, 0)
        bottom = min((row + 1) * patch_size[0] - inset, height)
        right = min((column + 1) * patch_size[1] - inset, width)
        for area in (
            (slice(top, top + thick), slice(left, right)),
            (slice(bottom - thick, bottom), slice(left, right)),
            (slice(top, bottom), slice(left, left + thick)),
            (slice(top, bottom), slice(right - thick, right)),
        ):
            framed[:, :, area[0], area[1]] = torch.tensor(shade)
    return framed
