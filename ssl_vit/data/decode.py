"""Image files into uint8 tensors, the same pixels whichever library reads them."""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

try:
    from torchvision.io import decode_image
except ImportError:  # torchvision >= 0.29 announces that its decoders will move to another package
    decode_image = None

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"


def decode(data: bytes | str | Path, num_channels: int) -> UInt8[Tensor, "{num_channels} h w"]:
    """Decode a picture, turned upright as its EXIF data says. Of an animation, the first frame.

    Args:
        data: the encoded file, or its path.
        num_channels: 1 gives greyscale, 3 RGB and 4 RGBA, whatever the file holds; transparent pixels are
            laid on white for 1 and 3. Any other count is given only by a file of exactly that many channels.

    Returns:
        Pixels in [0, 255], the channels of a pixel side by side in memory. 16-bit pictures are divided by 257, so
            65535 becomes 255.

    Raises:
        ValueError: no picture can be read from the data, or not with `num_channels` channels. The text is the
            reason only: the caller knows where the data came from.
        OSError: the path cannot be read.
    """
    if not isinstance(data, bytes):
        data = Path(data).read_bytes()
    if not data:
        raise ValueError("the file is empty")
    pixels = _decode_with_torchvision(data)
    if pixels is None:
        pixels = _decode_with_pillow(data)
    # Pixel by pixel in memory, as decoders write them: crops are then resized more than twice as fast.
    return _to_channels(pixels, num_channels).permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _decode_with_torchvision(data: bytes) -> UInt8[Tensor, "c h w"] | None:
    """Decode at full speed; None for what torchvision cannot read or would read otherwise than Pillow."""
    if decode_image is None or not (data.startswith(_JPEG_SIGNATURE) or _is_plain_png(data)):
        return None
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            # The announcement, made at every call.
            warnings.filterwarnings("ignore", message=".*TorchVision are deprecated")
            pixels = decode_image(buffer, apply_exif_orientation=True)
    except RuntimeError:
        return None  # Pillow has a second try, and the clearer error text
    if data.startswith(_JPEG_SIGNATURE) and pixels.shape[0] == 4:
        return None  # the four channels of a JPEG are CMYK inks, not RGBA
    return _to_8_bits(pixels) if pixels.dtype == torch.uint16 else pixels


def _is_plain_png(data: bytes) -> bool:
    """Whether this PNG's stored samples are its channels, 8 or 16 bits each.

    Not so for palettes, transparency given by a `tRNS` chunk and packed bits: torchvision returns palette
    indices or drops the transparency there.
    """
    if not data.startswith(_PNG_SIGNATURE) or len(data) < 33:
        return False
    bit_depth, colour_type = data[24], data[25]
    end_of_header = data.find(b"IDAT")
    return bit_depth in (8, 16) and colour_type != 3 and data.find(b"tRNS", 0, end_of_header) < 0


def _decode_with_pillow(data: bytes) -> UInt8[Tensor, "c h w"]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            array = _to_array(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError:
        raise ValueError("not an image file, or one of a format that Pillow does not read") from None
    except Exception as error:  # a damaged file raises anything: OSError, SyntaxError, struct.error ...
        raise ValueError(str(error) or type(error).__name__) from error
    pixels = torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)
    return pixels if pixels.dtype == torch.uint8 else _to_8_bits(pixels)


def _to_array(image: Image.Image) -> np.ndarray:
    """Pixels as [h w] or [h w c]: uint8, or int32 within [0, 65535] for 16-bit greyscale."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; convert the picture to 8 or 16 bits")
    if image.mode.startswith("I"):
        wide = np.array(image).astype(np.int32)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError(f"integer pixels from {wide.min()} to {wide.max()} do not fit in 16 bits")
        return wide
    if image.mode == "1":
        return np.array(image.convert("L"))
    if image.mode in ("L", "LA", "RGB", "RGBA") and "transparency" not in image.info:
        return np.array(image)
    return np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _to_8_bits(pixels: Tensor) -> UInt8[Tensor, "c h w"]:
    """16-bit samples to the nearest 8-bit ones."""
    # In int32: few operations know uint16.
    return ((pixels.to(torch.int32) + 128) // 257).to(torch.uint8)


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
