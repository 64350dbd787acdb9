"""Copies are found, byte for byte or to the eye, and images that are only alike are kept."""

import dataclasses
import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageFilter

from ssl_vit.data import copies
from ssl_vit.data.config import DataConfig
from ssl_vit.data.copies import Copies, Copy, leave_out_copies, take_print
from ssl_vit.data.sources.source import Source, open_source
from ssl_vit.data.sources.stream import open_images


def scene(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Blobs of colour, no two seeds alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "PNG", **how: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def source_of(*files: bytes) -> Source:
    rows = datasets.Dataset.from_dict({"image": [{"bytes": data, "path": None} for data in files]})
    return Source("made", rows.cast_column("image", datasets.Image(decode=False)), "image")


def find(*files: bytes) -> list[Copy | None]:
    source = source_of(*files)
    finder = Copies(source, 3)
    return [finder.find(row, take_print(source, row, data, source.image(row, 3))) for row, data in enumerate(files)]


@pytest.mark.parametrize(
    "again",
    [
        lambda image: saved(image, "JPEG", quality=30),
        lambda image: saved(image, "WEBP", quality=50),
        lambda image: saved(image.resize((48, 40))),
        lambda image: saved(image.resize((31, 33), Image.Resampling.BILINEAR), "BMP"),
        lambda image: saved(image.filter(ImageFilter.GaussianBlur(1)), "TIFF"),
    ],
)
def test_an_image_that_was_saved_again_is_a_near_copy(again: object) -> None:
    images = [scene(seed) for seed in range(6)]
    assert callable(again)
    found = find(*map(saved, images), again(images[4]), saved(images[2]), saved(scene(9)))
    assert found == [None] * 6 + [Copy(4, False), Copy(2, True), None]


def test_images_that_are_only_alike_are_none() -> None:
    image = scene(0)
    red, green, blue = image.split()
    tinted = Image.merge("RGB", (green, blue, red))
    dotted = image.copy()
    dotted.paste((255, 255, 255), (40, 30, 60, 50))
    plain = [Image.new("RGB", (40, 40), (shade,) * 3) for shade in (0, 90, 255)]
    found = find(*map(saved, (image, tinted, dotted, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), *plain)))
    assert found == [None] * 7
    assert find(*(saved(image, "JPEG", quality=quality) for image in plain for quality in (50, 90)))[1::2] == [
        Copy(0, False),
        Copy(2, False),
        Copy(4, False),
    ]


def test_each_is_compared_with_those_that_are_no_copies() -> None:
    steps = [saved(scene(0).filter(ImageFilter.GaussianBlur(radius))) for radius in range(0, 40, 2)]
    found = find(*steps)
    kept = [row for row, copy in enumerate(found) if copy is None]
    assert len(kept) > 1  # a chain of small steps does not make one of all
    assert {copy.first for copy in found if copy is not None} <= set(kept)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, of 3 and 4 files: an exact and a near copy, and one that cannot be read, twice."""
    files = {
        "a/0.png": saved(scene(0)),
        "a/1.png": saved(scene(1)),
        "a/2.png": b"no image",
        "b/0.png": saved(scene(0)),
        "b/1.jpg": saved(scene(1), "JPEG", quality=60),
        "b/2.png": saved(scene(2)),
        "b/3.png": b"no image",
    }
    for name, data in files.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(data)
    return tmp_path / "images"


def config_of(source: Path | dict[str, float], tmp_path: Path) -> DataConfig:
    named = source if isinstance(source, dict) else str(source)
    return DataConfig(source=named, drop_duplicates=True, cache_dir=str(tmp_path / "cache"))


def names(source: Source) -> list[str]:
    return ["/".join(Path(stored["path"]).parts[-2:]) for stored in source.rows["image"]]


def test_copies_are_left_out_of_training(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder, tmp_path)
    source = open_images(config)
    assert isinstance(source, Source)
    assert names(source) == ["a/0.png", "a/1.png", "a/2.png", "b/2.png", "b/3.png"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    assert "2 of 7 images are left out (1 byte for byte the same as another, 1 nearly so)" in source.notes[-1]
    assert len(open_source(config)) == 7  # what is judged by is left as it is
    # The next start reads none of them; one after a change all.
    monkeypatch.setattr(copies, "_find_all", lambda *_: pytest.fail("looked for again"))
    assert names(open_images(config)) == names(source)
    (folder / "b/2.png").write_bytes(saved(scene(3)))
    with pytest.raises(pytest.fail.Exception, match="looked for again"):
        open_images(config)


def test_an_image_that_could_not_be_read_is_compared_when_it_can_be(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder, tmp_path)
    with monkeypatch.context() as patch:
        own = copies._print_of
        patch.setattr(copies, "_print_of", lambda source, *rest: None if rest[-1] == 3 else own(source, *rest))
        assert "b/0.png" in names(open_images(config))
    assert "b/0.png" not in names(open_images(config))


def test_a_folder_that_cannot_be_written_costs_the_cache_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert len(open_images(config_of(folder, tmp_path))) == 5


def test_a_mixture_keeps_its_weights_and_no_part_becomes_empty(folder: Path, tmp_path: Path) -> None:
    parts = {str(folder / "a"): 1.0, str(folder / "b"): 3.0}
    source = open_images(config_of(parts, tmp_path))
    assert isinstance(source, Source)
    assert source.mixture is not None
    assert source.mixture.weights == (1.0, 3.0)
    assert source.mixture.origin.tolist() == [0, 0, 0, 1, 1]
    for name in ("b/2.png", "b/3.png"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"data.drop_duplicates=True: all images of '.*/b' are copies; leave it out"):
        open_images(config_of(parts, tmp_path))


def test_a_part_of_a_mixture_that_would_not_be_drawn_without_its_copies_is_refused(tmp_path: Path) -> None:
    for name, seeds in {"a": [0] * 9 + [1], "b": [2]}.items():
        (tmp_path / name).mkdir()
        for number, seed in enumerate(seeds):
            (tmp_path / name / f"{number}.png").write_bytes(saved(scene(seed)))
    config = config_of({str(tmp_path / "a"): 0.9, str(tmp_path / "b"): 0.1}, tmp_path)
    assert len(open_source(config)) == 11
    with pytest.raises(ValueError, match=r"without copies '.*/b' would never be drawn; give it more weight"):
        open_images(config)


def test_what_cannot_be_done_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="drop_duplicates=True: a stream is not read beforehand"):
        DataConfig(source="x.tar", streaming=True, drop_duplicates=True)
    monkeypatch.setattr(copies, "imagehash", None)
    config = config_of(folder, tmp_path)
    with pytest.raises(ValueError, match=r"data.drop_duplicates=True: near-duplicates are found by ImageHash: pip"):
        leave_out_copies(open_source(config), config)
    found = find(saved(scene(0)), saved(scene(0)), saved(scene(0), "JPEG"))
    assert found == [None, Copy(0, True), None]


def test_any_number_of_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    smooth = [np.kron(rng.integers(0, 200, (5, 5, 7), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)) for _ in range(3)]
    for number, pixels in enumerate([*smooth, smooth[1] + 3]):
        np.save(tmp_path / f"{number}.npy", pixels)
    config = dataclasses.replace(config_of(tmp_path, tmp_path), mean=(0.5,) * 7, std=(0.5,) * 7)
    assert names(open_images(config)) == [f"{tmp_path.name}/{number}.npy" for number in range(3)]
