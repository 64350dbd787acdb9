"""Images in memory: what is stored of them, and their labels."""

import os
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import numpy as np
import pytest
from PIL import Image

from ssl_vit.data.config import DataConfig
from ssl_vit.data.sources.fingerprint import fingerprint
from ssl_vit.data.sources.in_memory import as_rows, store
from ssl_vit.data.sources.source import Source, open_source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def grey(value: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (value, value, value))


def stored(source: Any) -> Source:
    """What a run opens."""
    return open_source(DataConfig(store(source), allow_outside_paths=True))


def as_dataset(paths: list[str]) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({"photo": ["none.png", *paths], "class": [9, *range(len(paths))]})
    return rows.cast_column("photo", datasets.Image()).select(range(1, len(paths) + 1))


@pytest.mark.parametrize("kind", [list, as_dataset])
@pytest.mark.parametrize("is_relative", [False, True])
def test_files_are_not_copied_and_their_changes_are_seen(
    kind: Any, is_relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path in paths:
        grey(10).save(path)
    given = [os.path.relpath(path) for path in paths] if is_relative else paths
    first = stored(kind(given))
    monkeypatch.chdir("/")
    assert [first.rows[row][first.image_column] for row in range(2)] == [
        {"bytes": None, "path": path} for path in paths
    ]
    before = fingerprint(first, np.arange(2))
    grey(222).save(paths[1])
    os.utime(paths[1], (1, 1))
    monkeypatch.chdir(tmp_path)
    again = stored(kind(given))
    assert again.name == first.name
    assert [int(again.image(row, 3).max()) for row in range(2)] == [10, 222]
    assert fingerprint(again, np.arange(2)) != before


def test_a_file_that_is_missing_is_a_bad_image(tmp_path: Path) -> None:
    grey(10).save(tmp_path / "a.png")
    source = stored([tmp_path / "a.png", tmp_path / "b.png"])
    assert source.next_image(1, 3)[1] == 0
    with pytest.raises(ValueError, match=r"row 1 \(.*b\.png\)"):
        source.image(1, 3)


def test_images_in_memory_keep_their_bytes_beside_files(tmp_path: Path) -> None:
    grey(10).save(tmp_path / "a.png")
    source = stored([grey(30), tmp_path / "a.png"])
    assert [int(source.image(row, 3).max()) for row in range(2)] == [30, 10]


def test_minus_one_and_none_are_no_label() -> None:
    for labels, expected, names in (
        ([7, -1, None, 10], [0, -1, -1, 1], ("7", "10")),
        ([np.int64(-1), "b", None, "a"], [-1, 1, -1, 0], ("a", "b")),
    ):
        source = stored(list(zip(map(grey, range(4)), labels, strict=True)))
        assert source.labels is not None
        assert (source.labels.tolist(), source.class_names) == (expected, names)
    assert as_rows([(grey(1), None), (grey(2), -1)]).column_names == ["image"]
