"""Faults that were planted are found, all of them and no others; numbers are those of numpy."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from ssl_vit.data.decode.formats import Contents
from ssl_vit.data.sources.source import DataConfig, Source, open_source
from ssl_vit.doctor.facts import Class, Place, Repeat, UnreadableImage
from ssl_vit.doctor.images import Images, choose_rows, count_labels, read_images

RNG = np.random.default_rng(0)


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def sick_folder(tmp_path: Path) -> Path:
    """Nine files: three that cannot be read, and a copy among the others."""
    folder = tmp_path / "sick"
    folder.mkdir()
    photo = encoded(noise(40, 60, 3), "JPEG")
    files = {
        "a_photo.jpg": photo,
        "b_copy.jpg": photo,
        "c_cut.jpg": photo[: len(photo) // 2],
        "d_page.jpg": b"<!DOCTYPE html>\n<html><body>404</body></html>",
        "e_empty.png": b"",
        "f_grey.png": encoded(noise(32, 32), "PNG"),
        "g_alpha.png": encoded(noise(20, 30, 4), "PNG"),
        "h_deep.png": encoded(noise(24, 24, dtype=np.uint16), "PNG"),
        "i_tiny.png": encoded(noise(3, 2, 3), "PNG"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def read(source: Source, num_channels: int = 3) -> Images:
    return read_images(source, np.arange(len(source)), num_channels)


def count(found: Counter[Contents], name: str) -> dict[Any, int]:
    counts: Counter[Any] = Counter()
    for held, number in found.items():
        counts[getattr(held, name)] += number
    return dict(counts)


def test_planted_faults_are_found_and_no_others(sick_folder: Path) -> None:
    found = read(open_source(DataConfig(source=str(sick_folder))))
    assert (found.num_read, found.num_readable, found.unreadable.count) == (9, 6, 3)
    unreadable = found.unreadable.examples
    assert [Path(image.path or "").name for image in unreadable] == ["c_cut.jpg", "d_page.jpg", "e_empty.png"]
    reasons = [image.reason for image in unreadable]
    assert "cut off" in reasons[0]
    assert "not an image file" in reasons[1]
    assert "empty" in reasons[2]
    assert count(found.files, "format") == {"JPEG": 3, "PNG": 4, "HTML": 1, "empty": 1}
    assert count(found.contents, "kind") == {"RGB": 3, "RGBA": 1, "greyscale": 2}
    assert count(found.contents, "bits") == {8: 5, 16: 1}
    assert (found.duplicates.count, found.duplicates.groups) == (1, 1)
    original = Place(0, str(sick_folder / "a_photo.jpg"))
    assert found.duplicates.examples == [Repeat(1, str(sick_folder / "b_copy.jpg"), original)]
    assert found.sizes == [(40, 60), (40, 60), (32, 32), (20, 30), (24, 24), (3, 2)]


@pytest.mark.parametrize("num_channels", [1, 3, 4])
def test_mean_and_deviation_are_those_of_all_pixels(sick_folder: Path, num_channels: int) -> None:
    source = open_source(DataConfig(source=str(sick_folder)))
    found = read(source, num_channels)
    decoded = [source.image(row, num_channels).numpy() for row in (0, 1, 5, 6, 7, 8)]
    pixels = np.concatenate([image.reshape(num_channels, -1) for image in decoded], axis=1) / 255
    assert found.pixels.count == pixels.shape[1]
    np.testing.assert_allclose(found.pixels.mean, pixels.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.pixels.std, pixels.std(axis=1), rtol=1e-12, atol=1e-12)


def test_nothing_that_can_be_read_has_no_mean(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_bytes(b"<html>")
    found = read(open_source(DataConfig(source=str(tmp_path))))
    assert (found.pixels.mean, found.pixels.std, found.sizes) == ((), (), [])
    assert not found.is_grey


def test_a_parquet_file_is_read_row_by_row(tmp_path: Path) -> None:
    rows = [{"bytes": encoded(noise(8, 8), "PNG"), "path": None}, {"bytes": b"no", "path": None}, None]
    table = datasets.Dataset.from_dict({"image": rows}, datasets.Features({"image": datasets.Image(decode=False)}))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    found = read(open_source(DataConfig(source=str(tmp_path / "rows.parquet"))), num_channels=1)
    assert (found.num_readable, found.unreadable.count) == (1, 2)
    first, second = found.unreadable.examples
    assert (first.row, first.path) == (1, None)
    assert second == UnreadableImage(2, None, "the row holds no image")
    assert count(found.files, "format") == {"PNG": 1, "unknown": 1, "missing": 1}
    assert found.is_grey
    assert len(found.pixels.mean) == 1


def test_a_sample_is_seeded_and_without_repeats() -> None:
    rows = choose_rows(1000, 50, seed=3)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert len(rows) == 50
    assert rows.tolist() == choose_rows(1000, 50, seed=3).tolist() != choose_rows(1000, 50, seed=4).tolist()
    assert choose_rows(4, 50, seed=0).tolist() == choose_rows(4, None, seed=0).tolist() == [0, 1, 2, 3]


def test_labels_are_counted_over_the_whole_source(photo_folder: Path) -> None:
    source = open_source(DataConfig(source=str(photo_folder)))
    counts = count_labels(source.subset(np.arange(25)))
    assert counts is not None
    assert (counts.num_classes, counts.num_unlabelled) == (2, 0)
    assert (counts.smallest, counts.largest) == (Class("square", 5), Class("disc", 20))
    assert count_labels(open_source(DataConfig(source=str(photo_folder), label_column="none"))) is None


def test_what_files_hold_is_counted_whatever_of_it_is_read(tmp_path: Path) -> None:
    pages = [Image.fromarray(noise(16, 16, dtype=np.uint16)) for _ in range(5)]
    for number in range(3):
        pages[0].save(tmp_path / f"{number}.tif", save_all=True, append_images=pages[1:])
    settings = DataConfig(source=str(tmp_path), mean=(0.5,) * 5, std=(0.2,) * 5, pages="channels", max_image_bytes=5000)
    found = read(open_source(settings), num_channels=5)
    assert (found.num_readable, len(found.pixels.mean)) == (3, 5)
    assert found.contents == {Contents("TIFF", 1, 16, pages=5, colours="greyscale"): 3}
    assert not found.is_grey
    limited = read(open_source(DataConfig(source=str(tmp_path), max_image_bytes=100)), num_channels=1)
    assert "data.max_image_bytes=100" in limited.unreadable.examples[0].reason
