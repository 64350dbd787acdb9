"""Files that are no whole image, each with the suffix it would have and what is said of it."""

import io
import pickle
import struct
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image


class Broken(NamedTuple):
    suffix: str
    data: bytes
    reason: str  # regular expression


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour_type: int = 2) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def _zero_tail(data: bytes) -> bytes:
    """As a download that was broken off leaves a file whose space was reserved."""
    half = len(data) // 2
    return data[:half] + bytes(len(data) - half)


def _with_jpeg_size(data: bytes, height: int, width: int) -> bytes:
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("picture.txt", "none")
    return buffer.getvalue()


def _npy_header(shape: str) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def broken_files() -> dict[str, Broken]:
    jpeg, whole_png = encoded(noise(), "JPEG"), encoded(noise(), "PNG")
    tiff, gif = encoded(noise("L"), "TIFF"), encoded(noise("P"), "GIF")
    lines = zlib.compress(b"\0" * (4 * 13))
    deep = np.zeros((4, 4, 3), dtype=np.float32)
    nan = deep.copy()
    nan[1, 2] = np.nan
    return {
        "empty": Broken("jpg", b"", "the file is empty"),
        "html page": Broken("jpg", b"<!DOCTYPE html><html>404</html>", "not an image file"),
        "zip": Broken("png", _zip(), "not an image file"),
        "first bytes of a jpeg": Broken("jpg", jpeg[:4], r"\w"),
        "header of a jpeg": Broken("jpg", jpeg[:300], r"\w"),
        "quarter of a jpeg": Broken("jpg", jpeg[: len(jpeg) // 4], r"\w"),
        "half a jpeg": Broken("jpg", jpeg[: len(jpeg) // 2], "cut off"),
        "all but the end of a jpeg": Broken("jpg", jpeg[:-2], "cut off"),
        "half a progressive jpeg": Broken("jpg", encoded(noise(), "JPEG", progressive=True)[:2000], r"\w"),
        "jpeg with zeros at its end": Broken("jpg", _zero_tail(jpeg), "cut off"),
        "jpeg of no pixels": Broken("jpg", _with_jpeg_size(jpeg, 0, 64), "the image is empty"),
        "huge jpeg": Broken("jpg", _with_jpeg_size(jpeg, 65_000, 65_000), "65000 x 65000 .*data.max_image_bytes"),
        "half a png": Broken("png", whole_png[: len(whole_png) // 2], "cut off"),
        "png without its end": Broken("png", whole_png[:-12], "cut off"),
        "png with zeros at its end": Broken("png", _zero_tail(whole_png), "damaged: wrong checksum"),
        "png with one wrong byte": Broken(
            "png", whole_png[:999] + b"\0" + whole_png[1000:], "wrong checksum of 'IDAT'"
        ),
        "png with wrong compression": Broken("png", png(4, 4, png_chunk(b"IDAT", b"no zlib stream")), r"\w"),
        "16-bit png with wrong compression": Broken(
            "png", png(4, 4, png_chunk(b"IDAT", zlib.compress(bytes(100))[:-6]), depth=16), r"\w"
        ),
        "png without pixels": Broken("png", png(4, 4), "lacks its header or its pixels"),
        "png of no size": Broken("png", png(0, 4, png_chunk(b"IDAT", lines)), "the image is empty"),
        "huge png": Broken("png", png(10**6, 10**6, png_chunk(b"IDAT", lines)), "data.max_image_bytes"),
        "palette png without a palette": Broken("png", png(4, 4, png_chunk(b"IDAT", lines), colour_type=3), "palette"),
        "png with a cut palette": Broken(
            "png",
            png(4, 4, png_chunk(b"PLTE", b"\1\2"), png_chunk(b"IDAT", lines), colour_type=3),
            "palette",
        ),
        "half a webp": Broken("webp", encoded(noise(), "WEBP")[:1000], r"\w"),
        "huge gif": Broken("gif", gif[:6] + struct.pack("<HH", 60_000, 60_000) + gif[10:], "data.max_image_bytes"),
        "gif without frames": Broken("gif", gif[:13] + gif[13 : 13 + 3 * 256] + b";", r"\w"),
        "half a gif": Broken("gif", gif[: len(gif) // 2], r"\w"),
        "half a bmp": Broken("bmp", encoded(noise(), "BMP")[:4000], r"\w"),
        "tiff with wrong offsets": Broken("tif", tiff[:4] + struct.pack("<I", 10**8) + tiff[8:], r"\w"),
        "tiff header alone": Broken("tif", tiff[:8], r"\w"),
        "half a tiff": Broken("tif", encoded(noise(), "TIFF", compression="tiff_lzw")[:4000], r"\w"),
        "pickled objects": Broken(
            "npy", npy(np.array([[{"a": 1}]], dtype=object)), "an array of Python objects, which are not loaded"
        ),
        "bare pickle": Broken("npy", pickle.dumps([1, 2]), "not an image file"),
        "cut npy": Broken("npy", npy(np.zeros((8, 8, 3), np.uint8))[:-5], "cut off"),
        "cut npy header": Broken("npy", npy(np.zeros((8, 8, 3), np.uint8))[:40], r"not a readable \.npy file"),
        "damaged npy header": Broken("npy", _npy_header("(8, __import__('os'))"), r"not a readable \.npy file"),
        "huge npy": Broken("npy", _npy_header("(1000000, 1000000, 3)"), "data.max_image_bytes"),
        "npy of huge channels": Broken("npy", _npy_header("(10, 10, 10000000000)"), "cut off|empty|max_image_bytes"),
        "npy of no pixels": Broken("npy", npy(np.zeros((0, 8, 3), np.uint8)), "the image is empty"),
        "npy of one axis": Broken("npy", npy(np.zeros(8, np.uint8)), r"shape \[8\]"),
        "npy of integers": Broken("npy", npy(np.zeros((8, 8, 3), np.int64)), "type int64"),
        "npy of other channels": Broken("npy", npy(np.zeros((8, 8, 5), np.uint8)), "3 channels .* the image has 5"),
        "npy of NaN": Broken("npy", npy(nan), "NaN or infinite"),
        "npy of infinity": Broken("npy", npy(deep + np.inf), "NaN or infinite"),
        "npy out of range": Broken("npy", npy(deep + 255), r"from 255 to 255; scale them to \[0, 1\]"),
        "negative npy": Broken("npy", npy(deep - 1), "from -1 to -1"),
    }
