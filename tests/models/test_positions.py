import math

import pytest
import torch

from ssl_vit.models.patches import sincos_positions


def test_first_half_of_the_width_encodes_the_column() -> None:
    table = sincos_positions(16, (3, 5), num_prefix_tokens=1)
    assert table.shape == (16, 16)
    assert table.dtype == torch.float32
    assert torch.equal(table[0], torch.zeros(16))
    grid = table[1:].reshape(3, 5, 16)
    assert torch.equal(grid[0, :, :8], grid[2, :, :8])  # the same column, whatever the row
    assert torch.equal(grid[:, 0, 8:], grid[:, 4, 8:])  # the same row, whatever the column
    assert not torch.equal(grid[0, 1, :8], grid[0, 2, :8])


def test_values_are_blocks_of_sines_then_cosines() -> None:
    row, column, width = 2, 4, 16
    expected = [
        function(axis * 10000 ** (-i / (width / 4)))
        for axis in (column, row)
        for function in (math.sin, math.cos)
        for i in range(width // 4)
    ]
    table = sincos_positions(width, (3, 5), num_prefix_tokens=0)
    assert table[row * 5 + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_width_must_be_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="embed_dim=18"):
        sincos_positions(18, (2, 2))
