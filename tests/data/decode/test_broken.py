"""Broken and incomplete files are refused with a reason, whichever library would take them."""

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data.decode.decode import decode
from ssl_vit.data.decode.formats import upright_size
from tests.data.broken import broken_files, encoded, noise, npy


@pytest.mark.parametrize("name", list(broken_files()))
def test_broken_files_are_refused_with_a_reason(name: str):
    broken = broken_files()[name]
    with pytest.raises(ValueError, match=broken.reason):
        decode(broken.data, 3)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"comment": b"\xff\xd9" * 9}]
)
def test_a_jpeg_cut_anywhere_is_refused(options: dict):
    data = encoded(noise(), "JPEG", **options)
    assert decode(data, 3).shape == (3, 48, 64)
    for end in [*range(1, len(data), 97), *range(len(data) - 20, len(data))]:
        for tail in (b"", bytes(len(data) - end)):
            if data[:end] + tail == data:
                continue
            with pytest.raises(ValueError, match=r"\w"):
                decode(data[:end] + tail, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_a_png_cut_or_changed_anywhere_is_refused(mode: str):
    data = encoded(noise(mode), "PNG")
    for end in range(1, len(data), 61):
        with pytest.raises(ValueError, match=r"\w"):
            decode(data[:end], 3)
    start = data.index(b"IDAT")
    for place in range(start, len(data) - 12, 61):
        with pytest.raises(ValueError, match=r"damaged|cut off"):
            decode(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :], 3)


def test_what_follows_an_image_does_no_harm():
    for file_format in ("JPEG", "PNG"):
        data = encoded(noise(), file_format)
        assert torch.equal(decode(data + bytes(100), 3), decode(data, 3))


def test_a_wrong_suffix_does_no_harm(tmp_path):
    (tmp_path / "png.jpg").write_bytes(encoded(noise(), "PNG"))
    assert decode(tmp_path / "png.jpg", 3).shape == (3, 48, 64)


def test_broken_metadata_does_no_harm():
    exif = Image.Exif()
    exif[0x112] = 6
    for file_format in ("JPEG", "WEBP"):
        data = encoded(noise(), file_format, exif=exif)
        place = data.index(b"Exif\0\0" if file_format == "JPEG" else b"EXIF")
        for damage in (b"\xff" * 24, b"\0" * 24):
            damaged = data[: place + 8] + damage + data[place + 8 + len(damage) :]
            assert decode(damaged, 3).shape[1:] == upright_size(damaged, 3)


def test_huge_headers_are_refused_before_memory_is_taken():
    huge = [broken.data for name, broken in broken_files().items() if name.startswith(("huge", "npy of huge"))]
    assert len(huge) == 5
    tracemalloc.start()
    for data in huge:
        with pytest.raises(ValueError, match=r"\w"):
            decode(data, 3)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_limit_of_bytes_is_a_setting(file_format: str, monkeypatch: pytest.MonkeyPatch):
    data = encoded(noise(), file_format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own does not count
    a_pixel = {"JPEG": 3, "WEBP": 16, "GIF": 5, "PNG": 4, "BMP": 4, "TIFF": 4}[file_format]
    assert decode(data, 3, max_image_bytes=48 * 64 * a_pixel + len(data)).shape == (3, 48, 64)
    with pytest.raises(ValueError, match=r"more than data.max_image_bytes="):
        decode(data, 3, max_image_bytes=48 * 64 * a_pixel - 1)
    with pytest.raises(ValueError, match=rf"the file holds {len(data):,} bytes, more than data.max_image_bytes="):
        decode(data, 3, max_image_bytes=len(data) - 1)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize(("dtype", "a_pixel"), [(np.uint8, 1), (np.uint16, 2), (np.float64, 8)])
def test_the_limit_holds_for_arrays(dtype: type, a_pixel: int):
    data = npy(np.zeros((64, 64), dtype))
    assert decode(data, 1, max_image_bytes=64 * 64 * a_pixel + len(data)).shape == (1, 64, 64)
    with pytest.raises(ValueError, match=r"data.max_image_bytes="):
        decode(data, 1, max_image_bytes=64 * 64 * a_pixel - 1)


def test_the_limit_holds_for_what_an_image_becomes():
    """A grey image may be small, and its colours too many."""
    data = encoded(Image.new("L", (64, 64)), "PNG")
    assert decode(data, 1, max_image_bytes=64 * 64).shape == (1, 64, 64)
    with pytest.raises(ValueError, match=r"64 x 64 pixels, for which 12,288 bytes are needed, more than data"):
        decode(data, 3, max_image_bytes=64 * 64 * 2)


def test_files_that_cannot_be_opened_say_why(tmp_path, monkeypatch: pytest.MonkeyPatch):
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="link"):
        decode(loop, 3)
    with pytest.raises(OSError, match="no regular file"):
        decode(tmp_path, 3)
    monkeypatch.setattr("os.open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(PermissionError):
        decode(tmp_path / "secret.png", 3)
