"""Every suffix that is looked for is read, and files say what they hold before anything is decoded."""

import io
from functools import cache
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ssl_vit.data.decode.decode import decode
from ssl_vit.data.decode.formats import (
    IMAGE_SUFFIXES,
    Contents,
    contents,
    file_format,
    hint_for,
    note_of_dropped,
    page_numbers,
    upright_size,
)
from ssl_vit.data.sources.source import DataConfig, open_source
from tests.data.broken import encoded, npy, png, png_chunk

RNG = np.random.default_rng(5)
# Of what a suffix's own format cannot be written by Pillow.
WRITTEN_AS = {"jif": "JPEG", "jfi": "JPEG", "tf8": "TIFF", "btf": "TIFF", "ras": None}
WITHOUT_LOSS = {"PNG", "BMP", "DIB", "TIFF", "PPM", "PCX", "QOI", "TGA"}


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def _sun_raster(pixels: np.ndarray) -> bytes:
    """24 bits, blue first, lines of even length: what Pillow reads and does not write."""
    height, width, _ = pixels.shape
    header = np.array([0x59A66A95, width, height, 24, height * width * 3, 1, 0, 0], dtype=">u4").tobytes()
    return header + pixels[..., ::-1].tobytes()


def _written(suffix: str, pixels: np.ndarray) -> tuple[bytes, bool]:
    """A file of this suffix, and whether it holds exactly these pixels."""
    if suffix == "npy":
        return npy(pixels), True
    if suffix == "ras":
        return _sun_raster(pixels), True
    name = WRITTEN_AS.get(suffix) or Image.registered_extensions()[f".{suffix}"]
    image = Image.fromarray(pixels)
    options: dict = {"JPEG2000": {"irreversible": False}, "WEBP": {"lossless": True}}.get(name, {})
    if suffix in ("pbm", "pgm", "pfm"):
        image = image.convert("1" if suffix == "pbm" else "L")
    if suffix == "pfm":
        image = Image.fromarray(np.asarray(image).astype(np.float32) / 255)
    return encoded(image, name, **options), name in WITHOUT_LOSS | {"JPEG2000", "WEBP"}


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_of_the_list_is_found_and_read(tmp_path: Path, suffix: str):
    pixels = np.repeat(np.repeat(noise(3, 4, 3), 8, axis=0), 8, axis=1)
    data, exact = _written(suffix, pixels)
    for name in (f"a.{suffix}", f"b.{suffix.upper()}"):
        (tmp_path / name).write_bytes(data)
    source = open_source(DataConfig(source=str(tmp_path)))
    assert len(source) == 2
    found = source.image(1, 3)
    shown = Image.fromarray(pixels)
    if suffix in ("pbm", "pgm", "pfm"):
        shown = shown.convert("1" if suffix == "pbm" else "L")
    expected = torch.from_numpy(np.array(shown.convert("RGB"))).permute(2, 0, 1)
    assert found.shape == expected.shape
    difference = (found.int() - expected.int()).abs().float()
    assert difference.max() == 0 if exact else difference.mean() < 12
    assert upright_size(data, 3) == found.shape[1:]
    held = contents(data)
    assert held.format not in ("unknown", "video", "missing")
    assert (held.colours, held.bits) == (
        {"pbm": "greyscale", "pgm": "greyscale", "pfm": "greyscale"}.get(suffix, "RGB"),
        {"pbm": 1, "pfm": 32}.get(suffix, 8),
    )


@pytest.mark.parametrize("name", ["EPS", "ICO", "SGI", "DDS", "PDF"])
def test_a_format_that_is_not_in_the_list_is_refused_though_pillow_knows_it(name: str):
    data = encoded(Image.fromarray(noise(16, 16, 3)), name)
    with pytest.raises(ValueError, match="not an image file, or one of a format that is not read"):
        decode(data, 3)


def test_suffixes_are_lower_case_and_once():
    assert len(set(IMAGE_SUFFIXES)) == len(IMAGE_SUFFIXES)
    assert all(suffix == suffix.lower() and "." not in suffix for suffix in IMAGE_SUFFIXES)
    assert not {"eps", "ps", "wmf", "emf", "mpg", "h5", "fits", "pdf"} & set(IMAGE_SUFFIXES)
    assert hint_for("dng")
    assert "npy" in hint_for("npz")
    assert hint_for("txt") == hint_for("png") == ""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WebP", "JPEG2000", "AVIF", "QOI"])
def test_files_are_known_by_their_first_bytes(kind: str):
    assert file_format(encoded(Image.fromarray(noise(16, 16, 3)), kind)) == {"JPEG2000": "JPEG 2000"}.get(kind, kind)


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"\n<html lang='en'>", "HTML"), (b"<?xml?><svg>", "SVG"), (b"PK\x03\x04", "zip"), (b"abc", "unknown")],
)
def test_what_is_no_image_is_named(data: bytes, kind: str):
    assert file_format(data) == kind == contents(data).format


def _tiff(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


@cache
def _files() -> dict[str, tuple[bytes, Contents]]:
    rgb, grey = Image.fromarray(noise(8, 9, 3)), Image.fromarray(noise(8, 9))
    line = png_chunk(b"IDAT", b"")
    twelve = noise(8, 9, 12, dtype=np.uint16)
    animated = {"save_all": True, "append_images": [Image.new("RGB", (9, 8)), Image.new("RGB", (9, 8), "red")]}
    return {
        "grey jpeg": (encoded(grey, "JPEG"), Contents("JPEG", 1, 8, 1, False, "greyscale")),
        "grey alpha png": (encoded(grey.convert("LA"), "PNG"), Contents("PNG", 2, 8, 1, True, "greyscale")),
        "palette png": (encoded(rgb.quantize(4), "PNG"), Contents("PNG", 3, 2, 1, False, "RGB")),
        "transparent palette": (
            encoded(rgb.quantize(200), "PNG", transparency=0),
            Contents("PNG", 4, 8, 1, True, "RGB"),
        ),
        "16-bit rgb png": (png(4, 4, line, depth=16), Contents("PNG", 3, 16, 1, False, "RGB")),
        "mpo": (encoded(rgb, "MPO", **animated), Contents("JPEG", 3, 8, 3, False, "RGB")),
        "gif": (encoded(rgb, "GIF", **animated), Contents("GIF", 3, 8, 3, False, "RGB")),
        "apng": (encoded(rgb, "PNG", **animated), Contents("PNG", 3, 8, 3, False, "RGB")),
        "webp": (encoded(rgb, "WEBP", **animated), Contents("WebP", 3, 8, 3, False, "RGB")),
        "12 channels": (
            _tiff(twelve, photometric="minisblack", planarconfig="contig"),
            Contents("TIFF", 12, 16, 1, False, "12 channels"),
        ),
        "12 pages": (
            _tiff(np.moveaxis(twelve, -1, 0), photometric="minisblack"),
            Contents("TIFF", 1, 16, 12, False, "greyscale"),
        ),
        "float tiff": (_tiff(np.zeros((8, 9), np.float32)), Contents("TIFF", 1, 32, 1, False, "greyscale")),
        "rgba tiff": (
            _tiff(noise(8, 9, 4), photometric="rgb", extrasamples=["unassalpha"]),
            Contents("TIFF", 4, 8, 1, True, "RGB"),
        ),
        "npy": (npy(noise(8, 9, dtype=np.uint16)), Contents("npy", 1, 16, 1, False, "greyscale")),
        "npy, channels first": (npy(noise(5, 8, 9)), Contents("npy", 5, 8, 1, False, "5 channels")),
        "damaged": (b"II*\0" + bytes(3), Contents("TIFF")),
        "cut npy": (npy(noise(8, 9))[:20], Contents("npy")),
    }


@pytest.mark.parametrize("name", list(_files()))
def test_headers_say_what_a_file_holds(tmp_path: Path, name: str):
    data, expected = _files()[name]
    assert contents(data) == expected
    (tmp_path / "file").write_bytes(data)
    assert contents(tmp_path / "file") == expected
    assert page_numbers(data) == list(range(expected.pages))


def test_ten_bits_of_avif_and_jpeg_2000_are_seen():
    wide = Image.fromarray(noise(16, 16, dtype=np.uint16))
    assert contents(encoded(wide, "JPEG2000")).bits == 16
    data = imagecodecs.avif_encode(noise(16, 16, 3, dtype=np.uint16) >> 6, bitspersample=10)
    assert contents(data).bits == 10


def test_what_is_not_used_is_told():
    files = {name: data for name, (data, _) in _files().items()}
    assert note_of_dropped([files["grey jpeg"], files["palette png"]], 3, "first") is None
    note = note_of_dropped([files["12 pages"], files["12 pages"], files["grey alpha png"]], 3, "first")
    assert note is not None
    assert note.startswith("of 3 images looked at, 2 hold 12 pages or frames, of which the first is used")
    assert "1 hold transparency, which is laid on white" in note
    assert "2 hold 16 bits a channel, which are rounded to 8" in note
    assert "pages" not in str(note_of_dropped([files["12 pages"]], 12, "channels"))
    assert note_of_dropped([files["webp"]], 3, "images") is None
    assert "colours, which become grey" in str(note_of_dropped([files["npy"], files["gif"]], 1, "images"))
    assert "transparency" not in str(note_of_dropped([files["rgba tiff"]], 4, "first"))


@pytest.mark.parametrize("sign", ["eXIf", "Raw profile type exif", "XML:com.adobe.xmp"])
def test_the_size_of_a_png_that_is_turned_is_read_and_of_others_without_their_pixels(
    sign: str, monkeypatch: pytest.MonkeyPatch
):
    notes, exif = PngInfo(), Image.Exif()
    exif[274] = 6
    if sign == "eXIf":
        turned = encoded(Image.fromarray(noise(9, 20, 3)), "PNG", exif=exif)
    elif sign.startswith("XML"):
        notes.add_itxt(sign, '<x tiff:Orientation="6"/>', zip=True)
        turned = encoded(Image.fromarray(noise(9, 20, 3)), "PNG", pnginfo=notes)
    else:
        content = exif.tobytes().hex()
        notes.add_text(sign, f"\nexif\n{len(content) // 2}\n{content}", zip=True)
        turned = encoded(Image.fromarray(noise(9, 20, 3)), "PNG", pnginfo=notes)
    assert upright_size(turned, 3) == decode(turned, 3).shape[1:] == (20, 9)
    plain = encoded(Image.fromarray(noise(9, 20, 3)), "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("was decoded"))
    assert upright_size(plain, 3) == (9, 20)


def test_every_page_is_an_image_where_it_is_said(tmp_path: Path):
    greys = noise(5, 8, 9)
    (tmp_path / "a.tif").write_bytes(_tiff(greys[:3], photometric="minisblack"))
    Image.fromarray(greys[3]).save(tmp_path / "b.png")
    frames = [Image.new("L", (9, 8), value) for value in (10, 200)]
    frames[0].save(tmp_path / "c.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "d.png").write_bytes(b"no image")
    first = open_source(DataConfig(source=str(tmp_path)))
    assert len(first) == 4
    source = open_source(DataConfig(source=str(tmp_path), pages="images"))
    assert len(source) == 3 + 1 + 2 + 1
    assert "4 files hold 7 pages or frames, each of which is an image" in source.notes
    decoded = [source.image(row, 1)[0] for row in range(6)]
    sizes = [upright_size(source.encoded(row), 1, int(source.pages[row])) for row in range(6)]
    assert sizes == [tuple(image.shape) for image in decoded]
    assert torch.equal(torch.stack(decoded[:4]), torch.from_numpy(greys[:4]))
    assert [int(image[4, 4]) for image in decoded[4:]] == [10, 200]
    assert source.groups is not None
    assert source.groups.tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert torch.equal(source.subset(np.array([2, 5])).image(0, 1)[0], decoded[2])
    with pytest.raises(ValueError, match=r"row 6 \(.*d\.png, page 0\): not an image file"):
        source.image(6, 1)
    with pytest.raises(ValueError, match="pages='images'"):
        DataConfig(source="a.parquet", pages="images", streaming=True)
