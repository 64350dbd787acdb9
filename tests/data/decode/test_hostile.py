"""What strangers hand over costs little, starts nothing, opens nothing else, and is at worst one bad image."""

import gzip
import io
import os
import socket
import struct
import subprocess
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_vit.data.config import DataConfig
from ssl_vit.data.decode import bounds, decode, headers
from ssl_vit.data.decode.bounds import read_file
from ssl_vit.data.decode.formats import IMAGE_SUFFIXES, PILLOW_FORMATS, contents, page_numbers
from ssl_vit.data.sources import tables
from ssl_vit.data.sources.parquet_builder import read_batches
from ssl_vit.data.sources.source import open_source
from ssl_vit.data.sources.stream import open_stream
from tests.data import hostile
from tests.data.broken import encoded, noise, npy, png, png_chunk
from tests.data.shards import numbered_png

MEMORY, SECONDS = 128, 20  # MiB and seconds that a file may cost; it costs none, but the machine may be busy
# What asks for nothing once it is looked at closely: it is decoded as if it had not asked.
HARMLESS = {
    "png of empty chunks",
    "png of exif in text",
    "apng of frames",
    "mpo of frames",
    "tiff of a tag of 4 GB",
    "tiff of pages in a circle",
}


def test_no_file_costs_more_than_it_is_worth(tmp_path: Path) -> None:
    """All in one process of its own, each with its time and its peak of memory."""
    files = hostile.files()
    found = hostile.measured(tmp_path, files, seconds=240)
    assert set(found) == set(files)
    for name, (seconds, mebibytes, outcome) in found.items():
        assert seconds < SECONDS, (name, seconds)
        assert mebibytes < MEMORY, (name, mebibytes)
        assert outcome.startswith("decoded" if name in HARMLESS else "refused"), (name, outcome)


def test_pages_are_counted_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "MAX_PAGES", 50)
    assert page_numbers(hostile.many_pages(50)) == list(range(50))
    assert page_numbers(hostile.many_pages(51)) == [0]
    with pytest.raises(ValueError, match="more than 50 pages"):
        decode.decode(hostile.many_pages(10_000), 1)


# Files


@pytest.fixture
def special(tmp_path: Path) -> dict[str, Path]:
    """Names of images that lead to what is no file of bytes."""
    names = {name: tmp_path / f"{name}.png" for name in ("fifo", "zero", "folder", "socket", "memory", "loop", "full")}
    os.mkfifo(names["fifo"])
    names["zero"].symlink_to("/dev/zero")
    names["full"].symlink_to("/dev/full")
    names["memory"].symlink_to("/proc/self/mem")
    names["folder"].mkdir()
    names["loop"].symlink_to(names["loop"])
    with socket.socket(socket.AF_UNIX) as opened:
        folder = os.getcwd()  # noqa: PTH109
        os.chdir(tmp_path)  # the name of a socket may not be long
        try:
            opened.bind("socket.png")
        finally:
            os.chdir(folder)
    return names | {"long": tmp_path / ("x" * 5000), "nothing": tmp_path / "a\0b.png"}


def test_only_regular_files_are_read(special: dict[str, Path]) -> None:
    for path in special.values():
        for read in (lambda path=path: decode.decode(path, 3), lambda path=path: contents(path)):
            with pytest.raises((ValueError, OSError), match=r"\w"):
                read()
        assert page_numbers(path) == [0]


def test_a_file_that_becomes_another_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(numbered_png(1))
    source = open_source(DataConfig(source=str(tmp_path)))
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    for read in (lambda: source.image(0, 3), lambda: source.encoded(0)):
        with pytest.raises((ValueError, OSError), match="regular file"):
            read()
    assert source.next_image(0, 3)[1] == 1


def test_a_file_is_read_up_to_a_bound_whatever_its_size_is_said_to_be(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "a").write_bytes(bytes(300_000))
    assert len(read_file(tmp_path / "a", 300_000)) == 300_000
    with pytest.raises(ValueError, match=r"the file holds more than data\.max_image_bytes=299999"):
        read_file(tmp_path / "a", 299_999)
    assert read_file(Path("/proc/self/status"), 10**6).startswith(b"Name:")  # of size 0
    with pytest.raises(ValueError, match=r"more than data.max_image_bytes=10$"):
        read_file(Path("/proc/self/status"), 10)
    with (tmp_path / "hole.png").open("wb") as file:
        file.truncate(2**40)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"more than data.max_image_bytes=1048576$"):
        decode.decode(tmp_path / "hole.png", 3, max_image_bytes=2**20)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("error", [RecursionError, MemoryError, OverflowError, zlib.error, struct.error, RuntimeError])
def test_whatever_an_image_raises_is_one_bad_image(tmp_path: Path, monkeypatch: Any, error: type[Exception]) -> None:
    for number in range(2):
        (tmp_path / f"{number}.bmp").write_bytes(encoded(noise(), "BMP"))
    (tmp_path / "2.png").write_bytes(numbered_png(1))
    source = open_source(DataConfig(source=str(tmp_path)))

    def fail(*_: object) -> None:
        raise error("told by a library")

    monkeypatch.setattr(decode, "_upright", fail)
    with pytest.raises(ValueError, match=r"^data.source=.*row 0 .*(told by a library|too little memory)"):
        source.image(0, 3)


# Formats


def _of_format(name: str) -> bytes | None:
    """A file of a format that is not read; None where Pillow does not write it."""
    made = {
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch was_run) (w) file\n",
        "WMF": struct.pack("<IHHHHHHI", 0x9AC6CDD7, 0, 0, 0, 9, 9, 1440, 0) + bytes(60),
        "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(12),
        "GBR": struct.pack(">5I", 28, 1, 9, 9, 1) + bytes(90),
        "XPM": b'/* XPM */\nstatic char *a[] = {"1 1 1 1", "a c #000000", "a"};',
        "MPEG": b"\0\0\1\xb3\x01\x00\x10\x00",
        "FITS": b"SIMPLE  =                    T".ljust(80) + b"BITPIX  = 8".ljust(80) + b"END".ljust(2720),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "BUFR": b"BUFR" + bytes(100),
        "GRIB": b"GRIB\0\0\0\1" + bytes(100),
        "FLI": struct.pack("<IHHHHHH", 200, 0xAF12, 1, 9, 9, 8, 3) + bytes(180),
        "CUR": b"\0\0\2\0\1\0" + bytes(16),
    }.get(name)
    for mode in ("RGB", "L", "1"):
        if made is None and name in Image.SAVE and name not in ("PDF", "PALM"):
            try:
                made = encoded(noise(mode), name)
            except Exception:
                continue
    return made


def test_formats_that_are_not_promised_start_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under every suffix that is read, and in every place that opens images."""
    started: list[object] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *call, **_: started.append(call) or pytest.fail("was started"))
    monkeypatch.setattr(os, "system", lambda *call: started.append(call))
    Image.init()
    others = {name: _of_format(name) for name in Image.OPEN if name not in PILLOW_FORMATS}
    known = {name: data for name, data in others.items() if data is not None}
    assert {"EPS", "WMF", "PSD", "ICO", "ICNS", "DDS", "SGI", "FITS", "MPEG", "XPM", "GRIB"} <= set(known)
    for number, (name, data) in enumerate(known.items()):
        for suffix in IMAGE_SUFFIXES[number % 3 :: 3]:
            (tmp_path / f"{name}.{suffix}").write_bytes(data)
    source = open_source(DataConfig(source=str(tmp_path)))
    for row in range(len(source)):
        with pytest.raises(ValueError, match=r"row \d+"):
            source.image(row, 3)
    for name, data in known.items():
        assert contents(data).channels == 0, name
        assert page_numbers(data) == [0], name
    assert started == []


# Tars


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
    import bz2
    import lzma

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
    with pytest.raises(ValueError, match=r"which is none of its own files, and no others are opened"):
        (open_stream if streaming else open_source)(DataConfig(source="me/mine", streaming=streaming))


# What was written before


def test_a_limit_of_pixels_becomes_one_of_bytes() -> None:
    assert DataConfig(max_pixels=178_956_970) == DataConfig()
    assert DataConfig(max_pixels=100).max_image_bytes == 302


# Any header


def _seeds() -> dict[str, bytes]:
    small = noise().resize((13, 11))
    palette, grey = small.convert("P"), small.convert("L")
    found = {name: encoded(small, name) for name in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF", "HEIF")}
    found |= {name: encoded(small, name) for name in ("PPM", "PCX", "QOI", "TGA") if name in Image.SAVE}
    found["GIF"] = encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(90)])
    found["progressive"] = encoded(small, "JPEG", progressive=True)
    found["animated"] = encoded(small, "WEBP", save_all=True, append_images=[small.rotate(90)], lossless=True)
    found["apng"] = encoded(small, "PNG", save_all=True, append_images=[small.rotate(90)])
    found["MPO"] = encoded(small, "MPO", save_all=True, append_images=[small])
    found["tiff of deflate"] = encoded(small, "TIFF", compression="tiff_adobe_deflate")
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, np.zeros((11, 13, 5), np.uint8), tile=(16, 16), photometric="minisblack", planarconfig="contig"
    )
    found["tiff of tiles"] = buffer.getvalue()
    lines = b"".join(b"\0" + bytes(range(13 * 6)) for _ in range(11))
    found["16 bits"] = png(13, 11, png_chunk(b"IDAT", zlib.compress(lines)), depth=16)
    found["npy"], found["npy of floats"] = npy(np.asarray(small)), npy(np.asarray(grey) / 255)
    found["sun"] = struct.pack(">8I", 0x59A66A95, 13, 11, 24, 0, 1, 0, 0) + bytes(40 * 11)
    return found


SEEDS = _seeds()
MOST = 2**22


@settings(derandomize=True, max_examples=150, deadline=None, database=None)
@given(
    st.sampled_from(sorted(SEEDS)),
    st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
    st.sampled_from([1, 3, 4, 5]),
    st.sampled_from(["first", "channels", 1]),
)
def test_any_header_is_decoded_within_the_bound_or_refused(
    name: str, changes: list[tuple[int, bytes]], channels: int, pages: Any
) -> None:
    data = bytearray(SEEDS[name])
    for place, new in changes:
        place %= min(len(data), 400)
        data[place : place + len(new)] = new
    contents(bytes(data))
    assert len(page_numbers(bytes(data))) <= bounds.MAX_PAGES
    try:
        image = decode.decode(bytes(data), channels, MOST, pages)
    except (ValueError, OSError):
        return
    assert image.dtype == torch.uint8
    assert image.shape[0] == channels
    assert image.numel() <= MOST


def test_the_seeds_are_sound() -> None:
    for name, data in SEEDS.items():
        channels = 5 if name == "tiff of tiles" else 3
        assert decode.decode(data, channels).shape == (channels, 11, 13), name
