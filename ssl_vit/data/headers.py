"""What a picture's file says of itself, read without decoding: its size, and whether it is whole."""

import struct
import zlib
from typing import NamedTuple

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"

MAX_PIXELS = 178_956_970
"""Twice what Pillow warns of; three channels of them take half a gigabyte."""

# Start-of-frame markers: all of C0 to CF but the tables and an extension.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset(range(0xD0, 0xDA)) | {0x01}


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Refuse a picture that would take more memory than it is worth, or none.

    Raises:
        ValueError: no pixels, or more than `max_pixels`.
    """
    if height * width < 1:
        raise ValueError(f"{height} x {width} pixels: the picture is empty")
    if height * width > max_pixels:
        raise ValueError(
            f"{height} x {width} pixels are more than data.max_pixels={max_pixels}; "
            "make the picture smaller, or raise the limit where memory allows"
        )


def read_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width in pixels; None where the markers cannot be followed.

    Raises:
        ValueError: the file ends before the picture does. Decoders fill up the rest with grey.
    """
    size, position = None, 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker in _WITHOUT_LENGTH:
            position += 2
        elif marker == 0xDA:  # the pixels, in which 0xFF is always followed by 0 or by a marker of theirs
            if data.rfind(b"\xff\xd9", position) < 0:
                raise ValueError("the JPEG file is cut off: its end marker is missing")
            return size
        else:
            length = int.from_bytes(data[position + 2 : position + 4], "big")
            if marker in _START_OF_FRAME:
                height, width = struct.unpack_from(">HH", data, position + 5)
                size = (height, width)
            position += 2 + length
    return None


class PNGHeader(NamedTuple):
    """What a PNG file begins with, and its compressed pixels."""

    height: int
    width: int
    bit_depth: int
    colour_type: int
    interlaced: bool
    chunks: frozenset[bytes]
    """Names of the chunks that it holds."""
    compressed: bytes


def read_png(data: bytes) -> PNGHeader:
    """Read all chunks of a PNG file and compare their checksums, which decoders do not or crash on.

    Raises:
        ValueError: the file is cut off or damaged.
    """
    chunks: dict[bytes, list[bytes]] = {}
    position = len(PNG_SIGNATURE)
    while b"IEND" not in chunks:
        length, name = struct.unpack_from(">I4s", data, position) if position + 8 <= len(data) else (0, b"")
        end = position + 8 + length
        if not name or end + 4 > len(data):
            raise ValueError("the PNG file is cut off")
        is_critical = not name[0] & 32
        if is_critical and zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError(f"the PNG file is damaged: wrong checksum of {name.decode('latin-1')!r}")
        chunks.setdefault(name, []).append(data[position + 8 : end])
        position = end + 4
    header = chunks.get(b"IHDR", [b""])[0]
    if len(header) != 13 or b"IDAT" not in chunks:
        raise ValueError("the PNG file is damaged: it lacks its header or its pixels")
    width, height, bit_depth, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if colour_type == 3 and (len(palette := b"".join(chunks.get(b"PLTE", []))) % 3 or not palette):
        raise ValueError("the PNG file is damaged: its palette is missing or cut off")
    names = frozenset(chunks)
    return PNGHeader(height, width, bit_depth, colour_type, bool(interlaced), names, b"".join(chunks[b"IDAT"]))


def is_sound_png16(png: PNGHeader) -> bool:
    """Whether a decoder that crashes on damage can read these 16-bit pixels of several channels, not interlaced."""
    channels = {2: 3, 4: 2, 6: 4}.get(png.colour_type)
    if channels is None or png.bit_depth != 16 or png.interlaced or b"tRNS" in png.chunks:
        return False
    line = 1 + png.width * channels * 2
    inflater = zlib.decompressobj()
    try:
        pixels = inflater.decompress(png.compressed, png.height * line + 1)
    except zlib.error as error:
        raise ValueError(f"the PNG file is damaged: {error}") from error
    return inflater.eof and len(pixels) == png.height * line and max(pixels[::line]) <= 4
