"""The figure of growth: it is drawn from the page's own tables."""

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import growth
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "results.md"


def test_tables_are_read_by_heading() -> None:
    text = "# A\n## First\n\n| a | b |\n|---|---|\n| 1,200 | 49.6 [48.7, 50.6] |\n\n## Second\n\n| a |\n|---|\n| 3 |\n"
    assert growth.read_table(text, "First") == [{"a": "1,200", "b": "49.6 [48.7, 50.6]"}]
    assert growth.number("1,200") == 1200
    assert growth.interval("49.6 [48.7, 50.6]") == (48.7, 50.6)
    assert growth.interval("34.5") == (34.5, 34.5)


def test_the_pages_figure_is_drawn_from_its_tables(tmp_path: Path) -> None:
    growth.main(str(PAGE), str(tmp_path / "growth.png"))
    drawn, kept = coloured(tmp_path / "growth.png"), coloured(PAGE.parent / "images" / "growth.webp")
    assert (drawn & kept).sum() > 0.9 * (drawn | kept).sum()


def coloured(path: Path) -> np.ndarray:
    """Where lines and points are; fonts, which differ between versions, are grey."""
    with Image.open(path) as image:
        values = np.asarray(image.convert("RGB"), np.int16)
    return values.max(axis=2) - values.min(axis=2) > 60
