"""Image files into uint8 tensors, the same pixels whichever library reads them."""

import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from ssl_vit.data.decode.arrays import (
    NPY_SIGNATURE,
    as_tensor,
    check_tiff,
    decode_npy,
    pillow_reads,
    read_tiff_page,
    refuse_channels,
    to_8_bits,
)
from ssl_vit.data.decode.bounds import MAX_IMAGE_BYTES, check_opened, check_size, read_file
from ssl_vit.data.decode.colour import inks_to_srgb, to_srgb
from ssl_vit.data.decode.formats import open_image, page_numbers
from ssl_vit.data.decode.headers import (
    JPEG_SIGNATURE,
    PNG_SIGNATURE,
    TIFF_SIGNATURES,
    TIFFPage,
    full_pages,
    is_sound_png16,
    read_jpeg,
    read_png,
)

Pages = Literal["first", "channels"] | int
"""What of a file of several pages or frames is decoded: the first, all as channels, or the one of this number."""

_STRIP = 2**22  # pixels that are converted at once

try:
    from torchvision.io import decode_image
except ImportError:  # torchvision >= 0.29 announces that its decoders will move to another package
    decode_image = None


def decode(
    data: bytes | str | Path, num_channels: int, max_image_bytes: int = MAX_IMAGE_BYTES, pages: Pages = "first"
) -> UInt8[Tensor, "{num_channels} h w"]:
    """Decode an image, turned upright as its orientation tag says, in the colours of sRGB.

    Any file of `IMAGE_SUFFIXES`: JPEG, PNG, WebP, GIF, BMP, TIFF (of any number of channels with the extra `tiff`),
    JPEG 2000, AVIF, HEIC (with the extra `heic`), PPM, TGA and some more, and .npy arrays of [h, w], [h, w, c] or
    [c, h, w]. What a tag says of the pixels is applied: orientation, transparency, palettes, inks, white as 0, byte
    order, and ICC profiles (to 8 bits, with the profile's own intent). PNG's gAMA, cHRM and cICP, primaries and
    transfer functions of TIFF, and the Exif colour space are not, as in Pillow.

    Numbers become 8 bits by what they say of white: unsigned ones of b bits are divided by (2^b - 1) / 255, floats
    within [0, 1], and up to 1e-3 outside, multiplied by 255. Others, signed integers, NaN and infinity are refused,
    since they do not say what is black and what is white.

    A file that is cut off is refused, and so is a JPEG or PNG whose end was overwritten by zeros. In BMP, WebP and
    uncompressed TIFF zeros are pixels as good as any, with no checksum to tell them from an image's own.

    Args:
        data: the encoded file, or its path.
        num_channels: 1 gives greyscale, 3 RGB and 4 RGBA, whatever the file holds; transparent pixels are
            laid on white for 1 and 3. Any other count is given only by a file of exactly that many channels.
        max_image_bytes: of the file, and of what its header says of its pixels: height x width x samples x bytes of a
            sample, with what its decoder takes beside them. More is refused before memory is taken for it. For moments
            a few times as much is in use, while pixels are converted.
        pages: see `Pages`. Channels may be on several pages of a TIFF alone, all of one size.

    Returns:
        Pixels in [0, 255], the channels of a pixel side by side in memory.

    Raises:
        ValueError: no whole image can be read from the data, or not with `num_channels` channels, whatever a library
            raised. The text is the reason only: the caller knows where the data came from.
        OSError: the path cannot be read, or is no regular file.
    """
    try:
        if not isinstance(data, bytes):
            data = read_file(Path(data), max_image_bytes)
        return _decode(data, num_channels, max_image_bytes, pages)
    except (ValueError, OSError):
        raise
    except MemoryError as error:
        raise ValueError("too little memory is free to decode it") from error
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _decode(data: bytes, num_channels: int, max_image_bytes: int, pages: Pages) -> UInt8[Tensor, "{num_channels} h w"]:
    if not data:
        raise ValueError("the file is empty")
    if len(data) > max_image_bytes:
        raise ValueError(f"the file holds {len(data):,} bytes, more than data.max_image_bytes={max_image_bytes}")
    number = pages if isinstance(pages, int) else 0
    if data.startswith(TIFF_SIGNATURES):
        pixels = _decode_tiff(data, num_channels, max_image_bytes, pages)
    elif pages == "channels" and not data.startswith(JPEG_SIGNATURE) and len(page_numbers(data)) > 1:
        raise ValueError("several frames, and data.pages='channels': only a TIFF's pages are channels; take 'first'")
    elif data.startswith(NPY_SIGNATURE):
        pixels = decode_npy(data, num_channels, max_image_bytes)
    elif data.startswith(JPEG_SIGNATURE) and number == 0:
        pixels = _decode_jpeg(data, max_image_bytes)
    elif data.startswith(PNG_SIGNATURE):
        pixels = _decode_png(data, max_image_bytes, number)
    else:
        pixels = _decode_with_pillow(data, max_image_bytes, number)
    # Pixel by pixel in memory, as decoders write them: crops are then resized more than twice as fast.
    check_size(pixels.shape[1], pixels.shape[2], num_channels, max_image_bytes)
    return _to_channels(pixels, num_channels).permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _decode_jpeg(data: bytes, max_image_bytes: int) -> UInt8[Tensor, "c h w"]:
    header = read_jpeg(data)
    if header is not None:
        check_size(header.height, header.width, header.bytes_a_pixel, max_image_bytes)
        pixels = None if header.turned_by_xmp else _decode_with_torchvision(data)
        if pixels is not None and pixels.shape[0] != 4:  # the four channels of a JPEG are CMYK inks, not RGBA
            return to_srgb(pixels, header.profile) if header.profile else pixels
        del pixels
    return _decode_with_pillow(data, max_image_bytes)


def _decode_png(data: bytes, max_image_bytes: int, number: int) -> UInt8[Tensor, "c h w"]:
    """By Pillow, which is as fast; torchvision crashes on damaged ones, but keeps all 16 bits of colours."""
    png = read_png(data)
    check_size(png.height, png.width, png.bytes_a_pixel, max_image_bytes)
    pixels = _decode_with_torchvision(data) if number == 0 and is_sound_png16(png) else None
    if pixels is None:
        return _decode_with_pillow(data, max_image_bytes, number)
    values = pixels.permute(1, 2, 0).numpy()
    return to_srgb(as_tensor(_with_alpha(values, 16, png.transparent)), png.profile)


def _decode_tiff(data: bytes, num_channels: int, max_image_bytes: int, pages: Pages) -> UInt8[Tensor, "c h w"]:
    def read(number: int, page: TIFFPage, num_channels: int) -> UInt8[Tensor, "c h w"]:
        check_size(page.height, page.width, page.bytes_a_pixel, max_image_bytes)
        if page.tile != (0, 0):
            check_size(page.tile[0], page.tile[1], page.bytes_a_pixel, max_image_bytes)
        check_tiff(page)
        if not pillow_reads(page, num_channels):
            pixels = read_tiff_page(data, number, page, num_channels, max_image_bytes)
            return to_srgb(pixels, page.profile) if page.profile else pixels
        return _decode_with_pillow(data, max_image_bytes, number, (page, num_channels))

    found = full_pages(data)
    if isinstance(pages, int):
        chosen = [item for item in found if item[0] == pages]
    else:
        chosen = list(found if pages == "channels" else islice(found, 1))
    if not chosen:
        raise ValueError("the TIFF file is damaged or cut off: a page is missing")
    first = chosen[0][1]
    if len(chosen) == 1:
        if pages == "first" and num_channels not in (1, 3, 4, first.samples) and next(found, None):
            raise ValueError(
                f"{num_channels} channels were asked for and the first of several pages has {first.samples}; give "
                "--data.pages channels where each page is a channel"
            )
        return read(*chosen[0], num_channels)
    if sum(page.samples for _, page in chosen) != num_channels:
        count = sum(page.samples for _, page in chosen)
        raise ValueError(
            f"{num_channels} channels were asked for and its {len(chosen)} pages hold {count}; give data.mean and "
            f"data.std {count} values, or --data.pages first"
        )
    if any((page.height, page.width, page.photometric > 2) != (first.height, first.width, False) for _, page in chosen):
        raise ValueError("its pages differ in size or are no plain numbers, so they are no channels of one image")
    check_size(first.height, first.width, sum(page.bytes_a_pixel for _, page in chosen), max_image_bytes)
    return torch.cat([read(number, page, page.samples) for number, page in chosen])


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


def _decode_with_pillow(
    data: bytes, max_image_bytes: int, number: int = 0, tiff: tuple[TIFFPage, int] | None = None
) -> UInt8[Tensor, "c h w"]:
    """A page or frame; of a TIFF, how it is stored and the number of channels wanted."""
    try:
        with open_image(data, max_image_bytes) as image:
            for frame in range(image.tell() + 1 if image.format == "GIF" else number, number + 1 if number else 0):
                image.seek(frame)  # of a GIF one by one, since each may be larger
                check_opened(image, max_image_bytes)
            profile = image.info.get("icc_profile") or b""
            is_tga = image.format == "TGA"
            array = _to_array(_upright(image), profile, data)
            if is_tga and not data[17] & 15 and array.shape[2:] == (4,) and not array[..., 3].any():
                array = array[..., :3]  # a fourth byte that is not said to be transparency, and is empty
    except (Image.UnidentifiedImageError, SyntaxError) as error:
        if tiff is not None:
            pixels = read_tiff_page(data, number, *tiff, max_image_bytes)
            return to_srgb(pixels, tiff[0].profile) if tiff[0].profile else pixels
        if isinstance(error, SyntaxError):
            raise ValueError(str(error) or "SyntaxError") from error
        raise ValueError("not an image file, or one of a format that is not read") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises anything: OSError, struct.error ...
        raise ValueError(str(error) or type(error).__name__) from error
    pixels = as_tensor(array)
    if tiff is not None and tiff[0].photometric == 0 and image.mode not in ("1", "L"):  # which Pillow has inverted
        pixels = 255 - pixels
    return to_srgb(pixels, profile) if profile else pixels


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data raises anything, and the pixels are whole
        return image


def _to_array(image: Image.Image, profile: bytes, data: bytes) -> UInt8[np.ndarray, "h w *c"]:
    if image.mode == "F":
        return to_8_bits(np.array(image))
    if image.mode.startswith("I"):
        wide = np.array(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError(f"integer pixels from {wide.min()} to {wide.max()} do not fit in 16 bits")
        return _with_alpha(wide.astype(np.uint16, copy=False), 16, image.info.get("transparency"))
    if image.mode in ("CMYK", "LAB"):
        return np.array(inks_to_srgb(image, profile))
    if image.mode in ("L", "RGB", "1") and data.startswith(PNG_SIGNATURE):
        depth = data[24] if image.mode == "L" else 8  # samples of fewer bits were widened, what is transparent was not
        transparent = image.info.get("transparency")
        if isinstance(transparent, int) and depth < 8:
            transparent = transparent * 255 // (2**depth - 1)
        return _with_alpha(np.array(image.convert("L") if image.mode == "1" else image), 8, transparent)
    if image.mode == "1":
        return np.array(image.convert("L"))
    if image.mode in ("L", "LA", "RGB", "RGBA") and "transparency" not in image.info:
        return np.array(image)
    if image.mode == "La":
        return np.array(image.convert("LA"))
    return np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _with_alpha(values: np.ndarray, bits: int, transparent: int | tuple[int, ...] | None) -> UInt8[np.ndarray, "h w c"]:
    """8-bit pixels of these stored ones, with an alpha that is 0 where they are of one grey or colour."""
    values = values.reshape(*values.shape[:2], -1)
    pixels = to_8_bits(values, bits)
    if transparent is None or transparent == () or values.shape[2] in (2, 4):
        return pixels
    alpha = np.where((values == np.array(transparent)).all(axis=2, keepdims=True), 0, 255).astype(np.uint8)
    return np.concatenate([pixels, alpha], axis=2)


def _to_channels(pixels: UInt8[Tensor, "c h w"], num_channels: int) -> UInt8[Tensor, "{num_channels} h w"]:
    """Convert between grey, grey + alpha, RGB and RGB + alpha."""
    present = pixels.shape[0]
    if present == num_channels:
        return pixels
    if num_channels not in (1, 3, 4) or present > 4:
        refuse_channels(present, num_channels)
    has_alpha = present in (2, 4)
    colour, alpha = (pixels[:-1], pixels[-1:]) if has_alpha else (pixels, torch.full_like(pixels[:1], 255))
    if num_channels == 4:
        return torch.cat([colour.expand(3, -1, -1), alpha])
    if has_alpha:
        colour = _by_strips(_on_white, colour, alpha)
    if num_channels == 1 and colour.shape[0] == 3:
        return _by_strips(_to_grey, colour)
    return colour.expand(num_channels, -1, -1)


def _by_strips(function: Callable[..., Tensor], *images: UInt8[Tensor, "_ h w"]) -> UInt8[Tensor, "_ h w"]:
    """What a function of pixels gives, some lines at a time: its intermediate numbers take several times the memory."""
    height, width = images[0].shape[1:]
    lines = max(1, _STRIP // width)
    if height <= lines:
        return function(*images)
    first = function(*(image[:, :lines] for image in images))
    out = torch.empty((height, width, len(first)), dtype=torch.uint8).permute(2, 0, 1)
    out[:, :lines] = first
    for top in range(lines, height, lines):
        out[:, top : top + lines] = function(*(image[:, top : top + lines] for image in images))
    return out


def _on_white(colour: UInt8[Tensor, "c h w"], alpha: UInt8[Tensor, "1 h w"]) -> UInt8[Tensor, "c h w"]:
    weight = alpha.to(torch.int32)
    return ((colour * weight + 255 * (255 - weight) + 127) // 255).to(torch.uint8)


def _to_grey(rgb: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "1 h w"]:
    """Luma of ITU-R 601 in 16-bit fixed point, rounded as Pillow does."""
    red, green, blue = rgb.to(torch.int32)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[None]
