import io
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ssl_vit.data.decode import formats
from ssl_vit.data.sources import source as sources
from ssl_vit.data.sources import tables
from ssl_vit.data.sources.source import DataConfig, open_source


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` converts out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


def _write(*paths: Path) -> None:
    """Images whose red value is their position in the list."""
    for value, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(value))


def _open(source: str | Path, **settings: object) -> sources.Source:
    return open_source(DataConfig(source=str(source), **settings))


def _table(values: range = range(4), **columns: object) -> datasets.Dataset:
    """Images of these red values with further columns."""
    images = [{"bytes": _png(value), "path": None} for value in values]
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())


def _reds(source: sources.Source) -> list[int]:
    return [int(source.image(index, 3)[0, 0, 0]) for index in range(len(source))]


def _parquet(path: Path, **columns: object) -> str:
    """A parquet file without Hugging Face's metadata."""
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"split": ""}, r"split='': "),
        ({"mean": ()}, r"mean=\(\): "),
        ({"mean": (123.7, 116.3, 103.5)}, r"mean=\(123\.7, 116\.3, 103\.5\): .*divide 0-255 by 255"),
        ({"mean": (float("nan"),), "std": (0.5,)}, r"mean=\(nan,\): "),
        ({"std": (0.2, 0.0, 0.2)}, r"std=\(0\.2, 0\.0, 0\.2\): .*\(0, 1\]"),
        ({"std": (58.4, 57.1, 57.4)}, r"std=\(58\.4, 57\.1, 57\.4\): .*divide 0-255 by 255"),
        ({"mean": (0.5,)}, r"std=\(0\.229, 0\.224, 0\.225\): .*mean=\(0\.5,\)"),
        ({"num_workers": -2}, r"num_workers=-2: .*auto"),
        ({"cache_side": 0}, r"cache_side=0: .*auto"),
        ({"max_image_bytes": 0}, r"max_image_bytes=0: "),
        ({"max_bad_share": 1.5}, r"max_bad_share=1\.5: "),
        ({"max_bad_share": float("nan")}, r"max_bad_share=nan: "),
    ],
)
def test_impossible_settings_are_refused(settings: dict, start: str):
    with pytest.raises(ValueError, match="^" + start):
        DataConfig(**settings)


def test_missing_source_is_asked_for():
    with pytest.raises(ValueError, match=r"^data\.source='': name the images: 'openmoji'"):
        open_source(DataConfig())


def test_parquet_with_hugging_face_features(tmp_path):
    features = datasets.ClassLabel(names=["cat", "dog"])
    table = _table(label=[1, 0, 1, 1], text=["a", "b", "c", "d"]).cast_column("label", features)
    table.to_parquet(tmp_path / "train.parquet")
    source = _open(tmp_path / "train.parquet")
    assert source.image_column == "image"
    assert source.rows.column_names == ["image"]
    assert _reds(source) == [0, 1, 2, 3]
    assert source.class_names == ("cat", "dog")
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0, 1, 1]


def test_glob_of_parquet_files_and_a_slice(tmp_path):
    (tmp_path / "deep").mkdir()
    _table(range(3)).to_parquet(tmp_path / "0.parquet")
    _table(range(3, 5)).to_parquet(tmp_path / "deep/1.parquet")
    assert _reds(_open(f"{tmp_path}/**/*.parquet")) == [0, 1, 2, 3, 4]
    assert _reds(_open(f"{tmp_path}/*.parquet", split="train[1:]")) == [1, 2]


@pytest.mark.parametrize("kind", ["struct", "bytes only", "binary", "large binary"])
def test_parquet_without_features(tmp_path, kind: str):
    columns = {
        "struct": pa.array([{"bytes": _png(value), "path": f"{value}.png"} for value in range(3)]),
        "bytes only": pa.array([{"bytes": _png(value)} for value in range(3)]),
        "binary": pa.array([_png(value) for value in range(3)], pa.binary()),
        "large binary": pa.array([_png(value) for value in range(3)], pa.large_binary()),
    }
    path = _parquet(tmp_path / "x.parquet", content=columns[kind], text=["a", "b", "c"])
    source = _open(path)
    assert source.image_column == "content"
    assert source.rows.features == {"content": datasets.Image(decode=False)}
    assert _reds(source) == [0, 1, 2]


def test_parquet_files_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"^data\.source='.*/\*\.parquet': no file matches this pattern"):
        _open(f"{tmp_path}/*.parquet")
    (tmp_path / "junk.parquet").write_text("junk")
    with pytest.raises(ValueError, match=r"^data\.source=.*: .*junk\.parquet is not a readable parquet file"):
        _open(f"{tmp_path}/*.parquet")
    (tmp_path / "photos.zip").write_text("zip")
    with pytest.raises(ValueError, match=r"^data\.source=.*photos\.zip is not a parquet file; unpack it and name"):
        _open(tmp_path / "photos.zip")
    empty = _parquet(tmp_path / "empty.parquet", image=pa.array([], pa.binary()))
    with pytest.raises(ValueError, match=r"^data\.source=.*empty\.parquet': holds no rows"):
        _open(empty)
    good = _parquet(tmp_path / "good.parquet", image=[_png(0)])
    with pytest.raises(ValueError, match=r"^data\.split='test': .*'train'"):
        _open(good, split="test")
    with pytest.raises(ValueError, match=r"^data\.split='train\[:0\]': .*no data"):
        _open(good, split="train[:0]")


def test_saved_dataset_and_splits(tmp_path):
    splits = datasets.DatasetDict({"train": _table(range(3)), "validation": _table(range(3, 5))})
    splits.save_to_disk(tmp_path / "d")
    assert _reds(_open(tmp_path / "d")) == [0, 1, 2]
    assert _reds(_open(tmp_path / "d", split="validation")) == [3, 4]
    with pytest.raises(
        ValueError,
        match=r"^data\.split='validaton': .*did you mean 'validation'\? there are: train, validation",
    ):
        _open(tmp_path / "d", split="validaton")

    _table(range(4)).select([2, 0]).save_to_disk(tmp_path / "single")
    assert _reds(_open(tmp_path / "single")) == [2, 0]
    with pytest.raises(ValueError, match=r"^data\.split='test': .*without splits"):
        _open(tmp_path / "single", split="test")


def test_empty_and_damaged_saved_datasets(tmp_path):
    _table().select([]).save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"^data\.source='.*empty': this save_to_disk folder is empty"):
        _open(tmp_path / "empty")
    _table().save_to_disk(tmp_path / "damaged")
    next((tmp_path / "damaged").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match=r"^data\.source='.*damaged': this save_to_disk folder is empty"):
        _open(tmp_path / "damaged")


@pytest.mark.parametrize(
    "source",
    ["/no/such", "./photos", "~/no_such_folder", "data/photos/train", "photos.zip", "train.parquet", "a\\b"],
)
def test_absent_paths_are_not_tried_on_the_hub(source: str, monkeypatch):
    monkeypatch.setattr(tables, "load_split", lambda *args, **kwargs: pytest.fail("tried on the hub"))
    with pytest.raises(ValueError, match=r"^data\.source='.*': no such file or folder$") as error:
        _open(source)
    assert repr(source) in str(error.value)


def test_hub_data_set(monkeypatch):
    asked = []

    def load(name: str, **settings: object) -> datasets.Dataset:
        asked.append((name, settings))
        return _table(label=[0, 1, 2, 1])

    monkeypatch.setattr(tables, "load_split", load)
    source = _open("someone/flowers", split="test[:4]")
    assert asked == [("someone/flowers", {"split": "test[:4]"})]  # and no code from the hub is trusted
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 2, 1]

    monkeypatch.setattr(tables, "load_split", lambda name, split: _table(range(0)))
    with pytest.raises(ValueError, match=r"^data\.source='someone/flowers': split 'val' holds no rows$"):
        _open("someone/flowers", split="val")


def test_hub_failure_says_what_was_tried(monkeypatch):
    def fail(name: str, **settings: object) -> datasets.Dataset:
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr(tables, "load_split", fail)
    with pytest.raises(
        ValueError,
        match=r"^data\.source='flowers': no such file or folder here, and loading split 'train' .*"
        r"Couldn't reach 'flowers' on the Hub\. data\.source may be 'openmoji'.*a folder of images",
    ):
        _open("flowers")


def _saved(folder: Path, rows: datasets.Dataset) -> str:
    rows.save_to_disk(folder)
    return str(folder)


def test_image_column_by_name_and_by_type(tmp_path):
    photos = _table(range(4)).rename_column("image", "photo")
    two = _saved(tmp_path / "two", datasets.concatenate_datasets([photos, _table(range(9, 13))], axis=1))
    with pytest.raises(ValueError, match=r"^data\.image_column=None: several .*: photo, image$"):
        _open(two)
    assert _reds(_open(two, image_column="image")) == [9, 10, 11, 12]
    with pytest.raises(ValueError, match=r"^data\.image_column='imagee': .*did you mean 'image'\? there are"):
        _open(two, image_column="imagee")

    # Thumbnails as plain bytes do not compete with a column that is declared to hold images.
    thumbnails = _saved(tmp_path / "thumbnails", _table().add_column("thumbnail", [b"1", b"2", b"3", b"4"]))
    assert _open(thumbnails).image_column == "image"


def test_source_without_an_image_column(tmp_path):
    text = _saved(tmp_path / "text", datasets.Dataset.from_dict({"text": ["a"], "size": [1.5]}))
    with pytest.raises(ValueError, match=r"^data\.source='.*': no column .*: text \(string\), size \(float64\)$"):
        _open(text)
    with pytest.raises(ValueError, match=r"^data\.image_column='text': not a column of images: text \(string\)"):
        _open(text, image_column="text")
    blobs = _parquet(tmp_path / "b.parquet", a=pa.array([b"1"]), b=pa.array([b"2"]))
    with pytest.raises(ValueError, match=r"^data\.image_column=None: several columns hold images.*: a, b$"):
        _open(blobs)


@pytest.mark.parametrize(
    ("columns", "chosen", "labels", "names"),
    [
        ({"label": [2, 0, None, -1]}, None, [1, 0, -1, -1], ("0", "2")),
        ({"kind": [2, 0, 1, 1]}, None, None, ()),  # integers of another name may be anything
        ({"kind": [2, 0, 1, 1]}, "kind", [2, 0, 1, 1], ("0", "1", "2")),
        ({"label": ["b", "a", None, "b"]}, None, None, ()),  # strings are labels only if named
        ({"label": ["b", "a", None, "b"]}, "label", [1, 0, -1, 1], ("a", "b")),
        ({"good": [True, False, True, True]}, "good", [1, 0, 1, 1], ("0", "1")),
        ({"label": [-1, -1, -1, -1]}, None, None, ()),  # a test split whose labels are withheld
        ({"label": [0, 0, 1, 1]}, "none", None, ()),
    ],
)
def test_labels(tmp_path, columns: dict, chosen: str | None, labels: list[int] | None, names: tuple[str, ...]):
    source = _open(_saved(tmp_path / "d", _table(**columns)), label_column=chosen)
    assert (None if source.labels is None else source.labels.tolist()) == labels
    assert source.class_names == names


def test_several_class_columns(tmp_path):
    classes = datasets.ClassLabel(names=["x", "y"])
    rows = _table(coarse=[0, 0, 1, 1], other=[0, 1, 1, 1]).cast_column("coarse", classes)
    rows = rows.cast_column("other", classes)
    two = _saved(tmp_path / "two", rows)
    with pytest.raises(ValueError, match=r"^data\.label_column=None: several columns hold classes.*: coarse, other$"):
        _open(two)
    usual = _saved(tmp_path / "usual", rows.rename_column("other", "fine_label"))
    labels = _open(usual).labels
    assert labels is not None
    assert labels.tolist() == [0, 1, 1, 1]


def test_labels_that_are_none(tmp_path):
    rows = _saved(tmp_path / "d", _table(score=[0.1, 0.2, 0.3, 0.4], number=[7, 8, 10**9, 9], odd=[-2, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"^data\.label_column='score': holds float64; .*'none'"):
        _open(rows, label_column="score")
    with pytest.raises(ValueError, match=r"^data\.label_column='number': row 2 holds 1000000000; .*'none'"):
        _open(rows, label_column="number")
    with pytest.raises(ValueError, match=r"^data\.label_column='odd': row 0 holds -2; "):
        _open(rows, label_column="odd")
    with pytest.raises(ValueError, match=r"^data\.label_column='scores': .*did you mean 'score'\? there are: image"):
        _open(rows, label_column="scores")


def test_images_are_decoded_with_the_channels_asked_for(tmp_path):
    _write(tmp_path / "0.png")
    source = _open(tmp_path)
    assert source.image(0, 1).shape == (1, 6, 8)
    assert source.image(0, 4).shape == (4, 6, 8)
    assert torch.equal(source.image(0, 3)[:, 0, 0], torch.tensor([0, 0, 255], dtype=torch.uint8))


def test_undecodable_image_names_source_row_and_path(tmp_path):
    _write(tmp_path / "a.png", tmp_path / "b.png")
    source = _open(tmp_path)
    (tmp_path / "b.png").write_text("<html>")
    with pytest.raises(ValueError, match=rf"^data\.source='{tmp_path}': row 1 \({tmp_path}/b\.png\): not an image"):
        source.image(1, 3)
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match=r"row 1 \(.*/b\.png\): .*No such file"):
        source.image(1, 3)


def test_row_without_an_image(tmp_path):
    rows = [{"bytes": _png(0), "path": None}, None, {"bytes": None, "path": None}]
    path = _parquet(tmp_path / "x.parquet", image=pa.array(rows))
    source = _open(path)
    for index in (1, 2):
        with pytest.raises(ValueError, match=rf"^data\.source='{path}': row {index}: the row holds no image"):
            source.image(index, 3)


def test_pages_are_counted_within_the_limit_that_is_set(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_IMAGE_BYTES", 10_000)
    for function in (formats.page_numbers, formats.contents):
        monkeypatch.setattr(function, "__defaults__", (10_000,))
    frames = [Image.effect_noise((120, 120), number + 9) for number in range(3)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert len(_open(tmp_path, pages="images", max_image_bytes=2**20)) == 3
    note = _open(tmp_path, max_image_bytes=2**20).note_of_dropped(3)
    assert note is not None
    assert "3 pages or frames" in note
    assert len(_open(tmp_path, pages="images", max_image_bytes=2**10)) == 1
