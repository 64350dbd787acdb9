"""Folders of images: which files are images, and which folders are splits or classes."""

import os
from pathlib import Path

import datasets
import numpy as np
import pytest

from ssl_vit.data.sources.source import DataConfig, open_source
from tests.data.sources.test_source import _open, _parquet, _png, _reds, _saved, _table, _write


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
    assert source.notes == (f"no classes: {source.unlabelled.partition('; classes are')[0]}",)


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
    _parquet(tmp_path / "part.parquet", image=[_png(0)])
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
