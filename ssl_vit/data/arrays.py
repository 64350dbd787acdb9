"""Pictures that are arrays of numbers: .npy files, and TIFF files that Pillow does not read whole."""

import io
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from ssl_vit.data.headers import check_size

try:
    import tifffile
except ImportError:
    tifffile = None

NPY_SIGNATURE = b"\x93NUMPY"
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Tags of TIFF files.
_BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA_SAMPLES, _ORIENTATION = 258, 262, 277, 338, 274
_RGB = 2


def to_8_bits(values: np.ndarray) -> np.ndarray:
    """Numbers as uint8: 16-bit ones divided by 257, floats times 255, both to the nearest.

    Raises:
        ValueError: floats that are not all within [0, 1], or numbers of another type.
    """
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint16:
        return ((values.astype(np.int32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind != "f":
        raise ValueError(f"pixels of type {values.dtype}; store them as uint8, as uint16, or as floats within [0, 1]")
    if not np.isfinite(values).all():
        raise ValueError("floating-point pixels that are NaN or infinite; replace them")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise ValueError(f"floating-point pixels from {low:g} to {high:g}; scale them to [0, 1]")
    return np.rint(values.astype(np.float32) * 255).astype(np.uint8)


def decode_npy(data: bytes, num_channels: int, max_pixels: int) -> UInt8[Tensor, "c h w"]:
    """Decode an array of [h, w], [h, w, c] or [c, h, w].

    Of three axes the channels are the last or the first: the one that is `num_channels` long, else the shorter one; of
    two such axes the last.

    Raises:
        ValueError: damaged, or no picture of `num_channels` channels.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        header = read_header(stream)
    except Exception as error:  # a damaged header is evaluated as Python's literals are: SyntaxError, TypeError ...
        raise ValueError("not a readable .npy file: its header is damaged or cut off") from error
    shape = list(header[0])
    dtype = header[2]
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which are not loaded; store the pixels as numbers")
    if len(shape) not in (2, 3):
        raise ValueError(f"an array of shape {shape}; store pictures as [h, w], [h, w, c] or [c, h, w]")
    last = len(shape) == 2 or shape[2] == num_channels or (shape[0] != num_channels and shape[2] <= shape[0])
    height, width = (shape[0], shape[1]) if last else (shape[1], shape[2])
    check_size(height, width, max_pixels)
    stored = len(data) - stream.tell()
    if stored < int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise ValueError(f"the .npy file is cut off: {stored} bytes are too few for shape {shape} of {dtype}")
    stream.seek(0)
    array = np.load(stream, allow_pickle=False)
    array = array.reshape(height, width, -1) if last else array.transpose(1, 2, 0)
    return _to_pixels(array, num_channels, has_alpha=False)


def needs_tifffile(image: Image.Image, num_channels: int) -> bool:
    """Whether Pillow would drop channels or bits of this opened TIFF file that `num_channels` asks for."""
    tags: Any = getattr(image, "tag_v2", {})
    samples, extra = tags.get(_SAMPLES, 1), tags.get(_EXTRA_SAMPLES, ())
    if tags.get(_PHOTOMETRIC) not in (0, 1, _RGB):  # palette, CMYK, YCbCr ...
        return False
    if samples == 1:
        return _has_page_for_each_channel(getattr(image, "n_frames", 1), num_channels)
    return samples > 4 or max(tags.get(_BITS, (8,))) > 8 or (samples == num_channels and 0 in extra)


def _has_page_for_each_channel(num_pages: int, num_channels: int) -> bool:
    """Whether pages are channels: not where they may as well be frames of an animation."""
    return num_channels not in (1, 3, 4) and num_pages == num_channels


def decode_tiff(data: bytes, num_channels: int, max_pixels: int) -> UInt8[Tensor, "c h w"]:
    """Decode the first picture of a TIFF file, of any number of channels and type of numbers that `to_8_bits` takes.

    Where one page holds one channel, and another number than 1, 3 or 4 is asked for, the pages are the channels.

    Raises:
        ValueError: damaged, no picture of `num_channels` channels, or a kind that needs more packages.
    """
    if tifffile is None:
        raise ValueError(
            "a TIFF of floats, of more than 8 bits a channel or of channels other than grey and RGB, which needs "
            "tifffile; run: pip install 'ssl-vit[tiff]'"
        )
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page: Any = file.pages[0]
            samples = int(page.samplesperpixel)
            check_size(page.imagelength, page.imagewidth, max_pixels)
            if samples not in (1, 2, 3, 4, num_channels):  # before memory is taken for them
                _refuse_channels(samples, num_channels)
            if samples == 1 and _has_page_for_each_channel(len(file.pages), num_channels):
                pages: list[Any] = [file.pages[number] for number in range(num_channels)]
                if any(other.shape != page.shape for other in pages):
                    raise ValueError("its pages differ in size, so they are no channels of one picture")
                array = np.stack([other.asarray() for other in pages], axis=-1)
            else:
                array = page.asarray()
                if page.axes[0] == "S":
                    array = np.moveaxis(array, 0, -1)
            array = array.reshape(*array.shape[:2], -1)
            kinds = [int(kind) for kind in page.extrasamples]
            orientation = page.tags.get(_ORIENTATION)
            is_rgb = int(page.photometric) == _RGB
    except ValueError:
        raise
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"not a readable TIFF file: {error or type(error).__name__}") from error
    if kinds == [1] and samples != num_channels:
        raise ValueError("a TIFF whose colours are multiplied by its transparency; store it with straight transparency")
    if is_rgb and kinds == [0] and num_channels in (1, 3):
        array = array[..., :3]  # a fourth channel that is no transparency
    array = _turn(array, int(orientation.value) if orientation else 1)
    return _to_pixels(array, num_channels, has_alpha=kinds == [2])


def _turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """[h w c] turned upright."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


def _to_pixels(array: np.ndarray, num_channels: int, *, has_alpha: bool) -> UInt8[Tensor, "c h w"]:
    """[h w c] of any numbers as pixels; grey and RGB may become each other, other channels have no meaning."""
    present = array.shape[2]
    if present != num_channels and not (present in (1, 3) or has_alpha):
        _refuse_channels(present, num_channels)
    return torch.from_numpy(np.ascontiguousarray(to_8_bits(array))).permute(2, 0, 1)


def _refuse_channels(present: int, num_channels: int) -> None:
    raise ValueError(
        f"{num_channels} channels were asked for and the picture has {present}, of which it does not say that they "
        f"are colours and transparency; give data.mean and data.std {present} values, or store other channels"
    )
