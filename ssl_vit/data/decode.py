"""Image files into uint8 tensors, the same pixels whichever library reads them."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from ssl_vit.data.arrays import NPY_SIGNATURE, TIFF_SIGNATURES, decode_npy, decode_tiff, needs_tifffile, to_8_bits
from ssl_vit.data.headers import (
    JPEG_SIGNATURE,
    MAX_PIXELS,
    PNG_SIGNATURE,
    check_size,
    is_sound_png16,
    read_jpeg_size,
    read_png,
)

try:
    from torchvision.io import decode_image
except ImportError:  # torchvision >= 0.29 announces that its decoders will move to another package
    decode_image = None


def decode(
    data: bytes | str | Path, num_channels: int, max_pixels: int = MAX_PIXELS
) -> UInt8[Tensor, "{num_channels} h w"]:
    """Decode a picture, turned upright as its EXIF data says. Of an animation, the first frame.

    Any file that Pillow reads, TIFF files of any number of channels (with the extra `tiff`), and .npy arrays of
    [h, w], [h, w, c] or [c, h, w]. Floats within [0, 1] are multiplied by 255; others, NaN and infinity are refused,
    since they do not say what is black and what is white.

    A file that is cut off is refused, and so is a JPEG or PNG whose end was overwritten by zeros. In BMP, WebP and
    uncompressed TIFF zeros are pixels as good as any, with no checksum to tell them from a picture's own.

    Args:
        data: the encoded file, or its path.
        num_channels: 1 gives greyscale, 3 RGB and 4 RGBA, whatever the file holds; transparent pixels are
            laid on white for 1 and 3. Any other count is given only by a file of exactly that many channels.
        max_pixels: larger pictures, height times width, are refused before memory is taken for them.

    Returns:
        Pixels in [0, 255], the channels of a pixel side by side in memory. 16-bit pictures are divided by 257, so
            65535 becomes 255.

    Raises:
        ValueError: no whole picture can be read from the data, or not with `num_channels` channels. The text is the
            reason only: the caller knows where the data came from.
        OSError: the path cannot be read.
    """
    if not isinstance(data, bytes):
        data = Path(data).read_bytes()
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(NPY_SIGNATURE):
        pixels = decode_npy(data, num_channels, max_pixels)
    elif data.startswith(JPEG_SIGNATURE):
        pixels = _decode_jpeg(data, num_channels, max_pixels)
    elif data.startswith(PNG_SIGNATURE):
        pixels = _decode_png(data, num_channels, max_pixels)
    else:
        pixels = _decode_with_pillow(data, num_channels, max_pixels)
    # Pixel by pixel in memory, as decoders write them: crops are then resized more than twice as fast.
    return _to_channels(pixels, num_channels).permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _decode_jpeg(data: bytes, num_channels: int, max_pixels: int) -> UInt8[Tensor, "c h w"]:
    size = read_jpeg_size(data)
    if size is not None:
        check_size(*size, max_pixels)
        pixels = _decode_with_torchvision(data)
        if pixels is not None and pixels.shape[0] != 4:  # the four channels of a JPEG are CMYK inks, not RGBA
            return pixels
    return _decode_with_pillow(data, num_channels, max_pixels)


def _decode_png(data: bytes, num_channels: int, max_pixels: int) -> UInt8[Tensor, "c h w"]:
    """By Pillow, which is as fast; torchvision crashes on damaged ones, but keeps all 16 bits of colours."""
    png = read_png(data)
    check_size(png.height, png.width, max_pixels)
    pixels = _decode_with_torchvision(data) if is_sound_png16(png) else None
    return _decode_with_pillow(data, num_channels, max_pixels) if pixels is None else _to_8_bits(pixels)


def _decode_with_torchvision(data: bytes) -> Tensor | None:
    """The stored samples as [c h w] at full speed; None for what torchvision cannot read."""
    if decode_image is None:
        return None
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            # The announcement, made at every call.
            warnings.filterwarnings("ignore", message=".*TorchVision are deprecated")
            return decode_image(buffer, apply_exif_orientation=True)
    except RuntimeError:
        return None  # Pillow has a second try, and the clearer error text


def _decode_with_pillow(data: bytes, num_channels: int, max_pixels: int) -> UInt8[Tensor, "c h w"]:
    try:
        with _pillow_alone(), Image.open(io.BytesIO(data)) as image:
            check_size(image.height, image.width, max_pixels)
            if image.format == "TIFF" and needs_tifffile(image, num_channels):
                return decode_tiff(data, num_channels, max_pixels)
            array = _to_array(_upright(image))
    except Image.UnidentifiedImageError:
        if data.startswith(TIFF_SIGNATURES):
            return decode_tiff(data, num_channels, max_pixels)
        raise ValueError("not an image file, or one of a format that Pillow does not read") from None
    except Exception as error:  # a damaged file raises anything: OSError, SyntaxError, struct.error ...
        raise ValueError(str(error) or type(error).__name__) from error
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


@contextmanager
def _pillow_alone() -> Iterator[None]:
    """Without Pillow's own limit of pixels, in whose place is `max_pixels`, and its remarks on odd metadata."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data raises anything, and the pixels are whole
        return image


def _to_array(image: Image.Image) -> UInt8[np.ndarray, "h w *c"]:
    if image.mode == "F":
        return to_8_bits(np.array(image))
    if image.mode.startswith("I"):
        wide = np.array(image).astype(np.int32)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError(f"integer pixels from {wide.min()} to {wide.max()} do not fit in 16 bits")
        return to_8_bits(wide.astype(np.uint16))
    if image.mode == "1":
        return np.array(image.convert("L"))
    if image.mode in ("L", "LA", "RGB", "RGBA") and "transparency" not in image.info:
        return np.array(image)
    return np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _to_8_bits(pixels: Tensor) -> UInt8[Tensor, "c h w"]:
    """16-bit samples to the nearest 8-bit ones."""
    return torch.from_numpy(to_8_bits(pixels.numpy()))


def _to_channels(pixels: UInt8[Tensor, "c h w"], num_channels: int) -> UInt8[Tensor, "{num_channels} h w"]:
    """Convert between grey, grey + alpha, RGB and RGB + alpha."""
    present = pixels.shape[0]
    if present == num_channels:
        return pixels
    if num_channels not in (1, 3, 4):
        raise ValueError(
            f"{num_channels} channels were asked for and the picture has {present}; "
            "pictures are converted to 1 (greyscale), 3 (RGB) or 4 (RGBA) channels only"
        )
    has_alpha = present in (2, 4)
    colour, alpha = (pixels[:-1], pixels[-1:]) if has_alpha else (pixels, torch.full_like(pixels[:1], 255))
    if num_channels == 4:
        return torch.cat([colour.expand(3, -1, -1), alpha])
    if has_alpha:
        colour = _on_white(colour, alpha)
    if num_channels == 1 and colour.shape[0] == 3:
        return _to_grey(colour)
    return colour.expand(num_channels, -1, -1)


def _on_white(colour: UInt8[Tensor, "c h w"], alpha: UInt8[Tensor, "1 h w"]) -> UInt8[Tensor, "c h w"]:
    weight = alpha.to(torch.int32)
    return ((colour * weight + 255 * (255 - weight) + 127) // 255).to(torch.uint8)


def _to_grey(rgb: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "1 h w"]:
    """Luma of ITU-R 601 in 16-bit fixed point, rounded as Pillow does."""
    red, green, blue = rgb.to(torch.int32)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[None]
