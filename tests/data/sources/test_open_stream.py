"""What can be streamed, what is refused, and what a stream knows before it is read."""

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssl_vit.data.config import DataConfig
from ssl_vit.data.sources.source import open_source
from ssl_vit.data.sources.stream import open_stream
from tests.data.shards import number_of, numbered_png, write_parquet, write_tars


def config(source: str, **settings: Any) -> DataConfig:
    return DataConfig(source=source, streaming=True, **{"shuffle_buffer": 40, **settings})


def test_what_a_stream_tells_of_itself(tmp_path: Path) -> None:
    stream = open_stream(config(write_tars(tmp_path, [3, 4])))
    assert stream.num_samples == 7
    assert stream.counts is not None
    assert stream.counts.tolist() == [3, 4]
    row, stored = next(stream.read(1, 2))
    assert (row, stored["path"]) == (2, "deep/0005.png")
    assert number_of(stream.decode(1, row, stored, 3)) == 5
    assert [number_of(image) for image in stream.first_images(2, 3)] == [0, 1]


def test_members_that_datasets_passes_over_are_not_counted(tmp_path: Path) -> None:
    write_tars(tmp_path, [3])
    with tarfile.open(tmp_path / "part-00.tar", "a") as tar:
        for name in (".hidden.png", "__macosx.png", "readme"):
            tar.addfile(tarfile.TarInfo(name))
        folder = tarfile.TarInfo("folder.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    stream = open_stream(config(str(tmp_path / "part-00.tar")))
    assert stream.num_samples == len(list(stream.read(0))) == 3


def test_names_that_look_like_patterns_are_read(tmp_path: Path) -> None:
    write_parquet(tmp_path, [3])
    (tmp_path / "part-00.parquet").rename(tmp_path / "a[0].parquet")
    assert open_stream(config(str(tmp_path / "a[0].parquet"))).num_samples == 3


def test_plain_bytes_are_images_as_elsewhere(tmp_path: Path) -> None:
    pq.write_table(pa.table({"data": [numbered_png(3), None], "id": [1, 2]}), tmp_path / "a.parquet")
    stream = open_stream(config(str(tmp_path / "a.parquet")))
    (_, first), (_, second) = stream.read(0)
    assert number_of(stream.decode(0, 0, first, 3)) == 3
    with pytest.raises(ValueError, match="row 1: the row holds no image"):
        stream.decode(0, 1, second, 3)


@pytest.mark.parametrize(("suffix", "mode"), [("tar.gz", "gz"), ("tgz", "gz"), ("TAR.BZ2", "bz2"), ("tar.xz", "xz")])
def test_compressed_tars_have_their_usual_names(tmp_path: Path, suffix: str, mode: str) -> None:
    with tarfile.open(tmp_path / f"a.{suffix}", f"w:{mode}") as tar:
        info = tarfile.TarInfo("0.png")
        info.size = len(numbered_png(300))
        tar.addfile(info, io.BytesIO(numbered_png(300)))
    stream = open_stream(config(str(tmp_path / f"a.{suffix}")))
    assert [number_of(stream.decode(0, *read, 3)) for read in stream.read(0)] == [300]


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("missing.tar", {}, "data.source='missing.tar': no such file or folder"),
        ("FOLDER/none-*.tar", {}, "no file matches this pattern"),
        ("FOLDER/fake.tar", {}, "fake.tar is not a tar file, or is empty or damaged"),
        ("FOLDER/empty.tar", {}, "data.source='FOLDER/empty.tar': "),
        ("FOLDER/words.tar", {}, "no sample holds an image; there are: cls"),
        ("FOLDER/packed.tar", {}, "packed.tar is not a tar file, or is empty or damaged"),
        ("FOLDER/fake.parquet", {}, "fake.parquet is not a readable parquet file"),
        ("FOLDER", {}, "data.streaming=True: the images of a folder are read one by one anyway; leave this setting"),
        ("openmoji", {}, "data.streaming=True: the built-in source is read one by one anyway"),
        ("", {}, "data.source='': name the images"),
        ("FOLDER/good.tar", {"split": "train[:10%]"}, "data.split='train[:10%]': streamed files are the split 'train'"),
        (
            "FOLDER/good.tar",
            {"image_column": "jpg"},
            "data.image_column='jpg': the tars have no members of this kind; ",
        ),
        ("FOLDER/good.tar", {"label_column": "klass"}, "data.label_column='klass': the tars have no members of this"),
        ("FOLDER/good.parquet", {"num_samples": 9}, "data.num_samples=9: the files hold 2 rows; leave this"),
    ],
)
def test_what_cannot_be_streamed_is_refused_in_one_line(
    tmp_path: Path, source: str, settings: dict, message: str
) -> None:
    for name in ("fake.tar", "fake.parquet"):
        (tmp_path / name).write_bytes(b"neither" * 300)
    tarfile.open(tmp_path / "empty.tar", "w").close()
    write_tars(tmp_path, [2], members=("cls",))
    (tmp_path / "part-00.tar").rename(tmp_path / "words.tar")
    write_tars(tmp_path, [2])
    (tmp_path / "part-00.tar").rename(tmp_path / "good.tar")
    write_parquet(tmp_path, [2])
    (tmp_path / "part-00.parquet").rename(tmp_path / "good.parquet")
    (tmp_path / "packed.tar").write_bytes(gzip.compress((tmp_path / "good.tar").read_bytes())[:900])
    with pytest.raises(ValueError, match=r"^data\.") as caught:
        open_stream(config(source.replace("FOLDER", str(tmp_path)), **settings))
    assert message.replace("FOLDER", str(tmp_path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_needs_images_in_any_order_says_so(tmp_path: Path) -> None:
    pattern = write_tars(tmp_path, [2])
    with pytest.raises(
        ValueError, match=r"^data.source='.*': .* WebDataset tars are streamed; give --data.streaming true"
    ):
        open_source(DataConfig(source=pattern))
    with pytest.raises(ValueError, match=r"for its tar files, give --data.streaming true and a quoted glob: '.*.tar'"):
        open_source(DataConfig(source=str(tmp_path)))
    with pytest.raises(ValueError, match=r"^data.streaming=True: images are needed here in any order"):
        open_source(config(pattern))
    with pytest.raises(ValueError, match=r"^streaming=True: a mixture is not streamed \({a: 1, b: 1}\)"):
        DataConfig(source={"a": 1.0, "b": 1.0}, streaming=True)
    with pytest.raises(ValueError, match=r"^num_samples=3: only streamed sources need it"):
        DataConfig(source="a", num_samples=3)
