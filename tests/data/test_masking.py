import numpy as np
import pytest

from ssl_vit.data.masking import draw_keep, num_kept


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 25), (0.8, 20), (0.9, 10), (0.6, 40)])
def test_the_number_kept_is_rounded_not_truncated(ratio: float, kept: int) -> None:
    assert num_kept(100, ratio) == kept


def test_a_mask_holds_distinct_patches_and_every_patch_has_its_turn() -> None:
    masks = [draw_keep(16, 0.75, np.random.default_rng(seed)).tolist() for seed in range(400)]
    assert all(len(set(mask)) == 4 for mask in masks)
    counts = np.bincount(np.concatenate(masks), minlength=16)
    assert counts.min() > 60  # 100 expected, deviation 8.7
    assert counts.max() < 140
