"""Masks, drawn on the data side from the sample's own generator."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """Patches that stay visible: rounded, since truncation loses one to float error (100 patches at .8 are 20)."""
    return round(num_patches * (1 - mask_ratio))


def draw_keep(num_patches: int, mask_ratio: float, rng: np.random.Generator) -> Int[Tensor, " k"]:
    """Indices of the patches to keep, a uniform draw without replacement, in ascending order (MAE)."""
    keep = rng.permutation(num_patches)[: num_kept(num_patches, mask_ratio)]
    return torch.from_numpy(np.sort(keep))
