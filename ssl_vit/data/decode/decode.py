"""Decodes image files to uint8 tensors, the same pixels whichever library reads them."""

import warnings
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
    by_strips,
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
"""What is decoded of a file of several pages or frames: the first, all as channels, or the one of this number."""

try:
    from torchvision.io import decode_image
except ImportError:  # torchvision >= 0.29 announces that its decoders will move to another package
    decode_image = None


def decode(
    data: bytes | str | Path, num_channels: int, max_image_bytes: int = MAX_IMAGE_BYTES, pages: Pages = "first"
) -> UInt8[Tensor, "{num_channels} h w"]:
    """Decode an image, turned upright as its orientation tag says, in sRGB.

    Reads any file of `IMAGE_SUFFIXES`: JPEG, PNG, WebP, GIF, BMP, TIFF (of any number of channels with the extra
    `tiff`), JPEG 2000, AVIF, HEIC (with the extra `heic`), PPM, TGA and a few more, and .npy arrays of [h, w],
    [h, w, c] or [c, h, w]. Applies what tags say of the pixels: orientation, transparency, palettes, inks, white as 0,
    byte order, and ICC profiles (to 8 bits, with the profile's own intent). Ignores, as Pillow does, PNG's gAMA, cHRM
    and cICP, primaries and transfer functions of TIFF, and the Exif colour space.

    Numbers become 8 bits: unsigned ones of b bits are divided by (2^b - 1) / 255; floats within [0, 1], or up to 1e-3
    outside, are multiplied by 255. Other numbers, signed integers, NaN and infinity are refused, since nothing says
    which of them are black and white.

    A file that is cut off is refused, and so is a JPEG or PNG whose end was overwritten by zeros. BMP, WebP and
    uncompressed TIFF have no checksum that tells such zeros from pixels.

    Args:
        data: the encoded file, or its path.
        num_channels: 1 gives greyscale, 3 RGB and 4 RGBA, whatever the file holds; for 1 and 3 transparent pixels are
            laid on white. Any other number needs a file of exactly that many channels.
        max_image_bytes: limit of the file, and of its pixels by its header: height x width x samples x bytes of a
            sample, with what the decoder takes beside them. Larger images are refused before memory is taken. While
            pixels are converted, a few times as much is in use for moments.
        pages: see `Pages`. Channels may be on several pages of a TIFF alone, all of one size.

    Returns:
        Pixels in [0, 255], the channels of a pixel side by side in memory.

    Raises:
        ValueError: no whole image can be read from the data, or not with `num_channels` channels, whatever a library
            raised. The text gives the reason only: the caller knows where the data came from.
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
    elif pages == "channels" and not data.startswith(JPEG_SIGNATURE) and len(page_numbers(data, max_image_bytes)) > 1:
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
            return to_srgb(pixels, header.profile)
        del pixels
    return _decode_with_pillow(data, max_image_bytes)


def _decode_png(data: bytes, max_image_bytes: int, number: int) -> UInt8[Tensor, "c h w"]:
    """Decode with Pillow, which is as fast. torchvision keeps all 16 bits of colours, but crashes on damaged files."""
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
            return to_srgb(read_tiff_page(data, number, page, num_channels, max_image_bytes), page.profile)
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
    count = sum(page.samples for _, page in chosen)
    if count != num_channels:
        raise ValueError(
            f"{num_channels} channels were asked for and its {len(chosen)} pages hold {count}; give data.mean and "
            f"data.std {count} values, or --data.pages first"
        )
    if any((page.height, page.width, page.photometric > 2) != (first.height, first.width, False) for _, page in chosen):
        raise ValueError("its pages differ in size or are no plain numbers, so they are no channels of one image")
    check_size(first.height, first.width, sum(page.bytes_a_pixel for _, page in chosen), max_image_bytes)
    return torch.cat([read(number, page, page.samples) for number, page in chosen])


def _decode_with_torchvision(data: bytes) -> Tensor | None:
    """Decode to the stored samples at full speed; None for what torchvision cannot read."""
    if decode_image is None:
        return None
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            # The announcement comes at every call.
            warnings.filterwarnings("ignore", message=".*TorchVision are deprecated")
            return decode_image(buffer, apply_exif_orientation=True)
    except RuntimeError:
        return None  # Pillow tries again, and has the clearer error text


def _decode_with_pillow(
    data: bytes, max_image_bytes: int, number: int = 0, tiff: tuple[TIFFPage, int] | None = None
) -> UInt8[Tensor, "c h w"]:
    """Decode a page or frame.

    Args:
        tiff: of a TIFF how the page is stored, and the number of channels wanted.
    """
    try:
        with open_image(data, max_image_bytes) as image:
            for frame in range(image.tell() + 1 if image.format == "GIF" else number, number + 1 if number else 0):
                image.seek(frame)  # a GIF's one by one, since each may be larger
                check_opened(image, max_image_bytes)
            profile = image.info.get("icc_profile") or b""
            is_tga = image.format == "TGA"
            array = _to_array(_upright(image), profile, data)
            if is_tga and not data[17] & 15 and array.shape[2:] == (4,) and not array[..., 3].any():
                array = array[..., :3]  # the fourth byte is not declared as transparency, and empty
    except (Image.UnidentifiedImageError, SyntaxError) as error:
        if tiff is not None:
            return to_srgb(read_tiff_page(data, number, *tiff, max_image_bytes), tiff[0].profile)
        if isinstance(error, SyntaxError):
            raise ValueError(str(error) or "SyntaxError") from error
        raise ValueError("not an image file, or one of a format that is not read") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises anything: OSError, struct.error ...
        raise ValueError(str(error) or type(error).__name__) from error
    pixels = as_tensor(array)
    if tiff is not None and tiff[0].photometric == 0 and image.mode not in ("1", "L"):  # Pillow inverts those two
        pixels = 255 - pixels
    return to_srgb(pixels, profile)


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
        # Pillow widens samples of fewer bits, but not the grey that is transparent.
        depth = data[24] if image.mode == "L" else 8
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
    """Stored pixels as 8 bits, with an alpha that is 0 where they have the one transparent grey or colour."""
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
        colour = as_tensor(by_strips(_on_white, *(part.permute(1, 2, 0).numpy() for part in (colour, alpha))))
    if num_channels == 1 and colour.shape[0] == 3:
        return as_tensor(by_strips(_to_grey, colour.permute(1, 2, 0).numpy()))
    return colour.expand(num_channels, -1, -1)


def _on_white(colour: UInt8[np.ndarray, "h w c"], alpha: UInt8[np.ndarray, "h w 1"]) -> UInt8[np.ndarray, "h w *c"]:
    image = Image.fromarray(colour[..., 0] if colour.shape[2] == 1 else colour)
    white = Image.new(image.mode, image.size, "white")
    white.paste(image, mask=Image.fromarray(alpha[..., 0]))
    return np.asarray(white)


def _to_grey(rgb: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    return np.asarray(Image.fromarray(rgb).convert("L"))
