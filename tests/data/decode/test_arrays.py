import io

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from ssl_vit.data.decode import arrays
from ssl_vit.data.decode.decode import decode
from ssl_vit.data.decode.formats import page_numbers
from tests.data.broken import encoded, npy

RNG = np.random.default_rng(0)


def tiff(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def bytes_of(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def pixels_of(array: np.ndarray) -> torch.Tensor:
    """[h w c] or [h w] as [c h w]."""
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def equal(data: bytes, num_channels: int, expected: np.ndarray) -> bool:
    found = decode(data, num_channels)
    assert found.dtype == torch.uint8
    assert found.permute(1, 2, 0).is_contiguous()
    return torch.equal(found, pixels_of(expected))


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4, 5, 13])
def test_npy_of_any_number_of_channels_last_or_first(num_channels: int):
    array = bytes_of(20, 30, num_channels)
    assert equal(npy(array), num_channels, array)
    assert equal(npy(array.transpose(2, 0, 1)), num_channels, array)
    assert equal(npy(np.asfortranarray(array)), num_channels, array)


def test_npy_channels_are_the_axis_of_the_right_length():
    narrow = bytes_of(2, 30, 5)
    assert equal(npy(narrow), 5, narrow)
    first = bytes_of(5, 4, 3)
    assert equal(npy(first), 5, first.transpose(1, 2, 0))
    square = bytes_of(3, 7, 3)
    assert equal(npy(square), 3, square)
    grey = bytes_of(6, 8)
    assert equal(npy(grey), 1, grey)
    assert equal(npy(grey), 3, np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize("kind", ["npy", "tiff"])
def test_numbers_of_every_type_become_8_bits(kind: str):
    write = npy if kind == "npy" else tiff
    expected = np.array([[0, 1, 2, 128, 255]], dtype=np.uint8)
    assert equal(write(np.array([[0, 257, 386, 32896, 65535]], dtype=np.uint16)), 1, expected)
    for dtype in (np.float16, np.float32, np.float64):
        assert equal(write((expected / 255).astype(dtype)), 1, expected)
    for wrong, reason in ((256.0, "from 0 to 256"), (-0.5, "from -0.5 to 0"), (np.nan, "NaN"), (np.inf, "NaN or inf")):
        for dtype in (np.float16, np.float32):
            with pytest.raises(ValueError, match=reason):
                decode(write(np.array([[0, wrong]], dtype=dtype)), 1)


def test_npy_of_booleans_and_big_endian_numbers():
    assert equal(npy(np.array([[True, False]])), 1, np.array([[255, 0]], dtype=np.uint8))
    assert equal(npy(np.array([[65535, 257]], dtype=">u2")), 1, np.array([[255, 1]], dtype=np.uint8))
    assert equal(npy(np.array([[0.2]], dtype=">f4")), 1, np.array([[51]], dtype=np.uint8))


def test_channels_without_a_meaning_are_not_taken_for_transparency():
    for data in (
        npy(bytes_of(8, 9, 4)),
        tiff(bytes_of(8, 9, 4), photometric="minisblack", planarconfig="contig"),
        npy(bytes_of(8, 9, 2)),
        tiff(bytes_of(8, 9, 7), photometric="minisblack", planarconfig="contig"),
    ):
        with pytest.raises(ValueError, match="3 channels were asked for and the image has"):
            decode(data, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("num_channels", [2, 3, 4, 5, 12])
def test_tiff_of_any_number_of_channels(num_channels: int, planar: str, dtype: type):
    expected = bytes_of(20, 30, num_channels)
    scale = {np.uint8: 1, np.uint16: 257, np.float32: 1 / 255}[dtype]
    array = (expected.astype(np.float64) * scale).astype(dtype)
    stored = array if planar == "contig" else np.moveaxis(array, -1, 0)
    assert equal(tiff(stored, photometric="minisblack", planarconfig=planar), num_channels, expected)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib"])
def test_16_bit_colours_of_tiff_keep_all_bits(compression: str | None):
    expected = np.minimum(bytes_of(20, 30, 3), 254)
    data = tiff(expected.astype(np.uint16) * 257 + 100, photometric="rgb", compression=compression, predictor=None)
    assert equal(data, 3, expected)


def test_a_fourth_channel_of_tiff_is_transparency_only_where_it_says_so():
    array = bytes_of(8, 9, 4)
    wide = array.astype(np.uint16) * 257
    for stored in (array, wide):
        unspecified = tiff(stored, photometric="rgb", extrasamples=["unspecified"])
        assert equal(unspecified, 4, array)
        assert equal(unspecified, 3, array[..., :3])
        straight = tiff(stored, photometric="rgb", extrasamples=["unassalpha"])
        assert equal(straight, 4, array)
        assert torch.equal(decode(straight, 3), decode(encoded(Image.fromarray(array), "PNG"), 3))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_colours_multiplied_by_their_transparency_are_divided_by_it(dtype: type):
    white = 1 if dtype is np.float32 else np.iinfo(dtype).max
    stored = (np.array([[[0.5, 0.25, 0, 0.5], [0.2, 0.4, 0.6, 1], [0, 0, 0, 0]]]) * white).astype(dtype)
    found = decode(tiff(stored, photometric="rgb", extrasamples=["assocalpha"]), 4).permute(1, 2, 0)
    expected = torch.tensor([[[255, 127, 0, 127], [51, 102, 153, 255], [0, 0, 0, 0]]])
    assert (found.int() - expected).abs().max() <= 1


def pages(*arrays: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, **options) as file:
        for array in arrays:
            file.write(array, photometric="minisblack" if array.ndim == 2 else None, metadata=None)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"byteorder": ">"}])
@pytest.mark.parametrize("scale", [1, 257])
def test_pages_are_channels_where_it_is_said(scale: int, options: dict):
    stack = bytes_of(6, 20, 30)
    data = pages(*(stack.astype(np.uint16 if scale > 1 else np.uint8) * scale), **options)
    assert torch.equal(decode(data, 6, pages="channels"), torch.from_numpy(stack))
    assert equal(data, 1, stack[0])
    assert torch.equal(decode(data, 1, pages=4)[0], torch.from_numpy(stack[4]))
    with pytest.raises(ValueError, match="6 channels were asked for and the first of several pages has 1; give --data"):
        decode(data, 6)
    with pytest.raises(ValueError, match=r"5 channels were asked for and its 6 pages hold 6; give data.mean"):
        decode(data, 5, pages="channels")


def test_pages_of_an_ome_tiff_are_channels_as_of_any_other():
    stack = bytes_of(7, 20, 30).astype(np.uint16) * 257
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, stack, ome=True, photometric="minisblack", metadata={"axes": "CYX"})
    assert torch.equal(decode(buffer.getvalue(), 7, pages="channels"), torch.from_numpy(stack // 257).byte())


def test_pages_that_are_no_channels_of_one_image():
    with pytest.raises(ValueError, match="pages differ in size"):
        decode(pages(bytes_of(20, 30), bytes_of(10, 30)), 2, pages="channels")
    gif = encoded(Image.fromarray(bytes_of(8, 9)), "GIF", save_all=True, append_images=[Image.new("L", (9, 8))])
    with pytest.raises(ValueError, match="only a TIFF's pages are channels"):
        decode(gif, 1, pages="channels")
    whole = bytes_of(20, 30, 5)
    assert torch.equal(
        decode(tiff(whole, photometric="minisblack", planarconfig="contig"), 5, pages="channels"), pixels_of(whole)
    )  # one page: all of its samples
    with pytest.raises(ValueError, match="a page is missing"):
        decode(pages(bytes_of(20, 30)), 1, pages=1)


def test_smaller_copies_of_a_page_are_no_pages():
    full, small = bytes_of(2, 20, 30), bytes_of(10, 15)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for array, kind in ((small, 1), (full[0], 0), (small, 1), (full[1], 0)):
            file.write(array, photometric="minisblack", subfiletype=kind, metadata=None)
    data = buffer.getvalue()
    assert equal(data, 1, full[0])
    assert torch.equal(decode(data, 2, pages="channels"), torch.from_numpy(full))
    assert page_numbers(data) == [1, 3]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_tiff_is_turned_as_pillow_turns(orientation: int):
    array = bytes_of(8, 9, 3)
    tag = [(274, "H", 1, orientation, False)]
    wide = tiff(array.astype(np.uint16) * 257, photometric="rgb", extratags=tag)
    assert torch.equal(decode(wide, 3), decode(tiff(array, photometric="rgb", extratags=tag), 3))


def test_the_extra_is_named_where_it_is_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arrays, "tifffile", None)
    grey = bytes_of(8, 9)
    assert equal(tiff(grey), 1, grey)
    assert equal(tiff((grey / 255).astype(np.float32)), 1, grey)
    for array in (bytes_of(8, 9, 5), bytes_of(8, 9, 3).astype(np.uint16)):
        with pytest.raises(ValueError, match=r"pip install 'ssl-vit\[tiff\]'"):
            decode(tiff(array, photometric="rgb"), array.shape[2])


def test_tiff_of_too_many_pixels_or_channels_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda *_, **__: pytest.fail("was read"))
    data = tiff(np.zeros((80, 90, 7), np.uint8), photometric="minisblack", planarconfig="contig", compression="zlib")
    with pytest.raises(ValueError, match=r"80 x 90 pixels, for which 50,400 bytes are needed"):
        decode(data, 7, max_image_bytes=80 * 90 * 7 - 1)
    data = tiff(bytes_of(8, 9, 7), photometric="minisblack", planarconfig="contig")
    with pytest.raises(ValueError, match="the image has 7"):
        decode(data, 6)
