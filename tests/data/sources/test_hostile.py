"""Tars and tables that strangers made cost little and open nothing else."""

import bz2
import gzip
import lzma
import os
import struct
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssl_vit.data.config import DataConfig
from ssl_vit.data.sources import tables
from ssl_vit.data.sources.parquet_builder import read_batches
from ssl_vit.data.sources.source import open_source
from ssl_vit.data.sources.stream import open_stream
from tests.data.shards import numbered_png


def _tar(path: Path, *headers: tuple[str, int, bytes, bytes], pack: Callable[[bytes], bytes] = bytes) -> str:
    """Members of a name, a size that the header tells, a type and a content; then a good image."""
    whole = b""
    for name, size, kind, content in [*headers, ("z.png", len(numbered_png(5)), tarfile.REGTYPE, numbered_png(5))]:
        info = tarfile.TarInfo(name)
        info.size, info.type = size, kind
        whole += info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)
    path.write_bytes(pack(whole + bytes(1024)))
    return str(path)


def _stream(path: str, **more: Any) -> Any:
    return open_stream(DataConfig(source=path, streaming=True, **more))


def test_a_member_that_claims_too_much_is_not_read(tmp_path: Path) -> None:
    holes = struct.pack("12s12s", b"%011o" % (7 * 2**30 - 512), b"%011o" % 512) + bytes(72)
    info = tarfile.TarInfo("a.png")
    info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:482] = holes
    header[483:495] = b"%011o\0" % (7 * 2**30)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    good = tarfile.TarInfo("b.png")
    good.size = len(numbered_png(5))
    body = bytes(header) + bytes(512) + good.tobuf() + numbered_png(5) + bytes(-good.size % 512) + bytes(1024)
    (tmp_path / "x.tar").write_bytes(body)
    stream = _stream(str(tmp_path / "x.tar"))
    (_, sparse), (_, found) = stream.read(0)
    assert (sparse["bytes"], found["bytes"]) == (None, numbered_png(5))
    with pytest.raises(ValueError, match=r"row 0 \(a.png\): a sparse member of a tar, which is not read"):
        stream.decode(0, 0, sparse, 3)
    large = _tar(tmp_path / "y.tar", ("a.png", 5000, tarfile.REGTYPE, bytes(5000)))
    stream = _stream(large, max_image_bytes=4999)
    (_, first), _ = stream.read(0)
    with pytest.raises(ValueError, match=r"row 0 \(a.png\): holds 5,000 bytes, more than data.max_image_bytes=4999"):
        stream.decode(0, 0, first, 3)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE])
def test_headers_have_a_bound(tmp_path: Path, kind: bytes) -> None:
    path = _tar(tmp_path / "x.tar", ("././@Long", 2**34, kind, bytes(512)))
    with pytest.raises(ValueError, match=r"x.tar is not a tar file, or is empty or damaged: a header of 17,179,869,"):
        _stream(path)


def test_headers_that_lead_back_or_on_for_ever_end(tmp_path: Path) -> None:
    back = _tar(tmp_path / "x.tar", ("a.png", -1024, tarfile.REGTYPE, b""))
    on = _tar(tmp_path / "y.tar", *[("././@Long", 3, tarfile.GNUTYPE_LONGNAME, b"a\0\0")] * 3000)
    for path in (back, on):
        with pytest.raises(ValueError, match="is not a tar file, or is empty or damaged"):
            _stream(path)


def test_a_name_is_no_riddle(tmp_path: Path) -> None:
    """What of it is before the first dot would be looked for a million times a million."""
    name = b"a/" * 300_000
    path = _tar(tmp_path / "x.tar", ("././@Long", len(name), tarfile.GNUTYPE_LONGNAME, name), ("b", 0, b"0", b""))
    start = time.perf_counter()
    assert _stream(path).num_samples == 1
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", ["gz", "bz2", "xz"])
def test_a_compressed_tar_inflates_up_to_a_bound(tmp_path: Path, name: str) -> None:
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[name]
    assert _stream(_tar(tmp_path / "good.tar", pack=pack)).num_samples == 1
    size = 2**24
    path = _tar(tmp_path / "x.tar", ("a.txt", size, tarfile.REGTYPE, bytes(size)), pack=pack)
    with pytest.raises(ValueError, match="inflates to more than 100 times its size"):
        _stream(path)


# Tables


def test_a_value_that_stands_in_a_file_once_is_not_read_a_thousand_times(tmp_path: Path) -> None:
    values = pa.array([bytes(2**20)] * 200)
    pq.write_table(
        pa.table({"image": values}), tmp_path / "x.parquet", compression="zstd", dictionary_pagesize_limit=2**30
    )
    assert (tmp_path / "x.parquet").stat().st_size < 10_000
    with pq.ParquetFile(tmp_path / "x.parquet") as file:
        sizes = [len(batch) for batch in read_batches(file, 32, most=2**22)]
        assert (max(sizes), sum(sizes)) == (3, 200)
        assert sum(len(batch) for batch in read_batches(file, 32, most=2**30, start=150)) == 50
        assert [len(batch) for batch in read_batches(file, 32, most=100, start=198)] == [1, 1]
    pq.write_table(pa.table({"image": values}), tmp_path / "y.parquet", use_dictionary=False)
    with pq.ParquetFile(tmp_path / "y.parquet") as file:
        assert max(len(batch) for batch in read_batches(file, 32, most=2**22)) == 32


def test_what_is_no_file_is_no_table(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.parquet")
    os.mkfifo(tmp_path / "x.tar")
    for name, streaming in (("x.parquet", False), ("x.parquet", True), ("x.tar", True)):
        with pytest.raises(ValueError, match=r"is not a regular file"):
            (_stream if streaming else lambda path: open_source(DataConfig(source=path)))(str(tmp_path / name))


def _saved(folder: Path) -> Path:
    datasets.Dataset.from_dict({"image": [{"bytes": numbered_png(1), "path": None}]}).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize(
    "name", ["../other/data-00000-of-00001.arrow", "/dev/zero", "pipe.arrow", "missing.arrow", ".."]
)
def test_a_saved_folder_is_made_of_its_own_files(tmp_path: Path, name: str) -> None:
    _saved(tmp_path / "other")
    folder = _saved(tmp_path / "saved")
    os.mkfifo(folder / "pipe.arrow")
    state = (folder / "state.json").read_text()
    (folder / "state.json").write_text(state.replace("data-00000-of-00001.arrow", name))
    with pytest.raises(ValueError, match=r"which is no file of this folder"):
        open_source(DataConfig(source=str(folder)))


def test_places_outside_a_table_are_not_read(tmp_path: Path) -> None:
    """Arrow believes what a file says of where values begin and end."""
    folder = _saved(tmp_path / "saved")
    rows = pa.table({"image": pa.array(["abcd" * 4, "efgh" * 4])})
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, rows.schema) as out,
    ):
        out.write_table(rows)
    data = (folder / "data-00000-of-00001.arrow").read_bytes()
    offsets = struct.pack("<3i", 0, 16, 32)
    assert data.count(offsets) == 1
    (folder / "data-00000-of-00001.arrow").write_bytes(data.replace(offsets, struct.pack("<3i", 0, 16, 2**30)))
    (folder / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"empty or incomplete"):
        open_source(DataConfig(source=str(folder)))


@pytest.mark.parametrize(
    "address",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1:9/x.parquet",
        "reference://::http://127.0.0.1:9/x.json",
        "hf://datasets/me/mine@1/a::reference://x",
        "hf://datasets/me/mine@1/../../you/theirs/x.parquet",
        "HF://datasets/me/mine@1/x.parquet",
        "hf://datasets/me/mine2@1/x.parquet",
        "memory://x.parquet",
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_the_hub_names_its_own_files_alone(address: str, streaming: bool, monkeypatch: Any) -> None:
    named = {"train": ["hf://datasets/me/mine@1/0.parquet", address]}
    builder = SimpleNamespace(config=SimpleNamespace(data_files=named))  # of which nothing else may be used
    monkeypatch.setattr(tables, "check_hub", lambda config: "me/mine")
    monkeypatch.setattr("ssl_vit.data.sources.stream.check_hub", lambda config: "me/mine")
    monkeypatch.setattr(tables, "check_cache", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)
    with pytest.raises(ValueError, match=r"which is no file of its repository, and no others are opened"):
        (open_stream if streaming else open_source)(DataConfig(source="me/mine", streaming=streaming))
