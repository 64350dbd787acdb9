"""Which files count as images, and what they hold by their headers."""

import io
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ssl_vit.data.decode.arrays import NPY_SIGNATURE, read_npy
from ssl_vit.data.decode.bounds import (
    MAX_IMAGE_BYTES,
    MAX_PAGES,
    check_before_opening,
    check_opened,
    check_size,
    read_file,
)
from ssl_vit.data.decode.headers import (
    JPEG_SIGNATURE,
    PNG_SIGNATURE,
    TIFF_SIGNATURES,
    full_pages,
    read_jpeg,
)

try:
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:
    pillow_heif = None

# Pillow's formats of photographs and science whose pixels it decodes with their meaning. The others start programs
# (EPS), are drawings or videos (WMF, MPEG), projects of an editor (PSD), textures and icons (DDS, ICO), lose bits
# (SGI), or ignore what turns numbers into brightness (FITS).
_WANTED = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "AVIF", "HEIF", "PPM", "PCX", "QOI", "SUN"),
    "TGA",  # has no signature, so it is tried last
)
_BY_SUFFIX = Image.registered_extensions()  # also loads Pillow's formats
PILLOW_FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
"""Names of the formats that `open_image` opens."""
IMAGE_SUFFIXES = (
    *(suffix[1:] for name in (*PILLOW_FORMATS, "MPO") for suffix, its in _BY_SUFFIX.items() if its == name),
    *("jif", "jfi", "tf8", "btf"),  # JPEG and BigTIFF, which Pillow does not list
    "npy",
)
"""In lower case, without the dot: what `decode` reads."""

_HINTS = {
    **dict.fromkeys(("heic", "heif", "hif", "heics", "heifs"), "pip install 'ssl-vit[heic]' to read them"),
    **dict.fromkeys(("avif", "avifs"), "pip install 'pillow>=11.3' to read them"),
    **dict.fromkeys(("npz", "mat", "h5", "fits", "fit", "dcm", "nii"), "store the arrays as .npy or TIFF"),
    **dict.fromkeys(("dng", "cr2", "cr3", "nef", "arw", "raf", "orf", "rw2"), "a camera's raw files: convert them"),
    **dict.fromkeys(("jxl", "psd", "svg", "pdf", "eps", "ico", "dds", "sgi"), "convert them to PNG"),
}

# First bytes of files. RIFF and ISO containers name their kind a little later.
_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    PNG_SIGNATURE: "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    **dict.fromkeys(TIFF_SIGNATURES, "TIFF"),
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"qoif": "QOI",
    NPY_SIGNATURE: "npy",
    b"%PDF": "PDF",
    b"PK\x03\x04": "zip",
    b"\x1f\x8b": "gzip",
}
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF"}


# What begins the data of a PNG that can hold an orientation.
_PNG_EXIF = (b"eXIf", b"Raw profile type ", b"XML:com.adobe.xmp")


class Contents(NamedTuple):
    """What a file holds, used or not."""

    format: str
    """JPEG, PNG, TIFF, npy, ...; HTML, zip, ... for other files; missing, empty, unknown."""
    channels: int = 0
    """Channels of a page, transparency included; 0 where the header cannot be read."""
    bits: int = 0
    """Bits of a channel."""
    pages: int = 1
    """Pages, frames or images of the file, without smaller copies of a page."""
    has_alpha: bool = False
    colours: str = "unknown"
    """greyscale, RGB, or another kind, such as `12 channels`."""

    @property
    def kind(self) -> str:
        """In words: RGB, RGBA, greyscale with alpha, 12 channels, 12 pages of greyscale."""
        with_alpha = {"RGB": "RGBA", "greyscale": "greyscale with alpha"}.get(self.colours, self.colours)
        kind = with_alpha if self.has_alpha else self.colours
        return kind if self.pages == 1 else f"{self.pages} pages of {kind}"

    def dropped(self, num_channels: int, pages: str) -> list[str]:
        """What is left unused for `num_channels` and a `data.pages` of `pages`, a sentence each."""
        found = []
        if self.pages > 1 and pages == "first":
            found.append(f"{self.pages} pages or frames, of which the first is used (see --data.pages)")
        if self.has_alpha and num_channels in (1, 3):
            found.append("transparency, which is laid on white")
        if self.colours == "RGB" and num_channels == 1:
            found.append("colours, which become grey")
        elif self.colours == "RGB" and num_channels == 3 and self.channels - self.has_alpha > 3:
            found.append(f"{self.channels} channels, of which red, green and blue are used")
        if self.bits > 8:
            found.append(f"{self.bits} bits a channel, which are rounded to 8")
        return found


def optional_decoders() -> dict[str, str]:
    """Version of each library that is installed to decode further formats; with others other files can be decoded."""
    versions = {}
    for name in ("tifffile", "imagecodecs", "pillow_heif"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def hint_for(suffix: str) -> str:
    """How to use files of a suffix (lower case, no dot) that is not in `IMAGE_SUFFIXES`; "" for most suffixes."""
    return "" if suffix in IMAGE_SUFFIXES else _HINTS.get(suffix, "")


@contextmanager
def open_image(data: bytes, max_image_bytes: int = MAX_IMAGE_BYTES) -> Iterator[Image.Image]:
    """Open an image in one of `PILLOW_FORMATS` with Pillow, without its warnings about odd metadata.

    Raises:
        ValueError: by its header it would take more memory than `max_image_bytes`; see `check_opened`.
    """
    check_before_opening(data, max_image_bytes)
    if data.startswith(JPEG_SIGNATURE) and (header := read_jpeg(data)) is not None:
        check_size(header.height, header.width, header.bytes_a_pixel, max_image_bytes)
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_image_bytes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
                check_opened(image, max_image_bytes)
                # Later frames may be larger and take 4 bytes a pixel; Pillow refuses twice as many pixels.
                Image.MAX_IMAGE_PIXELS = max(max_image_bytes // 8, image.width * image.height)
                yield image
    except Image.DecompressionBombError as error:
        what = str(error).partition(" exceeds")[0]
        raise ValueError(f"{what}: more than data.max_image_bytes={max_image_bytes} allows") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def file_format(data: bytes | None) -> str:
    """The kind of a file by its first bytes; "missing" for None."""
    if not data:
        return "missing" if data is None else "empty"
    for signature, name in _SIGNATURES.items():
        if data.startswith(signature):
            return name
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "video")
    text = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "HTML"
    return "SVG" if b"<svg" in text else "unknown"


def contents(data: bytes | str | Path, max_image_bytes: int = MAX_IMAGE_BYTES) -> Contents:
    """What a file holds, by its header alone.

    Raises:
        OSError: the path cannot be read.
        ValueError: the file is larger than any image.
    """
    data = data if isinstance(data, bytes) else read_file(Path(data), max_image_bytes)
    kind = file_format(data[:4096])
    try:
        if kind == "npy":
            return _contents_of_npy(data)
        if kind == "TIFF":
            return _contents_of_tiff(data)
        with open_image(data, max_image_bytes) as image:
            return _contents_of(image, data[:4096], image.format or kind if kind == "unknown" else kind)
    except Exception:  # a damaged header raises anything
        return Contents(kind)


def _contents_of_npy(data: bytes) -> Contents:
    shape, dtype, last = read_npy(io.BytesIO(data))
    channels = 1 if len(shape) == 2 else shape[2 if last else 0]
    bits = 1 if dtype.kind == "b" else 8 * dtype.itemsize
    colours = {1: "greyscale", 3: "RGB"}.get(channels, f"{channels} channels")
    return Contents("npy", channels, bits, colours=colours)


def _contents_of_tiff(data: bytes) -> Contents:
    pages = [page for _, page in full_pages(data)]
    first = pages[0]
    has_alpha = first.photometric != 5 and (1 in first.extra or 2 in first.extra)
    others = len(first.extra) - has_alpha
    name = {0: "greyscale", 1: "greyscale", 4: "mask"}.get(first.photometric, "RGB")
    if others and name == "greyscale":
        name = f"{first.samples} channels"
    channels = 3 if first.photometric in (3, 5) else first.samples  # what they are decoded to
    return Contents("TIFF", channels, first.bits, len(pages), has_alpha, name)


def _contents_of(image: Image.Image, start: bytes, name: str) -> Contents:
    is_grey = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
    has_alpha = image.has_transparency_data
    bits = {"1": 1, "F": 32}.get(image.mode, 16 if image.mode.startswith("I") else 8)
    if name == "PNG":
        bits = start[24]
    elif name == "AVIF" and (place := start.find(b"av1C")) > 0:
        flags = start[place + 6]
        bits = (12 if flags & 32 else 10) if flags & 64 else 8
    elif name == "JPEG 2000" and (place := start.find(b"\xff\x4f\xff\x51")) >= 0:
        bits = (start[place + 42] & 127) + 1
    elif "bit_depth" in image.info:  # HEIF
        bits = image.info["bit_depth"]
    pages = getattr(image, "n_frames", 1)
    return Contents(name, (1 if is_grey else 3) + has_alpha, bits, pages, has_alpha, "greyscale" if is_grey else "RGB")


def upright_size(
    data: bytes, num_channels: int, number: int = 0, max_image_bytes: int = MAX_IMAGE_BYTES
) -> tuple[int, int]:
    """Height and width that `decode` gives a file's page or frame of this number, by its header alone.

    Raises:
        ValueError: the header cannot be read, or the image is larger than the limit.
    """
    try:
        if data.startswith(NPY_SIGNATURE):
            shape, _, last = read_npy(io.BytesIO(data), num_channels)
            return (shape[0], shape[1]) if last else (shape[1], shape[2])
        if data.startswith(TIFF_SIGNATURES):
            pages = full_pages(data)
            page = next(page for place, page in pages if place == number or number == 0)
            return _turned((page.height, page.width), page.orientation)
        with open_image(data, max_image_bytes) as image:
            if number:
                image.seek(number)
            try:
                # Of a PNG it may follow the pixels, so Pillow decodes them to look for it.
                is_told = image.format != "PNG" or any(sign in data for sign in _PNG_EXIF)
                orientation = image.getexif().get(274, 1) if is_told else 1
            except Exception:  # damaged EXIF data, by which `decode` turns nothing either
                orientation = 1
            return _turned((image.height, image.width), orientation)
    except ValueError:
        raise
    except Exception as error:  # a damaged header raises anything
        raise ValueError(f"its header cannot be read: {error or type(error).__name__}") from error


def _turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return (size[1], size[0]) if orientation in (5, 6, 7, 8) else size


def page_numbers(data: bytes | str | Path, max_image_bytes: int = MAX_IMAGE_BYTES) -> list[int]:
    """Numbers, from 0, of the pages or frames that are images of their own; [0] where the file cannot be read."""
    try:
        data = data if isinstance(data, bytes) else read_file(Path(data), max_image_bytes)
        if data.startswith(TIFF_SIGNATURES):
            return [number for number, _ in full_pages(data)] or [0]
        with open_image(data, max_image_bytes) as image:
            count = getattr(image, "n_frames", 1)
            return list(range(count if count <= min(MAX_PAGES, len(data)) else 1))  # no file holds more
    except Exception:  # damaged, gone or no image: reported when it is decoded
        return [0]


def note_of_dropped(
    files: Iterable[bytes | str | Path], num_channels: int, pages: str, max_image_bytes: int = MAX_IMAGE_BYTES
) -> str | None:
    """A sentence on what a run leaves unused of these files; None where it uses everything."""
    found, looked_at = Counter(), 0
    for file in files:
        looked_at += 1
        try:
            found.update(contents(file, max_image_bytes).dropped(num_channels, pages))
        except (OSError, ValueError):
            continue
    if not found:
        return None
    listed = "; ".join(f"{count} hold {what}" for what, count in found.most_common(4))
    return f"of {looked_at} image{'s' if looked_at > 1 else ''} looked at, {listed}"
