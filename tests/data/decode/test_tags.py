"""What a tag says of the pixels is applied at every bit depth, whichever library reads the file."""

import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from ssl_vit.data.decode.decode import decode
from ssl_vit.data.decode.formats import upright_size
from tests.data.broken import encoded, npy, png_chunk
from tests.data.decode.pixels import RNG, SIZES, check, drawn, eighths, tiff, write_png


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("photometric", ["miniswhite", "minisblack"])
def test_grey_of_tiff(photometric: str, bits: int):
    values = drawn(16, 24, bits=bits)
    grey = 255 - eighths(values, bits) if photometric == "miniswhite" else eighths(values, bits)
    for options in ({}, {"byteorder": ">"}, {"compression": "zlib"}, {"bigtiff": True}):
        data = tiff(values, photometric=photometric, **options)
        check(data, grey)
        check(data, np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("bits", [4, 8, 10, 12, 16, 32])
def test_colours_of_tiff(bits: int):
    values = drawn(16, 24, 3, bits=bits)
    if bits not in SIZES:
        check(tiff(values, photometric="rgb", bitspersample=bits), eighths(values, bits))
        return
    for options in ({}, {"byteorder": ">"}, {"compression": "lzw", "predictor": True}):
        check(tiff(values, photometric="rgb", **options), eighths(values, bits))
        planes = np.moveaxis(values, -1, 0)
        check(tiff(planes, photometric="rgb", planarconfig="separate", **options), eighths(values, bits))


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha", "unspecified"])
@pytest.mark.parametrize("colours", [1, 3])
def test_a_sample_after_the_colours(colours: int, kind: str, bits: int):
    values = drawn(16, 24, colours + 1, bits=bits)
    if kind == "assocalpha":
        values[..., :colours] = np.minimum(values[..., :colours], values[..., colours:])
    data = tiff(values, photometric="rgb" if colours == 3 else "minisblack", planarconfig="contig", extrasamples=[kind])
    parts = eighths(values, bits)
    colour, alpha = parts[..., :colours], parts[..., colours:]
    if kind == "unspecified":
        check(data, parts)
        if colours == 3:
            check(data, colour)
        else:
            with pytest.raises(ValueError, match="2, of which it does not say"):
                decode(data, 1)
        return
    # What shows on white: a colour times alpha, or one that was multiplied by it, and white for the rest.
    shown = (colour if kind == "assocalpha" else colour * alpha / 255) + 255 - alpha
    check(data, np.rint(shown), tolerance=1 if kind == "unassalpha" else 3)


def test_several_samples_after_the_colours():
    values = drawn(8, 9, 6)
    data = tiff(values, photometric="rgb", extrasamples=["unspecified", "unassalpha", "unspecified"])
    check(data, values)
    check(data, np.concatenate([values[..., :3], values[..., 4:5]], axis=-1))
    with pytest.raises(ValueError, match="5 channels were asked for and the image has 6"):
        decode(data, 5)


@pytest.mark.parametrize(
    ("array", "options", "reason"),
    [
        (np.full((8, 9), -3, np.int8), {}, "signed integers"),
        (np.full((8, 9), 300, np.int16), {}, "signed integers"),
        (np.full((8, 9, 3), 300, np.int32), {"photometric": "rgb"}, "signed integers"),
        (np.full((8, 9), 300, np.uint32), {}, "integers of 32 bits"),
        (np.ones((8, 9), np.complex64), {}, "complex numbers"),
        (np.ones((8, 9), np.float64) * 1.01, {}, r"from 1.01 to 1.01; scale them to \[0, 1\]"),
        (np.ones((8, 9), np.uint16), {"photometric": "cfa"}, "a camera's raw values"),
        (np.ones((8, 9, 3), np.uint8), {"photometric": 34892}, "a camera's raw values"),
        (np.ones((4, 16, 16), np.uint8), {"volumetric": True, "tile": (4, 16, 16)}, "a volume of 4 layers"),
    ],
)
def test_numbers_that_do_not_say_what_is_white_are_refused(array: np.ndarray, options: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        decode(tiff(array, **{"photometric": "minisblack", **options}), 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("write", [npy, tiff])
def test_floats_a_hair_outside_are_clamped(write: Callable[..., bytes], dtype: type):
    near = np.array([[-9e-4, -1e-8, 0, 0.5, 1, 1.0000001, 1.0009]]).astype(dtype)
    check(write(near), np.array([[0, 0, 0, 128, 255, 255, 255]]))
    for far in (-0.01, 1.01):
        with pytest.raises(ValueError, match=r"floating-point pixels from .* to .*; scale them to \[0, 1\]"):
            decode(write(np.array([[0.5, far]]).astype(dtype)), 1)


@pytest.mark.parametrize("order", ["<", ">"])
def test_byte_order_of_arrays(order: str):
    values = drawn(8, 9, bits=16)
    check(npy(values.astype(f"{order}u2")), eighths(values, 16))
    check(npy(drawn(8, 9, bits=32).astype(f"{order}f4") * 0 + 1), np.full((8, 9), 255))


def raw_tiff(width: int, height: int, strip: bytes, tags: dict[int, list[int]], order: str = "<") -> bytes:
    """A TIFF of one strip, tag by tag: numbers of 16 bits."""
    tags = {256: [width], 257: [height], 259: [1], 277: [1], 278: [height], **tags}
    entries, after = [], b""
    place = 8 + 2 + 12 * (len(tags) + 2) + 4
    for tag, values in tags.items():
        content = struct.pack(f"{order}{len(values)}H", *values)
        if len(content) > 4:
            after, content = after + content, struct.pack(f"{order}I", place + len(after))
        entries.append((tag, struct.pack(f"{order}HHI", tag, 3, len(values)) + content.ljust(4, b"\0")))
    entries += [(273, struct.pack(f"{order}HHII", 273, 4, 1, place + len(after)))]
    entries += [(279, struct.pack(f"{order}HHII", 279, 4, 1, len(strip)))]
    table = b"".join(entry for _, entry in sorted(entries))
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(f"{order}IH", 8, len(entries)) + table + bytes(4) + after + strip


def packed(values: np.ndarray, bits: int) -> bytes:
    digits = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(digits.reshape(values.shape[0], -1).astype(np.uint8), axis=1).tobytes()


def reversed_bits(data: bytes) -> bytes:
    return np.packbits(np.unpackbits(np.frombuffer(data, np.uint8)), bitorder="little").tobytes()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_of_tiff(bits: int):
    indices = drawn(16, 24, bits=bits)
    table = drawn(3, 2**bits, bits=8)
    tags = {258: [bits], 262: [3], 320: (table.astype(int) * 257).ravel().tolist()}
    for order in "<>":
        check(raw_tiff(24, 16, packed(indices, bits), tags, order), np.moveaxis(table[:, indices], 0, -1).astype(int))


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 14])
@pytest.mark.parametrize("photometric", [0, 1])
def test_packed_bits_of_tiff(bits: int, photometric: int):
    values = drawn(16, 24, bits=bits)
    grey = eighths(values, bits) if photometric else 255 - eighths(values, bits)
    tags = {258: [bits], 262: [photometric]}
    for order in "<>":
        check(raw_tiff(24, 16, packed(values, bits), tags, order), grey)
        reverse = raw_tiff(24, 16, reversed_bits(packed(values, bits)), {**tags, 266: [2]}, order)
        if (bits, photometric) == (8, 0):  # Pillow knows of them, and has no way to read them
            with pytest.raises(ValueError, match="unknown raw mode"):
                decode(reverse, 1)
        else:
            check(reverse, grey)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_inks_and_other_colours_of_tiff(mode: str):
    ramp = (np.add.outer(np.arange(16) * 7, np.arange(24) * 4)[..., None] % 200 + [0, 20, 40]).astype(np.uint8)
    smooth = Image.fromarray(ramp)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(smooth, *profiles, outputMode="LAB")
    else:
        image = smooth.convert(mode)
    check(encoded(image, "TIFF"), ramp, tolerance=4 if mode == "LAB" else 2)


# PNG


PNG_KINDS = [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (2, 8), (2, 16), (3, 8), (3, 16), (4, 8), (4, 16)]


@pytest.mark.parametrize(("channels", "bits"), PNG_KINDS)
def test_samples_of_png(channels: int, bits: int):
    values = drawn(9, 13, channels, bits=bits)
    check(write_png(values, bits), eighths(values, bits), tolerance=1 if channels == 1 and bits == 16 else 0)


@pytest.mark.parametrize(("channels", "bits"), [kind for kind in PNG_KINDS if kind[0] in (1, 3)])
def test_a_transparent_grey_or_colour_of_png(channels: int, bits: int):
    values = drawn(9, 13, channels, bits=bits)
    values[3:5, 2] = values[0, 0]
    if bits == 16:
        values[5, 5] = values[0, 0] ^ 1  # the same in its upper 8 bits, and not transparent
    key = png_chunk(b"tRNS", struct.pack(f">{channels}H", *values[0, 0].tolist()))
    alpha = np.where((values == values[0, 0]).all(axis=-1, keepdims=True), 0, 255)
    colour = np.broadcast_to(eighths(values, bits), (9, 13, 3))
    data = write_png(values, bits, key)
    check(data, np.concatenate([colour, alpha], axis=-1))
    check(data, np.where(alpha == 0, 255, colour))


def interlaced(array: np.ndarray, bits: int, *chunks: bytes) -> bytes:
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    lines = b"".join(
        b"\0" + line.astype(">u2" if bits == 16 else "u1").tobytes()
        for top, left, down, right in passes
        for line in array[top::down, left::right]
        if line.size
    )
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], bits, {1: 0, 3: 2, 4: 6}[array.shape[2]], 0, 0, 1)
    parts = [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", zlib.compress(lines)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_interlaced_png(channels: int, bits: int):
    for shape in ((9, 13), (1, 1), (3, 2), (16, 16)):
        values = drawn(*shape, channels, bits=bits)
        check(interlaced(values, bits), eighths(values, bits))
        with pytest.raises(ValueError, match=r"\w"):
            decode(interlaced(values, bits)[:-30], channels)


# Orientation


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("kind", ["PNG", "PNG16", "WEBP", "TIFF", "TIFF16", "TIFF white", "AVIF", "JPEG", "JPEG XMP"])
def test_orientation(kind: str):
    for orientation in TURNS:
        check_turned(kind, orientation)


def check_turned(kind: str, orientation: int) -> None:
    blocks = np.repeat(np.repeat(drawn(2, 3, 3) // 2 + 40, 16, axis=0), 16, axis=1)
    expected = TURNS[orientation](blocks.astype(np.int64))
    turned: dict[str, Any] = {"extratags": [(274, "H", 1, orientation, False)]}
    image, tolerance = Image.fromarray(blocks), 0
    if kind == "PNG16":
        data = write_png(blocks.astype(np.uint16) * 257, 16, png_chunk(b"eXIf", exif(orientation).tobytes()[6:]))
    elif kind == "TIFF16":
        data = tiff(blocks.astype(np.uint16) * 257, photometric="rgb", **turned)
    elif kind == "TIFF white":
        data, expected = (
            tiff(65535 - blocks[..., 0] * np.uint16(257), photometric="miniswhite", **turned),
            expected[..., 0],
        )
    elif kind == "TIFF":
        data = tiff(blocks, photometric="rgb", **turned)
    elif kind == "JPEG XMP":
        data, tolerance = (
            encoded(image, "JPEG", xmp=b'<x tiff:Orientation="%d"/>' % orientation, quality=98, subsampling=0),
            12,
        )
    else:
        options = {
            "WEBP": {"lossless": True},
            "JPEG": {"quality": 98, "subsampling": 0},
            "AVIF": {"quality": 98, "subsampling": "4:4:4"},
        }.get(kind, {})
        data, tolerance = encoded(image, kind, exif=exif(orientation), **options), 0 if kind in ("PNG", "WEBP") else 12
    check(data, expected, tolerance=tolerance)


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_in_xmp_data_beside_exif_data_of_other_tags(order: str):
    blocks = np.repeat(np.repeat(drawn(2, 3, 3) // 2 + 40, 16, axis=0), 16, axis=1)
    other = Image.Exif()
    other.endian = order
    other[0x010F] = "a camera"
    data = encoded(
        Image.fromarray(blocks), "JPEG", exif=other, xmp=b'<x tiff:Orientation="6"/>', quality=98, subsampling=0
    )
    check(data, TURNS[6](blocks.astype(np.int64)), tolerance=12)
    assert upright_size(data, 3) == (48, 32)


# Other formats


def test_a_fourth_byte_of_tga_that_is_no_transparency():
    pixels = drawn(8, 9, 4)
    pixels[..., 3] = 0
    data = bytearray(encoded(Image.fromarray(pixels), "TGA"))
    data[17] &= 0xF0
    check(bytes(data), pixels[..., :3].astype(int))
    pixels[..., 3] = 200
    check(encoded(Image.fromarray(pixels), "TGA"), pixels.astype(int))


@pytest.mark.parametrize("white", [255, 1023, 4095, 65535])
def test_the_white_of_pgm_is_its_own(white: int):
    values = RNG.integers(0, white + 1, (8, 9))
    stored = values.astype(np.uint8 if white < 256 else ">u2").tobytes()
    check(b"P5 9 8 %d\n" % white + stored, np.rint(values * 255 / white), tolerance=1)


def test_jpeg_of_stored_rgb_and_of_inks():
    ramp = (np.add.outer(np.arange(16) * 7, np.arange(24) * 4)[..., None] % 200 + [0, 20, 40]).astype(np.uint8)
    image = Image.fromarray(ramp)
    check(encoded(image, "JPEG", keep_rgb=True, quality=100), ramp.astype(int), tolerance=4)
    check(encoded(image.convert("CMYK"), "JPEG", quality=100), ramp.astype(int), tolerance=8)
