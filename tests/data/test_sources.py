import io
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ssl_vit.data import sources, tables
from ssl_vit.data.sources import DataConfig, open_source


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` converts out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def _picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


def _write(*paths: Path) -> None:
    """Pictures whose red value is their position in the list."""
    for value, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_picture(value))


def _open(source: str | Path, **settings: object) -> sources.Source:
    return open_source(DataConfig(source=str(source), **settings))


def _table(values: range = range(4), **columns: object) -> datasets.Dataset:
    """Pictures of these red values with further columns."""
    pictures = [{"bytes": _picture(value), "path": None} for value in values]
    return datasets.Dataset.from_dict({"image": pictures, **columns}).cast_column("image", datasets.Image())


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


def test_folder_without_classes(tmp_path):
    _write(tmp_path / "a.PNG", tmp_path / "b/c/d.jpeg", tmp_path / "b/e.Webp", tmp_path / "z.tif")
    _write(tmp_path / ".hidden.png", tmp_path / ".thumbnails/a.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "png").write_text("no image either")
    source = _open(tmp_path)
    assert len(source) == 4
    assert _reds(source) == [0, 1, 2, 3]  # in the order of their paths
    assert (source.labels, source.class_names, source.groups, source.attribution) == (None, (), None, None)
    assert source.rows[1] == {"image": {"bytes": None, "path": str(tmp_path / "b/c/d.jpeg")}}


def test_arrays_are_found_in_folders_and_the_limit_of_bytes_holds(tmp_path):
    _write(tmp_path / "a.png", tmp_path / "c.tif")
    np.save(tmp_path / "b.npy", np.full((3, 6, 8), 1 / 255, dtype=np.float32))
    assert _reds(_open(tmp_path)) == [0, 1, 1]
    np.save(tmp_path / "b.npy", np.zeros((7, 8), dtype=np.uint8))
    np.save(tmp_path / "b.npy", np.zeros((70, 80), dtype=np.uint8))
    limited = _open(tmp_path, max_image_bytes=5599).subset(np.arange(2))
    assert limited.image(0, 3).shape == (3, 6, 8)
    with pytest.raises(ValueError, match=r"row 1 \(.*b.npy\): the file holds more than data.max_"):
        limited.image(1, 3)


def test_first_level_folders_are_classes(tmp_path):
    _write(tmp_path / "cat/deep/1.png", tmp_path / "cat/2.png", tmp_path / "dog/1.png")
    source = _open(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1]
    assert source.labels.dtype == np.int64
    ignored = _open(tmp_path, label_column="none")
    assert (ignored.labels, ignored.class_names) == (None, ())


def test_one_folder_or_a_stray_image_means_no_classes(tmp_path):
    _write(tmp_path / "cat/1.png")
    assert _open(tmp_path).labels is None
    _write(tmp_path / "dog/1.png", tmp_path / "stray.png")
    assert _open(tmp_path).labels is None


def _split_folder(root: Path) -> Path:
    _write(*(root / f"Train/{name}/{number}.png" for name in ("cat", "dog") for number in range(3)))
    _write(*(root / f"valid/{name}/x.png" for name in ("cat", "dog")))
    return root


@pytest.mark.parametrize(
    ("split", "count", "classes"),
    [
        ("train", 6, ("cat", "dog")),
        ("Train", 6, ("cat", "dog")),
        ("valid", 2, ("cat", "dog")),
        ("validation", 2, ("cat", "dog")),
        ("all", 8, ("cat", "dog")),
        ("none", 8, ("Train", "valid")),
    ],
)
def test_folders_named_as_splits_are_splits(tmp_path, split: str, count: int, classes: tuple[str, ...]):
    source = _open(_split_folder(tmp_path), split=split)
    assert (len(source), source.class_names) == (count, classes)
    assert f"classes are the folders {', '.join(classes)}" in source.notes
    if split == "train":
        assert source.root == f"{tmp_path}/Train/"
        assert "splits are the folders Train, valid; images of Train are used" in source.notes[0]
        assert "--evaluation.test_split valid" in source.notes[0]


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    _split_folder(tmp_path)
    with pytest.raises(ValueError, match=r"^data\.split='test': no such split; .*there are: Train, valid; 'all'"):
        _open(tmp_path, split="test")
    _write(tmp_path / "training/cat/9.png")
    assert len(_open(tmp_path, split="train")) == 6  # the one of this very name
    (tmp_path / "Train").rename(tmp_path / "trainings")
    (tmp_path / "valid").rename(tmp_path / "val")
    _write(tmp_path / "DEV/0.png")
    with pytest.raises(ValueError, match=r"^data\.split='validation': may be DEV or val; "):
        _open(tmp_path, split="validation")


@pytest.mark.parametrize(
    ("names", "are_splits"),
    [
        (("train2017", "val2017"), True),
        (("Train_Images", "test-set"), True),
        (("training data", "VALIDATION"), True),
        (("tested", "trains"), False),
        (("train1", "train2"), False),
        (("devices", "evaluators"), False),
    ],
)
def test_splits_by_other_names(tmp_path, names, are_splits):
    _write(*(tmp_path / name / kind / "0.png" for name in names for kind in ("cat", "dog")))
    assert _open(tmp_path).class_names == (("cat", "dog") if are_splits else names)


def test_folders_beside_splits_are_splits_and_a_class_named_as_one_is_a_class(tmp_path):
    _write(tmp_path / "a/train/0.png", tmp_path / "a/test/0.png", tmp_path / "a/unlabelled/0.png", tmp_path / "a/x.png")
    source = _open(tmp_path / "a")
    assert (len(source), source.class_names) == (1, ())
    assert "1 image beside the splits, such as x.png, left out" in source.notes
    assert len(_open(tmp_path / "a", split="unlabelled")) == 1
    _write(*(tmp_path / "b" / name / "0.png" for name in ("train", "bus", "tram")))
    vehicles = _open(tmp_path / "b")
    assert vehicles.class_names == ("bus", "train", "tram")
    assert "'train' is taken for a class, since the folders beside it are no splits" in vehicles.notes
    # Folders without images decide nothing.
    (tmp_path / "b/val").mkdir()
    assert _open(tmp_path / "b").class_names == vehicles.class_names


def test_splits_in_a_mixture(tmp_path):
    _split_folder(tmp_path / "a")
    _write(tmp_path / "b/0.png")
    weights = {str(tmp_path / "a"): 1.0, str(tmp_path / "b"): 1.0}
    assert len(open_source(DataConfig(source=weights))) == 7
    assert len(open_source(DataConfig(source=weights, split="val"))) == 3


def test_folders_and_files_of_the_system_are_none_of_the_images(tmp_path):
    _write(tmp_path / "cat/0.png", tmp_path / "dog/0.png", tmp_path / "@eaDir/0.png", tmp_path / "cat/@eaDir/0.png")
    _write(tmp_path / "__MACOSX/cat/0.png", tmp_path / "$Recycle.Bin/0.png", tmp_path / "lost+found/0.png")
    _write(tmp_path / "dog/.ipynb_checkpoints/0-checkpoint.png", tmp_path / "System Volume Information/0.png")
    (tmp_path / "cat/Thumbs.db").touch()
    source = _open(tmp_path)
    assert (len(source), source.class_names) == (2, ("cat", "dog"))
    assert source.notes[1:] == (
        "left out, folders of the system: $Recycle.Bin, @eaDir, System Volume Information and 3 more",
    )


def test_files_left_aside_are_counted_by_suffix(tmp_path):
    _write(tmp_path / "a.png", tmp_path / "b.v2/c.PnG", tmp_path / ".hidden.xmp")
    for name in ("1.MOV", "2.mov", "b.v2/3.mov", "4.nef", "5.nef", "README", "b.v2/name", "6.a rather long ending"):
        (tmp_path / name).touch()
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    notes = _open(tmp_path).notes
    assert (
        "8 files left aside, by suffix: 3 mov, 3 without a suffix, 2 nef (a camera's raw files: convert them)" in notes
    )
    assert "1 link left aside that leads to no file" in notes
    for number in range(20):
        (tmp_path / f"x.{number}").touch()
    assert "1 13, 1 14 and 13 others" in _open(tmp_path).notes[0]
    (tmp_path / "b.v2/c.PnG").unlink()
    with pytest.raises(ValueError, match=r"no images .*; 2 files left aside, by suffix: 1 mov, 1 without"):
        _open(tmp_path / "b.v2")


def test_classes_are_named_up_to_ten(tmp_path):
    _write(*(tmp_path / f"{number:02d}/0.png" for number in range(13)))
    assert _open(tmp_path).notes == ("classes are the folders 00, 01, 02, 03, 04, 05, 06, 07, 08, 09 and 3 more",)


def test_why_there_are_no_labels(tmp_path):
    _write(tmp_path / "photos/cat/0.png", tmp_path / "photos/dog/0.png")
    assert f"all images lie in one folder, {tmp_path}/photos; name that one" in _open(tmp_path).unlabelled
    assert "images lie in" in _open(tmp_path / "photos/cat").unlabelled
    assert _open(tmp_path / "photos").unlabelled == ""
    _write(tmp_path / "photos/sheet.png")
    source = _open(tmp_path / "photos")
    assert source.unlabelled.startswith("1 image, such as sheet.png, lies beside the folders of ")
    assert source.notes == (f"no classes: {source.unlabelled}",)


def test_classes_are_the_same_however_their_letters_are_composed(tmp_path):
    _write(tmp_path / "a/caf\u00e9/0.png", tmp_path / "a/cafe\u0301/1.png", tmp_path / "a/bar/0.png")
    assert _open(tmp_path / "a").class_names == ("bar", "caf\u00e9")
    rows = _table(range(2), label=["cafe\u0301", "pub"])
    saved = _saved(tmp_path / "saved", rows.cast_column("label", datasets.ClassLabel(names=["cafe\u0301", "pub"])))
    mixed = open_source(DataConfig(source={str(tmp_path / "a"): 1.0, saved: 1.0}))
    assert mixed.class_names == ("bar", "caf\u00e9", "pub")
    assert mixed.labels is not None
    assert mixed.labels.tolist() == [0, 1, 1, 1, 2]


def test_names_that_are_not_utf_8_are_read(tmp_path):
    folder = tmp_path / os.fsdecode(b"f\xf6to")
    _write(folder / "a.png", folder / os.fsdecode(b"z\xfc\\1.png"))
    source = _open(folder)
    assert _reds(source) == [0, 1]
    assert source.where(1) == f"data.source={source.name!r}: row 1 ({tmp_path}/f\\xf6to/z\\xfc\\x5c1.png)"
    assert _reds(_open(source.name)) == [0, 1]  # as config.yaml has it
    _write(folder / r"z\xfc\x5c1.png")
    with pytest.raises(ValueError, match=r"^data\.source=.*: is no UTF-8 and like the name of another file"):
        _open(folder)


NAMES = [
    "a[1]",
    "[!a]*?",
    "{a}",
    "{a: b}",
    "a::b",
    "hf:",
    "a#b?c%20",
    "-a",
    "~",
    "~nobody",
    "train[:10%]",
    "a\\b",
    "a\nb",
    " ",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_exists_is_a_path(tmp_path, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path)
    _write(*(Path(name) / kind / f"{name}.png" for kind in ("cat", "dog")))
    assert _reds(_open(name)) == [0, 1]
    assert _open(name).rows[0]["image"]["path"] == f"{name}/cat/{name}.png"
    assert len(open_source(DataConfig(source={name: 1.0, f"{name}/cat": 1.0}))) == 3


def test_links_are_followed_but_not_in_circles(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    _write(outside / "0.png", outside / "folder/1.png")
    (root / "sub").mkdir(parents=True)
    (root / "a.png").symlink_to(outside / "0.png")
    (root / "b").symlink_to(outside / "folder")
    (root / "sub/up").symlink_to(root)
    (root / "broken.png").symlink_to(tmp_path / "absent.png")
    (root / "itself.png").symlink_to(root / "itself.png")
    assert _reds(_open(root)) == [0, 1]


def test_relative_and_home_paths(tmp_path, monkeypatch):
    _write(tmp_path / "photos/0.png")
    monkeypatch.chdir(tmp_path)
    assert len(_open("photos")) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(_open("~/photos")) == 1


def test_folder_without_images_says_what_was_looked_for(tmp_path):
    with pytest.raises(
        ValueError, match=rf"^data\.source='{tmp_path}': no images .*looked for .*jpg jpeg png"
    ) as error:
        _open(tmp_path)
    assert "parquet" not in str(error.value)
    _parquet(tmp_path / "part.parquet", image=[_picture(0)])
    with pytest.raises(ValueError, match=r"give a quoted glob: '.*/\*\*/\*\.parquet'"):
        _open(tmp_path)


@pytest.mark.parametrize("setting", ["split", "image_column", "label_column"])
def test_folder_refuses_settings_without_effect(tmp_path, setting: str):
    _write(tmp_path / "0.png")
    with pytest.raises(ValueError, match=rf"^data\.{setting}='x': "):
        open_source(DataConfig(**{"source": str(tmp_path), setting: "x"}))


def test_unreadable_folder(tmp_path, monkeypatch):
    _write(tmp_path / "locked/0.png")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"^data\.source='.*': cannot be read: .*Permission denied: .*locked"):
        _open(tmp_path)


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
        "struct": pa.array([{"bytes": _picture(value), "path": f"{value}.png"} for value in range(3)]),
        "bytes only": pa.array([{"bytes": _picture(value)} for value in range(3)]),
        "binary": pa.array([_picture(value) for value in range(3)], pa.binary()),
        "large binary": pa.array([_picture(value) for value in range(3)], pa.large_binary()),
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
    good = _parquet(tmp_path / "good.parquet", image=[_picture(0)])
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
    rows = [{"bytes": _picture(0), "path": None}, None, {"bytes": None, "path": None}]
    path = _parquet(tmp_path / "x.parquet", image=pa.array(rows))
    source = _open(path)
    for index in (1, 2):
        with pytest.raises(ValueError, match=rf"^data\.source='{path}': row {index}: the row holds no image"):
            source.image(index, 3)
