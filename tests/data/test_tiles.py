"""Tiles of large images: which there are, which pixels they hold, and when each is drawn."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_vit.data import tiles, workers
from ssl_vit.data.config import DataConfig
from ssl_vit.data.decoded import open_decoded
from ssl_vit.data.sampler import StepSampler
from ssl_vit.data.sources import images
from ssl_vit.data.sources.fingerprint import fingerprint
from ssl_vit.data.sources.images import Source
from ssl_vit.data.sources.source import open_source
from ssl_vit.data.sources.stream import open_images
from ssl_vit.data.tiles import cut_into_tiles, tile_boxes
from ssl_vit.runs import provenance

RNG = np.random.default_rng(3)
SIZES = {"a.png": (50, 70), "b.png": (20, 20), "c.png": (12, 33), "d.png": (40, 8)}  # height and width


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine
@given(*[st.integers(1, 90)] * 2, *[st.integers(1, 40)] * 2, st.integers(0, 39))
def test_tiles_cover_every_pixel_and_are_whole(
    height: int, width: int, tile_height: int, tile_width: int, overlap: int
) -> None:
    overlap = min(overlap, tile_height - 1, tile_width - 1)
    boxes = tile_boxes(height, width, (tile_height, tile_width), overlap).tolist()
    seen = np.zeros((height, width), dtype=int)
    for top, left, rows, columns in boxes:
        assert (rows, columns) == (min(height, tile_height), min(width, tile_width))
        assert top + rows <= height
        assert left + columns <= width
        seen[top : top + rows, left : left + columns] += 1
    assert seen.min() == 1 or overlap
    assert seen.all()
    assert boxes == sorted(boxes)
    for axis, tile in ((0, tile_height), (1, tile_width)):
        starts = sorted({box[axis] for box in boxes})
        assert all(0 < after - before <= tile - overlap for before, after in pairwise(starts))


def test_a_grid_as_documented() -> None:
    assert [box[1] for box in tile_boxes(224, 2048, (224, 224), 0).tolist()] == [*range(0, 2016, 224), 1824]
    assert [box[0] for box in tile_boxes(500, 10, (200, 200), 50).tolist()] == [0, 150, 300]
    assert len(tile_boxes(2048, 2048, (224, 224), 0)) == 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, size in SIZES.items():
        Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / "images" / name)
    return tmp_path / "images"


def config_of(source: Path | dict[str, float], **given: object) -> DataConfig:
    beside = source if isinstance(source, Path) else Path(next(iter(source)))
    named = str(source) if isinstance(source, Path) else source
    defaults = {"tile_size": 20, "cache_dir": str(beside.parent / "cache")}
    return DataConfig(source=named, **(defaults | given))  # pyright: ignore[reportArgumentType]


def cut(source: Path | dict[str, float], **settings: object) -> Source:
    config = config_of(source, **settings)
    opened = open_images(config)
    assert isinstance(opened, Source)
    return cut_into_tiles(opened, config)


def check_pixels(source: Path, num_channels: int, **settings: object) -> Source:
    """Put the tiles of each image together again and compare it with the whole one."""
    found = cut(source, **settings)
    whole = open_source(config_of(source, **settings))
    assert found.tiles is not None
    seen = set()
    canvas = [torch.full_like(whole.image(row, num_channels), 77) for row in range(len(whole))]
    for row, (number, top, left, height, width) in enumerate(found.tiles.tolist()):
        tile = found.image(row, num_channels)
        assert tile.shape == (num_channels, height, width)
        assert tile.permute(1, 2, 0).is_contiguous()
        canvas[number][:, top : top + height, left : left + width] = tile
        seen.add(number)
    assert seen == set(range(len(whole)))
    assert all(torch.equal(image, whole.image(row, num_channels)) for row, image in enumerate(canvas))
    return found


def test_tiles_are_the_pixels_of_their_images(folder: Path) -> None:
    found = check_pixels(folder, 3)
    assert len(found) == 3 * 4 + 1 + 2 + 2
    assert found.notes == (
        "4 images are cut into 17 tiles of 20 x 20 pixels, each of which counts as an image",
        "each tile that is drawn decodes its whole image; --data.cache disk decodes each image once",
    )
    small = cut(folder, tile_size=(64, 80))
    assert [tuple(box) for box in small.tiles[:, 3:].tolist()] == list(SIZES.values())  # pyright: ignore[reportOptionalSubscript]
    assert "(4 smaller than a tile, used whole)" in small.notes[-1]
    assert len(check_pixels(folder, 3, tile_size=(20, 15), tile_overlap=5)) == 3 * 7 + 2 + 3 + 3


def test_tiles_of_images_that_lie_on_their_side(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        image = Image.fromarray(RNG.integers(0, 256, (30, 60, 3), dtype=np.uint8))
        for kind in ("jpg", "png", "tif", "webp"):
            image.save(tmp_path / "images" / f"{orientation}.{kind}", exif=exif)
    found = check_pixels(tmp_path / "images", 3, tile_size=(30, 20))
    assert len(found) == 4 * (4 * 3 + 4 * 4)  # 30 x 60 pixels make 3 tiles, 60 x 30 upright make 4


def test_tiles_of_twelve_channels(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    pixels = RNG.integers(0, 256, (30, 50, 12), dtype=np.uint8)
    np.save(tmp_path / "images" / "last.npy", pixels)
    np.save(tmp_path / "images" / "first.npy", np.moveaxis(pixels, -1, 0))
    tifffile.imwrite(tmp_path / "images" / "pages.tif", np.moveaxis(pixels, -1, 0), photometric="minisblack")
    tifffile.imwrite(
        tmp_path / "images" / "tiled.tif", pixels, photometric="minisblack", planarconfig="contig", tile=(16, 16)
    )
    grey = (0.5,) * 12
    found = check_pixels(tmp_path / "images", 12, mean=grey, std=grey, pages="channels")
    assert len(found) == 4 * 2 * 3


def test_tiles_of_pages_that_are_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with tifffile.TiffWriter(tmp_path / "images" / "a.tif") as file:
        for size in ((20, 60), (50, 20)):
            file.write(RNG.integers(0, 256, size, dtype=np.uint8), photometric="minisblack")
    found = check_pixels(tmp_path / "images", 1, pages="images", mean=(0.5,), std=(0.5,))
    assert found.groups is not None
    assert found.groups.tolist() == [0] * (3 + 3)
    assert "page 1, tile at 30, 0" in found.where(5)


def test_each_tile_is_drawn_once_an_epoch_by_any_number_of_processes(folder: Path) -> None:
    found = cut(folder)

    def drawn(num_processes: int, num_micro: int) -> list[list[int]]:
        """Rows of each step."""
        steps = [[] for _ in range(17)]
        for process in range(num_processes):
            sampler = StepSampler(
                num_samples=len(found), batch_size=4, num_steps=17, seed=1, num_micro=num_micro,
                process_index=process, num_processes=num_processes,
            )  # fmt: skip
            for number, keys in enumerate(sampler):
                steps[number // num_micro] += [key.index for key in keys]
        return steps

    one = drawn(1, 1)
    assert [sorted(step) for step in drawn(2, 2)] == [sorted(step) for step in one]
    rows = [row for step in one for row in step]
    epochs = [rows[start : start + 17] for start in range(0, 4 * 17, 17)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_sizes_are_read_once_and_again_after_a_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cut(folder)
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "_size_of", lambda *_: pytest.fail("read again"))
        for settings in ({}, {"tile_size": 16}, {"tile_overlap": 3}):
            assert len(cut(folder, **settings)) >= len(before)
    Image.new("RGB", (200, 20)).save(folder / "b.png")
    assert len(cut(folder)) == len(before) + 9
    for file in (folder.parent / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:50])  # damaged
    assert len(cut(folder)) == len(before) + 9


def test_a_size_that_could_not_be_read_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tiles._size_of
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "_size_of", lambda *given: (0, 0) if given[-1] == 0 else own(*given))
        found = cut(folder)
        assert len(found) == 17 - 11
        assert found.notes[-1].endswith("counts as an image")
    rows = []
    monkeypatch.setattr(tiles, "_size_of", lambda *given: rows.append(given[-1]) or own(*given))
    monkeypatch.setattr(workers, "num_cpus", lambda: 1)
    assert (len(cut(folder)), rows) == (17, [0])
    assert (len(cut(folder)), rows) == (17, [0])


def test_nothing_is_lost_where_sizes_cannot_be_kept(folder: Path) -> None:
    (folder.parent / "cache").write_text("no folder")
    assert len(cut(folder)) == 17


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_an_image_is_decoded_once_for_all_of_its_tiles(
    folder: Path, cache: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:2000])
    found, own = cut(folder, cache=cache), images.decode
    assert len(found) == 17 + 12  # its header is whole
    assert "--data.cache disk" not in found.notes[-1]

    def counted(*args: object) -> object:
        with (tmp_path / "decoded.txt").open("a") as file:
            file.write("x")
        return own(*args)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", counted)
        patch.setattr("ssl_vit.data.decoded._estimate", lambda *_: 0)
        decoded = open_decoded(found, config_of(folder, cache=cache, cache_side=20), 3)
        assert (tmp_path / "decoded.txt").read_text() == "x" * 5
        good = [row for row in range(29) if "bad.png" not in found.where(row)]
        kept = [decoded.image(row, 3) for row in good]
        assert (tmp_path / "decoded.txt").read_text() == "x" * 5
    assert all(torch.equal(found.image(row, 3), image) for row, image in zip(good, kept, strict=True))
    with pytest.raises(ValueError, match=r"row 2 \(.*bad\.png, tile at 0, 0\): the PNG file is cut off"):
        decoded.image(13, 3)
    smaller = open_decoded(found, config_of(folder, cache=cache, cache_side=10), 3)
    assert smaller.image(0, 3).shape == (3, 10, 10)


def test_a_tile_of_a_bad_image_is_replaced_by_one_of_the_next_image(folder: Path) -> None:
    (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:2000])
    (folder / "c.png").write_bytes(b"no image")  # one tile of no size
    found = cut(folder)
    rows = [row for row in range(len(found)) if "bad.png" in found.where(row)]
    assert len(rows) == 12
    chosen = [found.where(found.next_image(row, 3)[1]) for row in rows]
    assert all("d.png" in where for where in chosen)  # c.png is bad, too
    assert len(set(chosen)) == 2  # and d.png has two tiles
    assert found.tiles is not None
    assert found.tiles[25].tolist() == [3, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"row 3 \(.*c\.png, tile at 0, 0\): not an image file"):
        found.image(25, 3)


def test_more_bad_tiles_than_tries_do_no_harm(tmp_path: Path) -> None:
    """An image of 100 tiles: the 49 rows after each of its first ones are bad, too."""
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.fromarray(RNG.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{name}.png")
    data = (tmp_path / "images" / "a.png").read_bytes()
    (tmp_path / "images" / "a.png").write_bytes(data[: len(data) // 2])
    found = cut(tmp_path / "images")
    assert [found.next_image(row, 3)[1] for row in (0, 3, 57)] == [100, 103, 157]
    assert found.next_image(150, 3)[1] == 150


def test_tiles_in_a_mixture(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for name in "xy":
        Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "other" / f"{name}.png")
    (tmp_path / "other" / "z.png").write_bytes(b"no image")
    found = cut({str(folder): 3.0, str(tmp_path / "other"): 1.0})
    assert found.mixture is not None
    assert len(found) == 17 + 9
    assert found.mixture.draws().tolist() == [20, 6]  # 3 : 1 of the 26 tiles
    order = found.mixture.order(0, 0)
    assert np.bincount(found.mixture.origin[order]).tolist() == [20, 6]
    assert found.where(22).startswith(f"data.source='{tmp_path}/other': row 1 (")
    assert "y.png, tile at 0, 20" in found.where(22)
    assert 17 <= found.next_image(25, 3)[1] < 25  # of the same source


def test_copies_are_whole_images(folder: Path) -> None:
    (folder / "e.png").write_bytes((folder / "a.png").read_bytes())
    assert len(cut(folder, drop_duplicates=True)) == 17
    assert len(cut(folder)) == 17 + 12


def test_labels_and_groups_are_those_of_the_image(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (40, 20)).save(tmp_path / "images" / name / "1.png")
    found = cut(tmp_path / "images")
    assert found.labels is not None
    assert found.groups is not None
    assert found.labels.tolist() == found.groups.tolist() == [0, 0, 1, 1]
    assert found.subset(np.array([3])).tiles.tolist() == [[1, 0, 20, 20, 20]]  # pyright: ignore[reportOptionalMemberAccess]


def test_fingerprints_tell_other_tiles(folder: Path) -> None:
    """16 and 18 pixels make as many tiles of 33 and 70 pixels, at other places."""
    for name in ("a.png", "b.png", "d.png"):
        (folder / name).unlink()
    one, two = (cut(folder, tile_size=size) for size in (17, 18))
    assert len(one) == len(two) == 2
    rows = np.arange(2)
    assert fingerprint(one, rows) != fingerprint(two, rows)
    assert fingerprint(one, rows) == fingerprint(cut(folder, tile_size=17), rows)
    notes = [provenance.fingerprint(source) for source in (one, two, open_source(config_of(folder)))]
    assert len({note["sha256"] for note in notes}) == 3
    assert notes[0]["covers"].endswith("the places of all tiles; no pixels")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"source": "x.tar", "streaming": True, "tile_size": 9}, "tile_size=9: tiles of a stream are not counted"),
        ({"tile_size": 0}, "tile_size=0: must be at least 1; null = whole images"),
        ({"tile_size": (9, 4), "tile_overlap": 4}, r"tile_overlap=4: must be less than tile_size=\(9, 4\)"),
        ({"tile_overlap": 4}, "tile_overlap=4: must be less than tile_size=None"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        DataConfig(**settings)
