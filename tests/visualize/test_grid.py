from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ssl_vit.visualize.grid import draw_grid, enlarge


def shades(path: Path, number: int) -> dict[int, tuple[int, int]]:
    """Where the middle of each image lies in the figure, as (row, column), by the number of its shade."""
    with Image.open(path) as figure:
        red = np.asarray(figure.convert("RGB"))[..., 0]
        blue = np.asarray(figure.convert("RGB"))[..., 2]
    found = {}
    for shade in range(1, number + 1):
        rows, columns = ((red == 20 * shade) & (blue == 0)).nonzero()
        found[shade] = (int(rows.mean()), int(columns.mean()))
    return found


def panels(number: int, columns: int) -> torch.Tensor:
    """Images that are told apart by their red."""
    made = torch.zeros(number, columns, 8, 8, 3)
    made[..., 0] = 20 / 255 * torch.arange(1, number + 1)[:, None, None, None]
    return made


def test_images_share_a_row_where_there_are_few_columns(tmp_path: Path) -> None:
    draw_grid(panels(5, 2), ["a", "b"], tmp_path / "five.png", title="five")
    places = shades(tmp_path / "five.png", 5)
    # Two rows of three, read from left to right; the sixth place is white.
    assert places[1][0] == places[2][0] == places[3][0] < places[4][0] == places[5][0]
    assert places[1][1] == places[4][1] < places[2][1] == places[5][1] < places[3][1]
    with Image.open(tmp_path / "five.png") as figure:
        assert figure.width > 1100
        assert figure.convert("RGB").getpixel((places[3][1], places[4][0])) == (255, 255, 255)


def test_each_image_has_its_row_where_there_are_many_columns(tmp_path: Path) -> None:
    draw_grid(panels(3, 4), list("abcd"), tmp_path / "three.png")
    places = shades(tmp_path / "three.png", 3)
    assert places[1][0] < places[2][0] < places[3][0]


def test_lines_below_a_panel_get_their_room(tmp_path: Path) -> None:
    heights = []
    for text in ("one", "one\ntwo"):
        draw_grid(panels(2, 1), ["a"], tmp_path / "cells.png", cells=[[text]] * 2)
        with Image.open(tmp_path / "cells.png") as figure:
            heights.append(figure.height)
    assert heights[1] > heights[0] + 2 * 10


def test_a_small_figure_is_enlarged_without_change() -> None:
    small = torch.rand(1, 2, 6, 9, 3)
    large = enlarge(small)
    factor = large.shape[3] // 9
    assert large.shape == (1, 2, 6 * factor, 9 * factor, 3)
    assert large.shape[3] >= 280
    assert (large[:, :, ::factor, ::factor] == small).all()
    assert (large[:, :, factor - 1 :: factor, factor - 1 :: factor] == small).all()
