import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ssl_vit.data.decode.decode import decode


def _rgb(height: int = 24, width: int = 32) -> Image.Image:
    ramp = np.add.outer(np.arange(height) * 5, np.arange(width) * 3)
    return Image.fromarray((ramp[..., None] + [0, 20, 40]).astype(np.uint8))


def _rgba() -> Image.Image:
    image = _rgb()
    alpha = np.random.default_rng(0).integers(0, 256, (image.height, image.width), dtype=np.uint8)
    image.putalpha(Image.fromarray(alpha))
    return image


def _encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _with_pillow(data: bytes, mode: str) -> torch.Tensor:
    """What Pillow alone makes of the file, with alpha laid on white for L and RGB."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if mode != "RGBA" and image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    array = np.array(image.convert(mode))
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def _png16(pixels: np.ndarray) -> bytes:
    """A 16-bit RGB PNG, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def _files() -> dict[str, bytes]:
    rgb, rgba, grey = _rgb(), _rgba(), _rgb().convert("L")
    palette = rgb.quantize(16)
    exif = Image.Exif()
    exif[0x112] = 6  # stored lying on its side
    return {
        "rgb png": _encoded(rgb, "PNG"),
        "grey png": _encoded(grey, "PNG"),
        "1-bit png": _encoded(grey.convert("1"), "PNG"),
        "rgba png": _encoded(rgba, "PNG"),
        "grey alpha png": _encoded(rgba.convert("LA"), "PNG"),
        "palette png": _encoded(palette, "PNG"),
        "palette png, one transparent colour": _encoded(palette, "PNG", transparency=3),
        "palette png, alpha table": _encoded(palette, "PNG", transparency=bytes(range(0, 160, 10))),
        "rgb png, transparent colour": _encoded(rgb, "PNG", transparency=(10, 30, 50)),
        "grey png, transparent grey": _encoded(grey, "PNG", transparency=int(np.asarray(grey)[3, 3])),
        "rotated png": _encoded(rgb, "PNG", exif=exif),
        "rgb jpeg": _encoded(rgb, "JPEG"),
        "grey jpeg": _encoded(grey, "JPEG"),
        "cmyk jpeg": _encoded(rgb.convert("CMYK"), "JPEG"),
        "rotated jpeg": _encoded(rgb, "JPEG", exif=exif),
        "webp": _encoded(rgba, "WEBP", lossless=True, exact=True),
        "rotated webp": _encoded(rgb, "WEBP", lossless=True, exif=exif),
        "gif": _encoded(palette, "GIF", transparency=3),
        "bmp": _encoded(rgb, "BMP"),
        "tiff": _encoded(rgb, "TIFF"),
        "cmyk tiff": _encoded(rgb.convert("CMYK"), "TIFF"),
    }


@pytest.mark.parametrize(("num_channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("name", list(_files()))
def test_every_kind_of_file_decodes_to_what_pillow_gives(name: str, num_channels: int, mode: str):
    data = _files()[name]
    pixels = decode(data, num_channels)
    expected = _with_pillow(data, mode)
    assert pixels.dtype == torch.uint8
    assert pixels.permute(1, 2, 0).is_contiguous()
    assert pixels.shape == expected.shape
    # Pillow's own compositing rounds in fixed point.
    tolerance = 1 if Image.open(io.BytesIO(data)).has_transparency_data and mode != "RGBA" else 0
    assert (pixels.int() - expected.int()).abs().max() <= tolerance


def test_exif_orientation_turns_the_image():
    exif = Image.Exif()
    exif[0x112] = 6
    assert decode(_encoded(_rgb(24, 32), "JPEG", exif=exif), 3).shape == (3, 32, 24)


def test_transparent_pixels_become_white():
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert decode(_encoded(clear, "PNG"), 3).unique().tolist() == [255]
    assert decode(_encoded(clear, "PNG"), 1).unique().tolist() == [255]
    assert decode(_encoded(clear, "PNG"), 4)[:, 0, 0].tolist() == [200, 0, 0, 0]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(file_format: str):
    stored = np.array([[0, 257, 300, 386, 32896, 65535]], dtype=np.uint16)
    pixels = decode(_encoded(Image.fromarray(stored), file_format), 3)
    assert pixels.shape == (3, 1, 6)
    assert pixels[1].tolist() == [[0, 1, 1, 2, 128, 255]]  # 386 / 257 = 1.502


def test_16_bit_rgb_png_is_scaled():
    stored = np.array([[[0, 257, 65535], [386, 32896, 128]]])
    assert decode(_png16(stored), 3).tolist() == [[[0, 2]], [[1, 128]], [[255, 0]]]


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_many(file_format: str):
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = _encoded(first, file_format, save_all=True, append_images=[second], **options)
    assert decode(data, 3)[:, 4, 4].tolist() == [255, 0, 0]


def test_paths_are_read(tmp_path):
    path = tmp_path / "image.png"
    _rgb().save(path)
    expected = decode(path.read_bytes(), 3)
    assert torch.equal(decode(path, 3), expected)
    assert torch.equal(decode(str(path), 3), expected)
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "absent.png", 3)


def test_another_count_of_channels_only_where_the_file_has_it():
    grey_alpha = _encoded(_rgba().convert("LA"), "PNG")
    assert decode(grey_alpha, 2).shape == (2, 24, 32)
    with pytest.raises(ValueError, match=r"^2 channels were asked for and the image has 3"):
        decode(_encoded(_rgb(), "PNG"), 2)
    with pytest.raises(ValueError, match=r"^5 channels were asked for and the image has 1"):
        decode(_encoded(_rgb().convert("L"), "JPEG"), 5)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_file_is_refused(file_format: str):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = _encoded(noise, file_format)
    with pytest.raises(ValueError, match=r"\w"):
        decode(data[: len(data) // 2], 3)


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match="the file is empty"):
        decode(b"", 3)
    with pytest.raises(ValueError, match="not an image file"):
        decode(b"<html>404</html>", 3)


def test_pixels_without_a_range_are_refused():
    floats = Image.fromarray(np.full((4, 4), 255, dtype=np.float32))
    with pytest.raises(ValueError, match=r"floating-point pixels from 255 to 255; scale them to \[0, 1\]"):
        decode(_encoded(floats, "TIFF"), 1)
    integers = Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32))
    with pytest.raises(ValueError, match="a TIFF of signed integers; store uint8, uint16, or floats"):
        decode(_encoded(integers, "TIFF"), 1)
