"""Files of known samples, and the pixels that they mean."""

import io
import zlib

import numpy as np
import tifffile

from ssl_vit.data.decode.decode import decode
from ssl_vit.data.decode.formats import upright_size
from tests.data.broken import png, png_chunk

RNG = np.random.default_rng(7)
SIZES = {8: np.uint8, 16: np.uint16, 32: np.float32}


def drawn(*shape: int, bits: int = 8) -> np.ndarray:
    """Samples of this many bits: unsigned numbers, floats for 32."""
    if bits == 32:
        return RNG.random(shape, dtype=np.float32)
    return RNG.integers(0, 2**bits, shape).astype(np.uint8 if bits <= 8 else np.uint16)


def eighths(values: np.ndarray, bits: int) -> np.ndarray:
    """The same in [0, 255]: what each of them means."""
    return np.rint(values.astype(np.float64) * 255 / (1 if bits == 32 else 2**bits - 1)).astype(np.int64)


def tiff(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, metadata=None, **options)
    return buffer.getvalue()


def check(data: bytes, expected: np.ndarray, num_channels: int | None = None, tolerance: int = 0) -> None:
    """`expected`: [h w] or [h w c]."""
    expected = expected.reshape(*expected.shape[:2], -1)
    found = decode(data, num_channels or expected.shape[2]).permute(1, 2, 0).numpy().astype(np.int64)
    assert found.shape == expected.shape
    assert upright_size(data, expected.shape[2]) == expected.shape[:2]  # by the header alone
    assert np.abs(found - expected).max() <= tolerance


def chunk_lines(array: np.ndarray, bits: int) -> bytes:
    """An unfiltered IDAT of [h w c] samples."""
    lines = b""
    for line in array.reshape(array.shape[0], -1):
        if bits == 16:
            lines += b"\0" + line.astype(">u2").tobytes()
        else:
            digits = np.unpackbits(line.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :]
            lines += b"\0" + np.packbits(digits.ravel()).tobytes()
    return png_chunk(b"IDAT", zlib.compress(lines))


def write_png(array: np.ndarray, bits: int, *chunks: bytes) -> bytes:
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[array.shape[2]]
    return png(array.shape[1], array.shape[0], *chunks, chunk_lines(array, bits), depth=bits, colour_type=colour_type)
