import pytest
import torch

from ssl_vit.visualize.masks import block_keeps, hidden_keeps, parse_patches, random_keeps


def test_numbers_and_ranges_of_patches() -> None:
    assert parse_patches(["3", "8-10"]) == [3, 8, 9, 10]
    for word in ("x", "3-", "-3", "1.5"):
        with pytest.raises(ValueError, match=f"--hide {word}: give numbers"):
            parse_patches([word])


def test_hidden_patches_are_those_not_kept() -> None:
    assert hidden_keeps(2, 6, [1, 4, 4]).tolist() == [[0, 2, 3, 5]] * 2
    with pytest.raises(ValueError, match="--hide 6: there are 6 patches"):
        hidden_keeps(1, 6, [6])
    with pytest.raises(ValueError, match="removes 6 of 6"):
        hidden_keeps(1, 6, range(6))
    with pytest.raises(ValueError, match="removes 0 of 6"):
        hidden_keeps(1, 6, [])


def test_a_ratio_removes_as_many_patches_at_random_as_in_blocks() -> None:
    at_random, blocks = random_keeps(4, 64, 0.75, seed=0), block_keeps(4, (8, 8), 0.75, seed=0)
    assert at_random.shape == blocks.shape == (4, 16)

    def edges(keep: torch.Tensor) -> int:
        """Places where a kept patch lies beside a removed one."""
        grid = torch.zeros(len(keep), 64).scatter(1, keep, 1.0).reshape(-1, 8, 8)
        return int(grid.diff(dim=1).abs().sum() + grid.diff(dim=2).abs().sum())

    assert edges(blocks) < 0.8 * edges(at_random)
    assert torch.equal(at_random, random_keeps(4, 64, 0.75, seed=0))
    with pytest.raises(ValueError, match="--mask_ratios 1: keeps 0 of 64"):
        random_keeps(1, 64, 1.0, seed=0)
