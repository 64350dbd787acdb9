"""Limits the memory of an image, by its header, before any decoder sees it."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_vit.core.reading import read_bytes

MAX_IMAGE_BYTES = 2**29
"""An RGB image of 178,956,970 pixels, twice as many as Pillow warns of."""
MAX_SCANS = 100  # of a progressive JPEG, each of which goes over all pixels; encoders write about ten
MAX_PAGES = 2**15
_MAX_STRIPS = 2**22
_WEBP = 16  # bytes a pixel: two canvases of its decoder, the frame, and the image
# Bytes a pixel that decoders take beside the image: planes of colour, their conversion, frames before this one.
_WORK = {"AVIF": 12, "HEIF": 12, "GIF": 4}
# Bytes a pixel in Pillow, where they are not 4; inks count twice, since they become RGB.
_MODES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2, "CMYK": 8, "LAB": 8}
_UNITS = np.array([0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8])  # bytes of TIFF's types


def read_file(path: Path, most: int) -> bytes:
    """Read a regular file, following links, up to `most` bytes, whatever size its folder entry gives.

    Raises:
        ValueError: the file holds more; the text gives the reason only.
        OSError: it is no regular file, or cannot be read.
    """
    try:
        return read_bytes(path, most, links=True)
    except ValueError as error:
        raise ValueError(f"the file holds more than data.max_image_bytes={most}") from error


def check_size(height: int, width: int, bytes_a_pixel: int, most: int) -> None:
    """Refuse an image without pixels, or of more than `most` bytes.

    Raises:
        ValueError: such an image.
    """
    if height < 1 or width < 1:
        raise ValueError(f"{height} x {width} pixels: the image is empty")
    if (needed := height * max(width, 16) * bytes_a_pixel) > most:  # decoders also take a few bytes a line
        raise ValueError(
            f"{height} x {width} pixels, for which {needed:,} bytes are needed, more than data.max_image_bytes={most}; "
            "make the image smaller, or raise the limit where memory allows"
        )


def check_before_opening(data: bytes, most: int) -> None:
    """Refuse files for which Pillow would take too much memory as soon as it opens them: WebP and JPEG 2000.

    Raises:
        ValueError: too large, or damaged.
    """
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        kind, height, width = data[12:16], 0, 0
        if kind == b"VP8X":
            height, width = (1 + int.from_bytes(data[place : place + 3], "little") for place in (27, 24))
        elif kind == b"VP8 ":
            height, width = (int.from_bytes(data[place : place + 2], "little") & 0x3FFF for place in (28, 26))
        elif kind == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            height, width = (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
        check_size(height, width, _WEBP, most)
    elif (start := _codestream(data)) is not None:
        _check_jpeg2000(data, start, most)


def check_opened(image: Image.Image, most: int) -> None:
    """Refuse an image that would take too much memory, in Pillow and in its decoder.

    Raises:
        ValueError: such an image.
    """
    check_size(image.height, image.width, _MODES.get(image.mode, 4) + _WORK.get(image.format or "", 0), most)
    exif = image.info.get("exif")
    if isinstance(exif, bytes):
        exif = exif.removeprefix(b"Exif\0\0")
        if len(exif) >= 8:
            order = ">" if exif.startswith(b"M") else "<"
            check_tags(exif, struct.unpack_from(f"{order}I", exif, 4)[0], order)


def check_tags(data: bytes, start: int, order: str, is_big: bool = False) -> int:
    """Refuse TIFF tags that share bytes, so that together they take many times the file.

    Returns:
        the bytes that the tags take.

    Raises:
        ValueError: such tags, or tables of more strips than an image has.
    """
    head, long = (8, "u8") if is_big else (2, "u4")
    kinds = np.dtype([("tag", f"{order}u2"), ("type", f"{order}u2"), ("count", order + long), ("value", order + long)])
    count = int.from_bytes(data[start : start + head], "big" if order == ">" else "little")
    count = min(count, max(0, len(data) - start - head) // kinds.itemsize)
    tags = np.frombuffer(data, kinds, count, start + head) if count else np.empty(0, kinds)
    counts = tags["count"].astype(np.float64)
    sizes = counts * _UNITS[np.where(tags["type"] < len(_UNITS), tags["type"], 0)]
    if (counts[np.isin(tags["tag"], (273, 279, 324, 325))] > _MAX_STRIPS).any():
        raise ValueError("the TIFF file is damaged, or made of more strips or tiles than an image has")
    total = int(sizes[sizes <= len(data)].sum())
    if total > 4 * len(data):
        raise ValueError(f"its tags take {total:,} bytes, and the file has {len(data):,}")
    return total


def _boxes(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Name of each box of a JPEG 2000 file, and where its content starts."""
    position = 0
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        start = position + 8
        if length == 1:
            length, start = int.from_bytes(data[start : start + 8], "big"), start + 8
        yield name, start
        if length < 8:  # 0: to the end
            return
        position += length


def _codestream(data: bytes) -> int | None:
    """Where the codestream of a JPEG 2000 file starts; None for other files."""
    if data.startswith(b"\xff\x4f\xff\x51"):
        return 0
    if not data.startswith(b"\0\0\0\x0cjP  "):
        return None
    return next((start for name, start in _boxes(data) if name == b"jp2c"), None)


def _check_jpeg2000(data: bytes, start: int, most: int) -> None:
    """Check the codestream's own sizes: the decoder takes tables for each tile, and 32 bits a sample."""
    if len(data) < start + 42:
        raise ValueError("the JPEG 2000 file is cut off")
    right, down, left, top, width, height, first_x, first_y, channels = struct.unpack_from(">8IH", data, start + 8)
    check_size(down - top, right - left, 1, most)
    if not (width and height and channels):
        raise ValueError("the JPEG 2000 file is damaged: tiles or channels of no size")
    tiles = -(-(right - first_x) // width) * -(-(down - first_y) // height)
    tile = min(width, right - left) * min(height, down - top)
    needed = (down - top) * (right - left) * channels + 8 * tile * channels + tiles * (8192 + 2048 * channels)
    if needed > most:
        raise ValueError(
            f"{down - top} x {right - left} pixels in {tiles:,} tiles of {channels} channels, for which {needed:,} "
            f"bytes are needed, more than data.max_image_bytes={most}; make the image smaller, or raise the limit"
        )
