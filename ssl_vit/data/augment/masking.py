"""Random masks, drawn in the loader's workers from the sample's own generator."""

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """Number of visible patches, rounded: truncation would lose one to float error (20 of 100 patches at .8)."""
    return round(num_patches * (1 - mask_ratio))


def draw_keep(num_patches: int, mask_ratio: float, rng: np.random.Generator) -> Int[Tensor, " k"]:
    """Indices of the patches to keep, drawn uniformly without replacement, ascending (MAE)."""
    keep = rng.permutation(num_patches)[: num_kept(num_patches, mask_ratio)]
    return torch.from_numpy(np.sort(keep))


def draw_predicted(
    num_patches: int, keep: Int[Tensor, " k"], predict_ratio: float, rng: np.random.Generator
) -> Int[Tensor, " m"]:
    """Indices of the removed patches to predict, round(ratio x n) but at least one, ascending (CrossMAE)."""
    removed = np.setdiff1d(np.arange(num_patches), keep.numpy())
    count = min(max(1, round(num_patches * predict_ratio)), len(removed))
    return torch.from_numpy(np.sort(rng.permutation(removed)[:count]))


def draw_block_mask(
    grid_size: tuple[int, int], mask_ratio: float, rng: np.random.Generator, min_block: int = 4
) -> Bool[Tensor, " n"]:
    """Mask exactly round(ratio x n) patches in rectangles (BEiT, arXiv:2106.08254, algorithm 1; iBOT, DINOv2).

    Rectangles of at least `min_block` patches and an aspect ratio in [0.3, 1 / 0.3] are added until none fits in what
    is still to be masked; single patches make up the rest.
    """
    rows, columns = grid_size
    mask = np.zeros(grid_size, dtype=bool)
    wanted = round(mask_ratio * rows * columns)
    while (missing := wanted - int(mask.sum())) > 0:
        for _ in range(10):
            area = rng.uniform(min(min_block, missing), missing)
            aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
            height, width = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if not (0 < height <= rows and 0 < width <= columns):
                continue
            top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
            block = mask[top : top + height, left : left + width]
            if 0 < block.size - int(block.sum()) <= missing:
                block[:] = True
                break
        else:
            free = np.flatnonzero(~mask.ravel())
            mask.ravel()[rng.choice(free, size=missing, replace=False)] = True
    return torch.from_numpy(mask.ravel())
