import numpy as np
import pytest

from ssl_vit.data.augment.masking import draw_block_mask, draw_keep, num_kept


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 25), (0.8, 20), (0.9, 10), (0.6, 40)])
def test_the_number_kept_is_rounded_not_truncated(ratio: float, kept: int) -> None:
    assert num_kept(100, ratio) == kept


def test_a_mask_holds_distinct_patches_and_every_patch_has_its_turn() -> None:
    masks = [draw_keep(16, 0.75, np.random.default_rng(seed)).tolist() for seed in range(400)]
    assert all(len(set(mask)) == 4 for mask in masks)
    counts = np.bincount(np.concatenate(masks), minlength=16)
    assert counts.min() > 60  # 100 expected, deviation 8.7
    assert counts.max() < 140


@pytest.mark.parametrize("grid_size", [(14, 14), (3, 8), (2, 2)])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.35, 0.5, 0.99])
def test_block_masks_have_exactly_the_wanted_size(grid_size: tuple[int, int], ratio: float) -> None:
    for seed in range(20):
        mask = draw_block_mask(grid_size, ratio, np.random.default_rng(seed))
        assert mask.shape == (grid_size[0] * grid_size[1],)
        assert int(mask.sum()) == round(ratio * grid_size[0] * grid_size[1])


def test_block_masks_are_blocks() -> None:
    """Masked patches have more masked neighbours than if each were drawn alone."""
    neighbours = []
    for seed in range(100):
        mask = draw_block_mask((14, 14), 0.3, np.random.default_rng(seed)).reshape(14, 14).numpy()
        neighbours.append((mask[1:] & mask[:-1]).sum() / mask.sum())
    assert np.mean(neighbours) > 0.6  # 0.28 if drawn alone
