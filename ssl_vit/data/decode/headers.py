"""Reads the headers of image files: size, how pixels are stored, and whether the file is whole."""

import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from ssl_vit.data.decode.bounds import MAX_PAGES, MAX_SCANS, check_tags

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"

# Start-of-frame markers: C0 to CF without the tables and an extension.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))  # Adam7
_CHUNKS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"IDAT", b"IEND"))
_LARGEST_PROFILE = 2**24
_WITHOUT_LENGTH = frozenset(range(0xD0, 0xDA)) | {0x00, 0x01}
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


class JPEGHeader(NamedTuple):
    """The header of a JPEG file."""

    height: int
    width: int
    profile: bytes
    """ICC profile; empty where there is none."""
    turned_by_xmp: bool
    """Whether the orientation is in XMP data alone, which torchvision does not read."""
    bytes_a_pixel: int
    """What a decoder takes: samples, and coefficients where they come in several scans."""


def read_jpeg(data: bytes) -> JPEGHeader | None:
    """Read the header of a JPEG file; None where there are no pixels.

    Raises:
        ValueError: the file is cut off, where decoders would fill in grey, or has too many scans.
    """
    frame, position, profile, xmp, exif = None, 2, {}, False, False
    while position + 10 <= len(data):
        marker = data[position + 1]
        if data[position] != 0xFF:  # decoders skip bytes between markers
            position = data.find(b"\xff", position)
            if position < 0:
                break
        elif marker == 0xFF:  # a fill byte
            position += 1
        elif marker in _WITHOUT_LENGTH:
            position += 2
        elif marker == 0xDA:  # the pixels, in which 0xFF is always followed by 0 or by a marker of theirs
            if data.rfind(b"\xff\xd9", position) < 0:
                raise ValueError("the JPEG file is cut off: its end marker is missing")
            if frame is None:
                return None
            parts = b"".join(profile[number] for number in sorted(profile))
            height, width, channels, is_progressive, coefficients = frame
            if is_progressive or data[position + 4] < channels:
                _check_scans(data, position)
                channels += coefficients
            return JPEGHeader(height, width, parts, xmp and not exif, channels)
        else:
            start, end = position + 4, position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            if marker in _START_OF_FRAME:
                height, width, channels = struct.unpack_from(">HHB", data, position + 5)
                factors = [(byte >> 4) * (byte & 15) for byte in data[position + 11 : end : 3][:channels]]
                share = sum(factors) / max(1, max(factors, default=1))  # of the pixels, over all channels
                frame = height, width, channels, marker & 3 == 2, 2 * math.ceil(share)
            elif marker == 0xE2 and data.startswith(b"ICC_PROFILE\0", start):
                profile[data[start + 12]] = data[start + 14 : end]
            elif marker == 0xE1 and data.startswith(b"Exif\0", start):
                exif = _has_orientation(data[start + 6 : end])
            elif marker == 0xE1 and data.startswith(b"http://ns.adobe.com/xap/1.0/", start):
                xmp = data.find(b"tiff:Orientation", start, end) >= 0
            position = end
    return None


def _has_orientation(exif: bytes) -> bool:
    """Whether EXIF data says how an image is turned; else XMP data may."""
    order = "little" if exif.startswith(b"II") else "big"
    first = int.from_bytes(exif[4:8], order) + 2
    count = int.from_bytes(exif[first - 2 : first], order)
    return any(int.from_bytes(exif[at : at + 2], order) == 0x0112 for at in range(first, first + 12 * count, 12))


def _check_scans(data: bytes, position: int) -> None:
    """Refuse a JPEG of more scans than encoders write."""
    count = data.count(b"\xff\xda", position)
    if count <= MAX_SCANS:
        return
    count = 0  # now only of markers
    while (found := _MARKER_IN_SCAN.search(data, position)) is not None and data[found.start() + 1] != 0xD9:
        count += data[found.start() + 1] == 0xDA
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        if count > MAX_SCANS:
            raise ValueError(f"the JPEG file has more than {MAX_SCANS} scans; store it anew")


class PNGHeader(NamedTuple):
    """The header of a PNG file, and its compressed pixels."""

    height: int
    width: int
    bit_depth: int
    colour_type: int
    interlaced: bool
    transparent: tuple[int, ...]
    """The grey or colour that is transparent, as it is stored; () where there is none."""
    profile: bytes
    """ICC profile; empty where there is none."""
    compressed: bytes
    """The compressed pixels, kept for 16-bit images only."""

    @property
    def bytes_a_pixel(self) -> int:
        return {0: 1, 2: 3, 4: 2, 6: 4}.get(self.colour_type, 1) * (2 if self.bit_depth == 16 else 1)


def read_png(data: bytes) -> PNGHeader:
    """Read all chunks of a PNG file and check their checksums, which decoders ignore or crash on.

    Raises:
        ValueError: the file is cut off or damaged.
    """
    chunks: dict[bytes, list[bytes]] = {}
    position, is_16_bit = len(PNG_SIGNATURE), False
    while b"IEND" not in chunks:
        length, name = struct.unpack_from(">I4s", data, position) if position + 8 <= len(data) else (0, b"")
        end = position + 8 + length
        if not name or end + 4 > len(data):
            raise ValueError("the PNG file is cut off")
        is_critical = not name[0] & 32
        if is_critical and zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError(f"the PNG file is damaged: wrong checksum of {name.decode('latin-1')!r}")
        if name in _CHUNKS:
            content = b"" if name == b"IDAT" and not is_16_bit else data[position + 8 : end]
            chunks.setdefault(name, []).append(content)
            is_16_bit = is_16_bit or (name == b"IHDR" and content[8:9] == b"\x10")
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
    compressed = b"".join(chunks[b"IDAT"])
    return PNGHeader(height, width, bit_depth, colour_type, bool(interlaced), transparent, profile, compressed)


def is_sound_png16(png: PNGHeader) -> bool:
    """Whether these are 16-bit pixels of several channels, and so whole that a decoder does not crash on them."""
    channels = {2: 3, 4: 2, 6: 4}.get(png.colour_type)
    if channels is None or png.bit_depth != 16:
        return False
    passes = []  # number of lines, and bytes of a line
    for top, left, step_down, step_right in _PASSES if png.interlaced else ((0, 0, 1, 1),):
        width, height = len(range(left, png.width, step_right)), len(range(top, png.height, step_down))
        passes += [(height, 1 + width * channels * 2)] if width else []
    size = sum(height * line for height, line in passes)
    inflater = zlib.decompressobj()
    try:
        pixels = np.frombuffer(inflater.decompress(png.compressed, size + 1), np.uint8)
    except zlib.error as error:
        raise ValueError(f"the PNG file is damaged: {error}") from error
    if not inflater.eof or len(pixels) != size:
        return False
    for height, line in passes:
        if height and pixels[: height * line : line].max() > 4:  # filters
            return False
        pixels = pixels[height * line :]
    return True


class TIFFPage(NamedTuple):
    """The tags of a TIFF page that say how it is stored."""

    height: int
    width: int
    samples: int
    bits: int
    """Bits of a sample; 0 where samples differ."""
    kind: str
    """Kind of numbers, in numpy's letters: u = unsigned, i = signed, f = floats, c = complex, V = unknown."""
    photometric: int
    """0 = grey, 0 is white; 1 = grey, 0 is black; 2 = RGB, 3 = palette, 5 = CMYK, 6 = YCbCr, 8 = L*a*b*."""
    extra: tuple[int, ...]
    """Meaning of the samples after the colours: 0 = unknown, 1 = transparency that colours are multiplied by, 2 = other
    transparency."""
    is_copy: bool
    """Whether the page is a smaller copy of another one, or its mask."""
    depth: int
    """Layers of a volume."""
    profile: bytes
    """ICC profile; empty where there is none."""
    tile: tuple[int, int] = (0, 0)
    """Height and width of tiles; zeros where there are none."""
    orientation: int = 1
    """How the page is turned: 5 to 8 stand for pages that lie on their side."""

    @property
    def colours(self) -> int:
        """Number of samples before those of `extra`."""
        return self.samples - len(self.extra)

    @property
    def bytes_a_pixel(self) -> int:
        return self.samples * -(-max(self.bits, 8) // 8) * max(1, self.depth)


def read_tiff(data: bytes) -> Iterator[TIFFPage]:
    """The pages of a TIFF file, without their pixels.

    Raises:
        ValueError: it is damaged, or its tags take many times the file.
    """
    file = io.BytesIO(data)
    order, is_big, taken = ">" if data.startswith(b"M") else "<", b"+" in data[2:4], 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = file.read(8)
            tags = ImageFileDirectory_v2(header + (file.read(8) if is_big else b""))
            seen: set[int] = set()
            while tags.next and tags.next not in seen:
                seen.add(tags.next)
                taken += check_tags(data, tags.next, order, is_big)
                if len(seen) > MAX_PAGES or taken > 4 * len(data):
                    raise ValueError(f"a TIFF of more than {MAX_PAGES:,} pages, or of tags that share their bytes")
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
        # As in Pillow and libtiff, a fourth sample of RGB of unknown meaning is transparency.
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
        tile=(values(323, 0)[0], values(322, 0)[0]),
        orientation=values(274, 1)[0],
    )


def full_pages(data: bytes) -> Iterator[tuple[int, TIFFPage]]:
    """Number and tags of each page that is an image of its own: no smaller copy and no mask, unless all pages are."""
    copies = []
    found = False
    for number, page in enumerate(read_tiff(data)):
        if page.is_copy:
            copies.append((number, page))
        else:
            found = True
            yield number, page
    if not found:
        yield from copies
