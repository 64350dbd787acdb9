"""What strangers hand over costs little, starts nothing, opens nothing else, and is at worst one bad image."""

import io
import os
import socket
import struct
import subprocess
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
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
from ssl_vit.data.sources.source import open_source
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
