"""What patch tokens and positions are like: their main directions as colours, and who resembles whom."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.data.transform import Normalization
from ssl_vit.models.encoder import Encoder
from ssl_vit.visualize.attention import colour, frame
from ssl_vit.visualize.grid import Scale, channel_caption, draw_grid, enlarge, to_rgb


class PatchColours(NamedTuple):
    """The three main directions of patch tokens as red, green and blue."""

    colours: Float[Tensor, "b n 3"]  # in [0, 1]; 0 outside the foreground
    foreground: Bool[Tensor, "b n"]
    explained: float  # share of the variance that the three directions hold


def patch_pca(patches: Float[Tensor, "b n d"], grid_size: tuple[int, int], *, foreground: bool = False) -> PatchColours:
    """Principal components of all images' patch tokens together, so that one colour means the same in all of them.

    As in DINOv2 (arXiv:2304.07193, figure 1), `foreground` first parts the patches by the sign of the first component
    and fits anew on one side. A component has no sign of its own: the side taken is the one that is rarer at the
    images' borders. Each component is stretched from its 1st to its 99th percentile.

    Raises:
        ValueError: fewer than four patches to fit to.
    """
    tokens = rearrange(patches.float().cpu(), "b n d -> (b n) d")
    inside = torch.ones(len(tokens), dtype=torch.bool)
    if foreground:
        (first,), _ = _components(tokens, 1)
        rows, columns = grid_size
        border = torch.ones(rows, columns, dtype=torch.bool)
        border[1:-1, 1:-1] = False
        at_border = border.flatten().repeat(len(patches))
        positive = first > 0
        # Without an inner patch there is no telling.
        if at_border.any() and not at_border.all():
            share = positive.float()
            positive = positive if share[at_border].mean() <= share[~at_border].mean() else ~positive
        inside = positive
    if inside.sum() < 4:
        raise ValueError(f"{int(inside.sum())} patches are too few for three components: give more or larger images")
    components, explained = _components(tokens[inside], 3)
    low = components.quantile(0.01, dim=1, keepdim=True)
    high = components.quantile(0.99, dim=1, keepdim=True)
    colours = torch.zeros(len(tokens), 3)
    colours[inside] = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).T
    shape = patches.shape[:2]
    return PatchColours(colours.reshape(*shape, 3), inside.reshape(shape), explained)


def _components(tokens: Float[Tensor, "n d"], number: int) -> tuple[Float[Tensor, "k n"], float]:
    """Values of the first principal components, and the share of the variance that they hold."""
    centred = tokens.double() - tokens.double().mean(dim=0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    chosen = directions[:, -number:].flip(1)
    # The sign is arbitrary: let each direction's largest entry be positive, so that colours do not flip by chance.
    chosen = chosen * chosen.gather(0, chosen.abs().argmax(dim=0, keepdim=True)).sign()
    explained = variances[-number:].sum() / variances.sum().clamp_min(1e-12)
    return (centred @ chosen).T.float(), explained.item()


def patch_similarity(patches: Float[Tensor, "b n d"], patch: int) -> Float[Tensor, "b n"]:
    """Cosine similarity of one patch token of each image to all patch tokens of that image, in [-1, 1].

    Raises:
        ValueError: no such patch.
    """
    if not 0 <= patch < patches.shape[1]:
        raise ValueError(f"patch={patch}: there are {patches.shape[1]} patches, numbered from 0")
    unit = F.normalize(patches.float(), dim=-1)
    return torch.einsum("bnd,bd->bn", unit, unit[:, patch])


def position_table(encoder: Encoder) -> Float[Tensor, "1 t d"] | None:
    """The position embeddings of prefix and patch tokens, of an encoder that has them."""
    return getattr(encoder.model, "pos_embed", None)


def position_similarity(encoder: Encoder) -> Float[Tensor, "n n"]:
    """Cosine similarity of every patch's position embedding to every other (ViT, arXiv:2010.11929, figure 7).

    Raises:
        ValueError: an encoder without a position table.
    """
    positions = position_table(encoder)
    if positions is None:
        raise ValueError(f"{encoder.config.arch}: has no table of positions that could be shown")
    table = F.normalize(positions[0, positions.shape[1] - encoder.num_patches :].detach().float().cpu(), dim=-1)
    return table @ table.T


def draw_pca(
    images: Float[Tensor, "b c h w"],
    patches: Float[Tensor, "b n d"],
    grid_size: tuple[int, int],
    *,
    normalization: Normalization,
    path: Path,
    foreground: bool = False,
) -> None:
    """Write a figure with a row for each image: the image, its patches' components, and with `foreground` those of the
    foreground alone."""
    found = [patch_pca(patches, grid_size)]
    columns = ["image", "patch tokens"]
    if foreground:
        found.append(patch_pca(patches, grid_size, foreground=True))
        columns.append("foreground")
    panels = [to_rgb(images.cpu(), normalization)]
    for item in found:
        # Black is what is left out, and no colour of what is shown.
        colours = item.colours if item.foreground.all() else (0.2 + 0.8 * item.colours) * item.foreground[..., None]
        grid = rearrange(colours, "b (r c) k -> b k r c", r=grid_size[0])
        panels.append(rearrange(F.interpolate(grid, images.shape[-2:], mode="nearest"), "b k h w -> b h w k"))
    fitted_to = "this image"
    if len(images) > 1:
        fitted_to = f"all {len(images)} images together: the same colour means the same in each"
    sentences = [f"Fitted to {fitted_to}. The three components hold {found[0].explained:.0%} of the variance."]
    if foreground:
        sentences.append(
            "Foreground: the patches whose first component has the sign that is rarer at the borders, fitted anew "
            f"({found[1].explained:.0%} of their variance); the others are black."
        )
    draw_grid(
        torch.stack(panels, dim=1),
        columns,
        path,
        title="Principal components of the patch tokens as red, green and blue",
        caption=" ".join([*sentences, *channel_caption(images.shape[1])]),
    )


def draw_similarity(
    images: Float[Tensor, "b c h w"],
    patches: Float[Tensor, "b n d"],
    grid_size: tuple[int, int],
    chosen: Sequence[int],
    *,
    normalization: Normalization,
    path: Path,
) -> None:
    """Write a figure with a row for each image: for each chosen patch the image with its frame, and the map."""
    shown = enlarge(to_rgb(images.cpu(), normalization)[:, None])
    size = shown.shape[2] // grid_size[0], shown.shape[3] // grid_size[1]
    panels, columns = [], []
    for patch in chosen:
        values = rearrange(patch_similarity(patches.cpu(), patch), "b (r c) -> b 1 r c", r=grid_size[0])
        maps = F.interpolate(values, shown.shape[2:4], mode="nearest").clamp_min(0)
        panels += [frame(shown, patch, size), colour(maps, "viridis")]
        columns += [f"patch {patch}", "similarity to it"]
    draw_grid(
        torch.cat(panels, dim=1),
        columns,
        path,
        title="Cosine similarity of a patch token to all others of its image",
        caption=" ".join(channel_caption(images.shape[1])),
        scale=Scale("viridis", "0 or less", "1"),
    )


def draw_positions(encoder: Encoder, path: Path) -> None:
    """Write a figure with a tile for each patch: how alike its position is to those of all patches.

    Of more than 14 rows or columns every second is shown, or every third, and so on.
    """
    rows, columns = encoder.grid_size
    every = -(-max(rows, columns) // 14)
    similarity = rearrange(position_similarity(encoder), "(r c) (s t) -> r c s t", r=rows, s=rows)
    tiles = colour(similarity.clamp_min(0), "viridis")[::every, ::every]
    gap = max(1, max(rows, columns) // 14)
    tiles = F.pad(tiles, (0, 0, 0, gap, 0, gap), value=1.0)
    mosaic = rearrange(tiles, "r c s t k -> (r s) (c t) k")[:-gap, :-gap]
    which = {2: "second", 3: "third"}.get(every, f"{every}th")
    some = "" if every == 1 else f" Of the {rows} x {columns} patches every {which} row and column is shown."
    draw_grid(
        mosaic[None, None],
        [""],
        path,
        title="Cosine similarity of position embeddings",
        caption=f"A tile for each patch, in its place: how alike its position is to those of all patches.{some}",
        scale=Scale("viridis", "0 or less", "1"),
    )
