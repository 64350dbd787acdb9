"""What an image's file says of itself, read without decoding: its size, how it is stored, and whether it is whole."""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BinaryFile = io.BytesIO | io.BufferedReader
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"

MAX_PIXELS = 178_956_970
"""Twice what Pillow warns of; three channels of them take half a gigabyte."""

# Start-of-frame markers: all of C0 to CF but the tables and an extension.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))  # Adam7
_LARGEST_PROFILE = 2**24
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


class JPEGHeader(NamedTuple):
    """What stands before the pixels of a JPEG file."""

    height: int
    width: int
    profile: bytes
    """Its ICC profile; empty where there is none."""
    turned_by_xmp: bool
    """Whether its orientation stands in XMP data alone, which torchvision does not read."""


def read_jpeg(data: bytes) -> JPEGHeader | None:
    """None where the markers cannot be followed.

    Raises:
        ValueError: the file ends before the picture does. Decoders fill up the rest with grey.
    """
    size, position, profile, xmp, exif = None, 2, {}, False, False
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker in _WITHOUT_LENGTH:
            position += 2
        elif marker == 0xDA:  # the pixels, in which 0xFF is always followed by 0 or by a marker of theirs
            if data.rfind(b"\xff\xd9", position) < 0:
                raise ValueError("the JPEG file is cut off: its end marker is missing")
            parts = b"".join(profile[number] for number in sorted(profile))
            return None if size is None else JPEGHeader(*size, parts, xmp and not exif)
        else:
            start, end = position + 4, position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            if marker in _START_OF_FRAME:
                size = struct.unpack_from(">HH", data, position + 5)
            elif marker == 0xE2 and data.startswith(b"ICC_PROFILE\0", start):
                profile[data[start + 12]] = data[start + 14 : end]
            elif marker == 0xE1 and data.startswith(b"Exif\0", start):
                exif = True
            elif marker == 0xE1 and data.startswith(b"http://ns.adobe.com/xap/1.0/", start):
                xmp = data.find(b"tiff:Orientation", start, end) >= 0
            position = end
    return None


class PNGHeader(NamedTuple):
    """What a PNG file begins with, and its compressed pixels."""

    height: int
    width: int
    bit_depth: int
    colour_type: int
    interlaced: bool
    transparent: tuple[int, ...]
    """Where a grey or a colour is transparent, that grey or colour as it is stored; else ()."""
    is_animated: bool
    profile: bytes
    """Its ICC profile; empty where there is none."""
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
    key = chunks.get(b"tRNS", [b""])[0]
    transparent = struct.unpack_from(">3H" if colour_type == 2 else ">H", key) if colour_type in (0, 2) and key else ()
    profile = chunks.get(b"iCCP", [b""])[0].partition(b"\0")[2][1:]  # after its name and the kind of compression
    try:
        profile = zlib.decompressobj().decompress(profile, _LARGEST_PROFILE) if profile else b""
    except zlib.error:
        profile = b""
    return PNGHeader(
        height,
        width,
        bit_depth,
        colour_type,
        bool(interlaced),
        transparent,
        b"acTL" in chunks,
        profile,
        b"".join(chunks[b"IDAT"]),
    )


def is_sound_png16(png: PNGHeader) -> bool:
    """Whether a decoder that crashes on damage can read these 16-bit pixels of several channels."""
    channels = {2: 3, 4: 2, 6: 4}.get(png.colour_type)
    if channels is None or png.bit_depth != 16:
        return False
    lines: list[int] = []  # bytes of each
    for top, left, step_down, step_right in _PASSES if png.interlaced else ((0, 0, 1, 1),):
        width, height = len(range(left, png.width, step_right)), len(range(top, png.height, step_down))
        lines += [1 + width * channels * 2] * height if width else []
    starts = np.cumsum([0, *lines])
    inflater = zlib.decompressobj()
    try:
        pixels = inflater.decompress(png.compressed, int(starts[-1]) + 1)
    except zlib.error as error:
        raise ValueError(f"the PNG file is damaged: {error}") from error
    if not inflater.eof or len(pixels) != starts[-1]:
        return False
    return int(np.frombuffer(pixels, np.uint8)[starts[:-1]].max()) <= 4  # filters


class TIFFPage(NamedTuple):
    """How a page of a TIFF file is stored."""

    height: int
    width: int
    samples: int
    bits: int
    """Of a sample; 0 where samples differ."""
    kind: str
    """Of numbers, as numpy names it: u = unsigned, i = signed, f = floats, c = complex, V = not said."""
    photometric: int
    """0 = grey, 0 is white; 1 = grey, 0 is black; 2 = RGB, 3 = palette, 5 = CMYK, 6 = YCbCr, 8 = L*a*b*."""
    extra: tuple[int, ...]
    """What the samples after the colours are: 0 = not said, 1 = transparency that colours are multiplied by, 2 = other
    transparency."""
    is_copy: bool
    """Whether it is a smaller copy of another page, or its mask."""
    depth: int
    """Layers of a volume."""
    profile: bytes
    """Its ICC profile; empty where there is none."""

    @property
    def colours(self) -> int:
        """Samples before those of `extra`."""
        return self.samples - len(self.extra)


def read_tiff(file: BinaryFile) -> Iterator[TIFFPage]:
    """The pages of a TIFF file, without their pixels.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = file.read(8)
            tags = ImageFileDirectory_v2(header + (file.read(8) if b"+" in header[2:4] else b""))
            seen: set[int] = set()
            while tags.next and tags.next not in seen:
                seen.add(tags.next)
                file.seek(tags.next)
                tags.load(file)
                yield _read_page(tags)
    except ValueError:
        raise
    except Exception as error:  # damaged tags raise anything
        raise ValueError(f"not a readable TIFF file: {error or type(error).__name__}") from error


def _read_page(tags: ImageFileDirectory_v2) -> TIFFPage:
    def values(tag: int, default: int) -> tuple[int, ...]:
        found: Any = tags.get(tag, default)
        return tuple(map(int, found)) if isinstance(found, tuple) else (int(found),)

    samples, photometric = values(277, 1)[0], values(262, 0)[0]
    extra = values(338, -1)
    if extra == (-1,):
        colours = {2: 3, 5: 4, 6: 3, 8: 3}.get(photometric, 1)
        # As Pillow and libtiff have it, a fourth sample of RGB that nothing is said of is transparency.
        extra = (2,) if (photometric, samples) == (2, 4) else (0,) * max(0, samples - colours)
    bits, kinds = set(values(258, 1)), set(values(339, 1))
    profile: Any = tags.get(34675, b"")
    return TIFFPage(
        height=values(257, 0)[0],
        width=values(256, 0)[0],
        samples=samples,
        bits=bits.pop() if len(bits) == 1 else 0,
        kind={1: "u", 2: "i", 3: "f", 5: "c", 6: "c"}.get(kinds.pop(), "V") if len(kinds) == 1 else "V",
        photometric=photometric,
        extra=tuple(2 if kind == 999 else kind for kind in extra),  # Corel Draw's
        is_copy=bool(values(254, 0)[0] & 5),
        depth=values(32997, 1)[0],
        profile=profile if isinstance(profile, bytes) else b"",
    )


def full_pages(file: BinaryFile) -> Iterator[tuple[int, TIFFPage]]:
    """The pages that are images of their own, and their numbers: neither smaller copies nor masks of others."""
    copies = []
    found = False
    for number, page in enumerate(read_tiff(file)):
        if page.is_copy:
            copies.append((number, page))
        else:
            found = True
            yield number, page
    if not found:
        yield from copies
