"""Images that are arrays of numbers: .npy files, and TIFF files that Pillow does not read whole."""

import io
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ssl_vit.data.decode.bounds import check_before_opening, check_size
from ssl_vit.data.decode.headers import TIFFPage, read_jpeg

try:
    import tifffile
except ImportError:
    tifffile = None

NPY_SIGNATURE = b"\x93NUMPY"
_STRIP = 2**22  # numbers that are converted at once
ROUNDING = 1e-3
"""Floats this far outside [0, 1] are clamped: resizing, half precision and rounding leave such values."""


def to_8_bits(values: np.ndarray, bits: int | None = None) -> np.ndarray:
    """Round numbers to uint8: unsigned ones of b bits are divided by (2^b - 1) / 255, floats multiplied by 255.

    Args:
        values: of any shape.
        bits: of unsigned numbers; None = all bits of their type.

    Raises:
        ValueError: floats farther outside [0, 1] than `ROUNDING`, or numbers of another type.
    """
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype in (np.uint8, np.uint16):
        white = 2 ** (bits or 8 * values.dtype.itemsize) - 1
        if white == 255:
            return values
        return by_strips(lambda part: (part.astype(np.int32) * 255 + white // 2) // white, values)
    if values.dtype.kind != "f":
        span = f" from {values.min()} to {values.max()}" if values.dtype.kind in "iu" and values.size else ""
        raise ValueError(
            f"pixels of type {values.dtype}{span}; store them as uint8, as uint16, or as floats within [0, 1]"
        )
    low, high = float(values.min()), float(values.max())  # NaN where there is one
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("floating-point pixels that are NaN or infinite; replace them")
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(f"floating-point pixels from {low:g} to {high:g}; scale them to [0, 1]")
    return by_strips(lambda part: np.rint(np.clip(part.astype(np.float32), 0, 1) * 255), values)


def by_strips(function: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """Apply a function of pixels to a few lines at a time, since it takes several times their memory; as uint8.

    Args:
        function: takes lines of each array, returns as many.
        arrays: of the same height, their first axis.
    """
    height = len(arrays[0])
    lines = max(1, _STRIP * height // max(1, arrays[0].size))
    first = function(*(array[:lines] for array in arrays))
    out = np.empty((height, *first.shape[1:]), dtype=np.uint8)
    out[:lines] = first
    for top in range(lines, height, lines):
        out[top : top + lines] = function(*(array[top : top + lines] for array in arrays))
    return out


def read_npy(file: Any, num_channels: int | None = None) -> tuple[list[int], np.dtype, bool]:
    """Read the header of a .npy file, up to the first number.

    Returns:
        the array's shape, its type, and whether the last axis holds the channels, if there are any. Of three axes the
        channels are the last or the first: the one that is `num_channels` long, else the shorter one, else the last.

    Raises:
        ValueError: damaged, or no image.
    """
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        header = read_header(file)
    except Exception as error:  # the header is a Python literal: SyntaxError, TypeError ...
        raise ValueError("not a readable .npy file: its header is damaged or cut off") from error
    shape, dtype = list(header[0]), header[2]
    if not all(type(length) is int and length >= 0 for length in shape):  # numpy accepts True and -3
        raise ValueError(f"an array of shape {str(shape)[:80]}, which no array has")
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which are not loaded; store the pixels as numbers")
    if len(shape) not in (2, 3):
        raise ValueError(f"an array of shape {shape}; store images as [h, w], [h, w, c] or [c, h, w]")
    if dtype.kind not in "biufc" or dtype.itemsize > 16 or dtype.subdtype is not None:
        raise ValueError(
            f"pixels of type {str(dtype)[:80]}; store them as uint8, as uint16, or as floats within [0, 1]"
        )
    last = len(shape) == 2 or shape[2] == num_channels or (shape[0] != num_channels and shape[2] <= shape[0])
    return shape, dtype, last


def decode_npy(data: bytes, num_channels: int, max_image_bytes: int) -> UInt8[Tensor, "c h w"]:
    """Decode a .npy file of [h, w], [h, w, c] or [c, h, w], see `read_npy`.

    Raises:
        ValueError: damaged, or no image of `num_channels` channels.
    """
    stream = io.BytesIO(data)
    shape, dtype, last = read_npy(stream, num_channels)
    height, width = (shape[0], shape[1]) if last else (shape[1], shape[2])
    count = int(np.prod(shape, dtype=object))
    check_size(height, width, count // max(1, height * width) * dtype.itemsize, max_image_bytes)
    stored = len(data) - stream.tell()
    if count == 0 or stored < count * dtype.itemsize:
        problem = f"the .npy file is cut off: {stored} bytes are too few" if count else "the image is empty"
        raise ValueError(f"{problem}: shape {shape} of {dtype}")
    stream.seek(0)
    array = np.load(stream, allow_pickle=False)
    array = array.reshape(height, width, -1) if last else array.transpose(1, 2, 0)
    if array.shape[2] not in (1, 3, num_channels):
        refuse_channels(array.shape[2], num_channels)
    return as_tensor(to_8_bits(array))


def as_tensor(array: UInt8[np.ndarray, "h w *c"]) -> UInt8[Tensor, "c h w"]:
    return torch.from_numpy(np.ascontiguousarray(array.reshape(*array.shape[:2], -1))).permute(2, 0, 1)


_PHOTOMETRIC = {
    4: "a mask of transparency",
    9: "ICC L*a*b* colours",
    10: "ITU L*a*b* colours",
    32803: "a camera's raw values",
    32844: "LogL values",
    32845: "LogLuv values",
    34892: "a camera's raw values",
}


def check_tiff(page: TIFFPage) -> None:
    """Refuse a page whose numbers do not say what is black and what is white.

    Raises:
        ValueError: such a page.
    """
    kinds = {"i": "signed integers", "c": "complex numbers", "V": "numbers of unknown or of several types"}
    what = kinds.get(page.kind)
    if what is None and page.bits == 0:
        what = "samples of different bits"
    if what is None and page.kind == "u" and page.bits > 16:
        what = f"integers of {page.bits} bits"
    if what is not None:
        raise ValueError(f"a TIFF of {what}; store uint8, uint16, or floats within [0, 1]")
    if page.photometric not in (0, 1, 2, 3, 5, 6, 8):
        what = _PHOTOMETRIC.get(page.photometric, f"photometric interpretation {page.photometric}")
        raise ValueError(f"a TIFF of {what}, which is no grey, RGB, palette, CMYK, YCbCr or L*a*b*; convert it")
    if page.depth > 1:
        raise ValueError(f"a TIFF that is a volume of {page.depth} layers; store the layers as pages or files")


def pillow_reads(page: TIFFPage, num_channels: int) -> bool:
    """Whether Pillow, if it reads this page at all, keeps everything that `num_channels` asks for."""
    if page.photometric not in (0, 1, 2):
        return True
    if page.samples == 1:
        return page.bits in (1, 2, 4, 8, 16) or page.kind == "f"
    if page.bits != 8 or page.photometric == 0:
        return False
    if page.extra in ((), (1,), (2,)):
        return page.colours == {1: 1, 2: 3}[page.photometric]
    return page.photometric == 2 and num_channels in (1, 3) and page.samples == 4


def read_tiff_page(
    data: bytes, number: int, page: TIFFPage, num_channels: int, max_image_bytes: int
) -> UInt8[Tensor, "c h w"]:
    """Decode a page of grey or RGB with tifffile: any number of channels, any type of numbers of `to_8_bits`.

    Returns:
        all samples where there are `num_channels`; else the colours, with the transparency if there is one.

    Raises:
        ValueError: damaged, no image of `num_channels` channels, or a kind that needs more packages.
    """
    if page.photometric not in (0, 1, 2):
        raise ValueError("a TIFF of a palette, CMYK, YCbCr or L*a*b* that Pillow does not read; store it as RGB")
    colours = {0: 1, 1: 1, 2: 3}[page.photometric]
    alpha = next((place for place, kind in enumerate(page.extra, start=colours) if kind in (1, 2)), None)
    chosen = list(range(page.samples))
    if page.samples != num_channels:  # checked before memory is taken
        if num_channels not in (1, 3, 4) or (colours == 1 and page.samples > 1 and alpha is None):
            refuse_channels(page.samples, num_channels)
        chosen = [*range(colours), *([] if alpha is None else [alpha])]
    if tifffile is None:
        raise ValueError(
            "a TIFF of floats, of more than 8 bits a channel or of channels other than grey and RGB, which needs "
            "tifffile; run: pip install 'ssl-vit[tiff]'"
        )
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            stored: Any = file.pages[number]
            _check_stored(data, stored, page, max_image_bytes)
            array = stored.asarray(maxworkers=1)
            array = np.moveaxis(array, 0, -1) if stored.axes[0] == "S" else array
            array = array.reshape(page.height, page.width, page.samples)
            orientation = stored.tags.get(274)
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"not a readable TIFF file: {error or type(error).__name__}") from error
    if alpha is not None and page.extra[alpha - colours] == 1:
        array = _divide_by_alpha(array, colours, alpha, 1 if page.kind == "f" else 2**page.bits - 1)
    pixels = to_8_bits(array[..., chosen] if len(chosen) < page.samples else array, page.bits)
    if page.photometric == 0:
        pixels = np.concatenate([255 - pixels[..., :1], pixels[..., 1:]], axis=-1)
    return as_tensor(_turn(pixels, int(orientation.value) if orientation else 1))


# Compressions: with decoders that write no more than they are asked for; and with a whole file in each tile or strip,
# whose header says how large it becomes.
_PLAIN, _JPEG, _FILES = (1, 5, 8, 32773, 32946, 34925, 50000), (7,), (33003, 33005, 34712, 50001)


def _check_stored(data: bytes, stored: Any, page: TIFFPage, max_image_bytes: int) -> None:
    """Refuse a page for which tifffile would take more memory than `page` says, as where a tag is in the file twice."""
    tile = (stored.tilelength, stored.tilewidth) if stored.is_tiled else (0, 0)
    if stored.size != page.height * page.width * page.samples or stored.tiledepth > 1 or tile != page.tile:
        raise ValueError("its tags contradict each other")
    if stored.compression not in _PLAIN + _JPEG + _FILES:
        raise ValueError(f"compression {int(stored.compression)} is not read; store it with deflate, LZW or zstd")
    if stored.compression in _PLAIN:
        return
    for start, count in zip(stored.dataoffsets, stored.databytecounts, strict=False):
        part = data[start : start + count]
        if stored.compression in _FILES:
            check_before_opening(part, max_image_bytes)
        elif part and (header := read_jpeg(part)) is not None:
            check_size(header.height, header.width, header.bytes_a_pixel, max_image_bytes)
        elif part:
            raise ValueError("a tile or strip is no JPEG file")


def _divide_by_alpha(array: np.ndarray, colours: int, alpha: int, white: int) -> np.ndarray:
    """Undo the multiplication of colours [h w c] by their transparency."""
    weight = array[..., alpha : alpha + 1].astype(np.float64) / white
    straight = np.minimum(array[..., :colours] / np.maximum(weight, 1e-9), white) * (weight > 0)
    array = array.copy()
    array[..., :colours] = straight if array.dtype.kind == "f" else np.rint(straight)
    return array


def _turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn [h w c] upright, as the tag `orientation` says."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


def refuse_channels(present: int, num_channels: int) -> NoReturn:
    raise ValueError(
        f"{num_channels} channels were asked for and the image has {present}, of which it does not say that they "
        f"are colours and transparency; give data.mean and data.std {present} values, or store other channels"
    )
