import os
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssl_vit.data.bad_images import _find_problem
from ssl_vit.data.config import DataConfig
from ssl_vit.data.sources.source import open_source
from ssl_vit.data.sources.stored import find_stored
from ssl_vit.data.sources.stream import open_stream
from ssl_vit.doctor.images import read_images
from tests.data.shards import number_of, numbered_png


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Paths by what they are, seen from a parquet file in the folder `own`."""
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own / "deep", other):
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(numbered_png(1))
    (own / "to_other.png").symlink_to(other / "1.png")
    (own / "to_folder").symlink_to(other)
    (own / "to_deep.png").symlink_to(own / "deep" / "1.png")
    (own / "loop.png").symlink_to(own / "loop.png")
    os.mkfifo(own / "pipe.png")
    return {
        "relative": "deep/1.png",
        "absolute": str(own / "deep/1.png"),
        "link inside": "to_deep.png",
        "up and down": "deep/../deep/1.png",
        "outside": str(other / "1.png"),
        "up": "../other/1.png",
        "link outside": "to_other.png",
        "folder outside": "to_folder/1.png",
        "device": "/dev/zero",
        "beside": str(own) + "er/1.png",
        "loop": "loop.png",
        "pipe": "pipe.png",
        "folder": "deep",
        "missing": "deep/2.png",
        "http": "http://127.0.0.1:9/1.png",
        "file": f"file://{own}/deep/1.png",
        "hop": f"simplecache::file://{own}/deep/1.png",
        "empty": "",
    }


GOOD = ("relative", "absolute", "link inside", "up and down")
OUTSIDE = ("outside", "up", "link outside", "folder outside")


def write(folder: Path, places: dict[str, str]) -> str:
    images = [{"bytes": None, "path": path} for path in places.values()]
    pq.write_table(pa.table({"image": images}), folder / "own" / "x.parquet")
    return str(folder / "own" / "x.parquet")


@pytest.mark.parametrize("allowed", [False, True])
def test_rows_open_what_lies_below_their_source_s_folder(
    tmp_path: Path, places: dict[str, str], allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Map-style, streamed and in doctor alike, wherever one stands."""
    monkeypatch.chdir(tmp_path)
    source = open_source(DataConfig(source=write(tmp_path, places), allow_outside_paths=allowed))
    stream = open_stream(DataConfig(source=source.name, streaming=True, allow_outside_paths=allowed))
    good = GOOD + OUTSIDE * allowed
    for row, ((what, _), (_, stored)) in enumerate(zip(places.items(), stream.read(0), strict=True)):
        if what in good:
            assert number_of(source.image(row, 3)) == number_of(stream.decode(0, row, stored, 3)) == 1, what
        else:
            for decode in (lambda r=row: source.image(r, 3), lambda r=row, s=stored: stream.decode(0, r, s, 3)):
                with pytest.raises(ValueError, match=rf"^data.source='.*': .*row {row}") as caught:
                    decode()
                assert ("allow_outside_paths" in str(caught.value)) == (
                    not allowed and what in (*OUTSIDE, "device", "beside")
                ), what
                assert ("addresses in rows are not opened" in str(caught.value)) == (what in ("http", "file", "hop"))
        assert (_find_problem(source, row, 3) is None) == (what in good)
    found = read_images(source, np.arange(len(source)), 3)
    assert found.num_readable == len(good)


def test_folders_that_were_walked_and_bytes_are_free(tmp_path: Path, places: dict[str, str]) -> None:
    assert len(open_source(DataConfig(source=str(tmp_path / "own")))) >= 3
    assert [number_of(open_source(DataConfig(source=str(tmp_path / "own"))).image(row, 3)) for row in range(3)] == [
        1,
        1,
        1,
    ]
    assert find_stored({"bytes": b"", "path": "/etc/passwd"}, ("/own",)) == b""
    for stored in (None, {}, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match="the row holds no image"):
            find_stored(stored, ())


def test_each_source_of_a_mixture_has_its_own_folder(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(numbered_png(number))
        images = [{"bytes": None, "path": path} for path in ("0.png", str(tmp_path / "a/0.png"))]
        pq.write_table(pa.table({"image": images}), tmp_path / name / "x.parquet")
    source = open_source(DataConfig(source={f"{tmp_path}/{name}/x.parquet": 1.0 for name in ("b", "a")}))
    part = source.subset(np.array([3, 2, 0, 1]))
    assert [number_of(part.image(row, 3)) for row in range(3)] == [0, 0, 1]
    with pytest.raises(ValueError, match=r"b/x.parquet': row 0 .*a/0.png lies outside|lies outside .*/b, "):
        part.image(3, 3)


def test_saved_folders_name_the_flag(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/3.png").write_bytes(numbered_png(3))
    rows = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(tmp_path / "photos/3.png")}]})
    rows.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"--data.allow_outside_paths true"):
        open_source(DataConfig(source=str(tmp_path / "saved"))).image(0, 3)
    opened = open_source(DataConfig(source=str(tmp_path / "saved"), allow_outside_paths=True))
    assert number_of(opened.image(0, 3)) == 3


def test_a_stream_of_the_hub_opens_files_of_its_repository_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def stand_in(path: str, mode: str) -> Any:
        asked.append(path)
        return fsspec.filesystem("memory").open("/9.png", "rb")

    with fsspec.open("memory://9.png", "wb") as file:
        file.write(b"image")
    monkeypatch.setattr("ssl_vit.data.sources.stored.fsspec.open", stand_in)
    roots = ("hf://datasets/me/mine",)
    path = "hf://datasets/me/mine@main/train/9.png"
    assert find_stored({"bytes": None, "path": path}, roots) == b"image"
    for other in (
        "hf://datasets/me/mine2/9.png",
        "hf://datasets/me/mine@main/../../you/9.png",
        "zip://9.png::hf://datasets/me/mine@main/x.zip",
        "/etc/passwd",
        "http://me/9.png",
    ):
        with pytest.raises(ValueError, match="none of hf://datasets/me/mine, and no other is opened"):
            find_stored({"bytes": None, "path": other}, roots)
    assert asked == [path]
