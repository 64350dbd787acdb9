"""One image under several masks: what an MAE makes of it as more and more is removed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ssl_vit.data.augment.masking import draw_block_mask, draw_keep, num_kept
from ssl_vit.data.transform import Normalization
from ssl_vit.objectives.objective import Reconstructs
from ssl_vit.visualize.grid import draw_grid
from ssl_vit.visualize.reconstructions import caption_of, reconstruction_panels


def random_keeps(number: int, num_patches: int, mask_ratio: float, seed: int) -> Int[Tensor, "b k"]:
    """Patches to keep of `number` images, removed one by one at random, as MAE is trained.

    Raises:
        ValueError: the ratio leaves nothing to see or nothing to predict.
    """
    _check_ratio(num_patches, mask_ratio)
    rng = np.random.default_rng(seed)
    return torch.stack([draw_keep(num_patches, mask_ratio, rng) for _ in range(number)])


def block_keeps(number: int, grid_size: tuple[int, int], mask_ratio: float, seed: int) -> Int[Tensor, "b k"]:
    """The same, removed in rectangles, which is harder: less can be guessed from next to it.

    Raises:
        ValueError: the ratio leaves nothing to see or nothing to predict.
    """
    _check_ratio(grid_size[0] * grid_size[1], mask_ratio)
    rng = np.random.default_rng(seed)
    masks = [draw_block_mask(grid_size, mask_ratio, rng) for _ in range(number)]
    return torch.stack([(~mask).nonzero()[:, 0] for mask in masks])


def hidden_keeps(number: int, num_patches: int, hidden: Sequence[int]) -> Int[Tensor, "b k"]:
    """The same for a mask given as row-major indices of the patches to remove.

    Raises:
        ValueError: no such patch, none removed or none kept.
    """
    for patch in hidden:
        if not 0 <= patch < num_patches:
            raise ValueError(f"--hide {patch}: there are {num_patches} patches, numbered 0 to {num_patches - 1}")
    if not 0 < len(set(hidden)) < num_patches:
        raise ValueError(f"--hide: removes {len(set(hidden))} of {num_patches} patches; leave at least one of each")
    kept = sorted(set(range(num_patches)) - set(hidden))
    return torch.tensor(kept).expand(number, -1)


@torch.inference_mode()
def draw_masks(
    objective: Reconstructs,
    images: Tensor,
    keeps: Mapping[str, Int[Tensor, "b k"]],
    path: Path,
    *,
    normalization: Normalization,
) -> None:
    """Write a figure with a row for each image: the image, and for each mask its visible part and the filled-in image.

    Args:
        images: normalised by `normalization`.
        keeps: patches to keep, by the name that the columns get.
    """
    columns, parts, normalized = ["original"], [], False
    for name, keep in keeps.items():
        reconstruction = objective.fill_in(images, keep)
        normalized = reconstruction.norm_pix_loss
        panels = reconstruction_panels(images, reconstruction, normalization)
        if not parts:
            parts.append(panels[:, :1])
        parts.append(panels[:, 1:])
        columns += [name, "filled in"]
    draw_grid(
        torch.cat(parts, dim=1),
        columns,
        path,
        title="What is filled in as more is removed" if len(keeps) > 1 else "What is filled in",
        caption=caption_of(images.shape[1], normalized),
    )


def _check_ratio(num_patches: int, mask_ratio: float) -> None:
    kept = num_kept(num_patches, mask_ratio)
    if not 0 < kept < num_patches:
        raise ValueError(
            f"--mask_ratios {mask_ratio:g}: keeps {kept} of {num_patches} patches; give less than 1, not 0"
        )


def parse_patches(words: Sequence[str]) -> list[int]:
    """Patch numbers out of words such as `3` and `16-31`.

    Raises:
        ValueError: a word that is neither.
    """
    found: list[int] = []
    for word in words:
        first, dash, last = word.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--hide {word}: give numbers of patches, such as 3, or ranges, such as 16-31")
        found += range(int(first), int(last or first) + 1)
    return found
