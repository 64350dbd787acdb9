"""Files that ask for far more memory or time than they are worth, and who looks how much they get."""

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import ssl_vit.data.decode.formats  # noqa: F401  # which lets Pillow know of HEIC
from tests.data.broken import encoded, noise, png, png_chunk

LARGE = 40_000  # pixels of a side: 1.6 billion pixels


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _canvas(side: int, flags: int = 0) -> bytes:
    return bytes([flags, 0, 0, 0]) + (side - 1).to_bytes(3, "little") * 2


def _animation() -> bytes:
    frame = encoded(noise().resize((2, 2)), "WEBP", lossless=True)[12:]
    place = b"\0" * 6 + (1).to_bytes(3, "little") * 2 + (40).to_bytes(3, "little") + b"\0"
    return riff((b"VP8X", _canvas(16_383, 2)), (b"ANIM", bytes(6)), (b"ANMF", place + frame))


def tiff(tags: list[tuple[int, int, int, int]], more: bytes = b"", order: str = "<", following: int = 0) -> bytes:
    """Tags as they stand in the file: number, type, count and the value or where it lies."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    entries = b"".join(struct.pack(f"{order}HHI", *tag[:3]) + _value(order, tag) for tag in tags)
    return head + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", following) + more


def _value(order: str, tag: tuple[int, int, int, int]) -> bytes:
    short = tag[1] == 3 and tag[2] == 1
    return struct.pack(f"{order}HH", tag[3], 0) if short else struct.pack(f"{order}I", tag[3])


def page(height: int, width: int, bits: int = 8, samples: int = 1, **others: int) -> list[tuple[int, int, int, int]]:
    """A page that is stored in one strip of 8 bytes at 8."""
    numbers = {"compression": 259, "depth": 32997, "tile_width": 322, "tile_height": 323, "extra": 338}
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: samples, 278: height, 279: 8}
    tags |= {numbers[name]: value for name, value in others.items()}
    if "tile_width" in others:
        tags |= {324: 8, 325: 8}
        tags = {tag: value for tag, value in tags.items() if tag not in (273, 278, 279)}
    return [(tag, 4 if value > 65535 else 3, 1, value) for tag, value in sorted(tags.items())]


def sharing_tags(count: int, size: int) -> bytes:
    """Tags that all have the same bytes as their value."""
    tags = [(274, 3, 1, 6), *((40_000 + number, 7, size, 8) for number in range(count))]
    return tiff(tags, bytes(size))


def _inner(compression: int, data: bytes) -> bytes:
    """A TIFF of 16 x 16 pixels of five channels whose strip is a file of its own."""
    tags = page(16, 16, samples=5, compression=compression)
    place = 8 + 2 + 12 * len(tags) + 4
    changed = {273: place, 279: len(data)}
    return tiff([(*tag[:1], 4, 1, changed[tag[0]]) if tag[0] in changed else tag for tag in tags], data)


def with_scans(count: int, side: int, between: bytes = b"") -> bytes:
    """A progressive JPEG that repeats its last scan."""
    data = encoded(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    start = data.index(b"\xff\xc2")
    return data[:start] + between + data[start:last] + data[last:-2] * count + b"\xff\xd9"


def _sequential_scans(count: int) -> bytes:
    """A JPEG whose channels come one by one, again and again."""
    data = encoded(Image.new("RGB", (512, 512)), "JPEG")
    start = data.index(b"\xff\xda")
    scan = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + data[start + 14 : -2]
    return data[:start] + scan * count + b"\xff\xd9"


def _jpeg(height: int, width: int, **options: Any) -> bytes:
    data = encoded(noise(), "JPEG", **options)
    start = data.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def segment(marker: int, data: bytes) -> bytes:
    return bytes([255, marker]) + struct.pack(">H", len(data) + 2) + data


def codestream(height: int, width: int, tile: int, channels: int = 1) -> bytes:
    size = struct.pack(">H8IH", 0, width, height, 0, 0, tile, tile, 0, 0, channels) + b"\x07\x01\x01" * channels
    cod = segment(0x52, b"\0\0\0\x01\0\x01\x04\x04\0\x01")
    qcd = segment(0x5C, b"\x40" + b"\x40" * 4)
    return b"\xff\x4f" + segment(0x51, size) + cod + qcd + segment(0x90, b"\0\0\0\0\0\0\0\x01") + b"\xff\x93\xff\xd9"


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + name + content


def _jp2(content: bytes, side: int = 16) -> bytes:
    head = box(b"ihdr", struct.pack(">IIHBBBB", side, side, 1, 7, 7, 0, 0)) + box(
        b"colr", b"\x01\0\0" + struct.pack(">I", 17)
    )
    start = box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ") + box(b"jp2h", head)
    decoy = box(b"xml ", codestream(4, 4, 4))
    return start + decoy + box(b"jp2c", content)


def _with_size(file_format: str, side: int) -> bytes:
    """An AVIF or HEIC whose container says another size than its pixels have."""
    data = bytearray(encoded(noise(), file_format))
    place = data.index(b"ispe") + 8
    data[place : place + 8] = struct.pack(">II", side, side)
    return bytes(data)


def npy_header(text: str, more: bytes = b"", version: int = 1) -> bytes:
    head = text.encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(head)) + head + more


def _shape(shape: str, descr: str = "'|u1'", more: bytes = bytes(4096)) -> bytes:
    return npy_header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n", more)


def _gif_that_grows() -> bytes:
    frames = [noise("P"), noise("P").rotate(180), noise("P").rotate(90)]
    data = bytearray(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], loop=0))
    second = data.index(b"\x2c", data.index(b"\x2c") + 1)
    data[second + 5 : second + 9] = struct.pack("<HH", 65_000, 65_000)
    return bytes(data)


def _multi_picture(count: int) -> bytes:
    data = encoded(noise(), "MPO", save_all=True, append_images=[noise()])
    place = data.index(struct.pack("<HHI", 0xB001, 4, 1))
    return data[: place + 8] + struct.pack("<I", count) + data[place + 12 :]


def _text_chunks(kind: bytes, size: int, count: int = 1) -> bytes:
    packed = zlib.compress(bytes(size), 9)
    head = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind]
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" * (4 * 13)))
    return png(4, 4, *[png_chunk(kind, head + packed)] * count, pixels)


def files() -> dict[str, tuple[bytes, int, Any]]:
    """By what they are: the file, the channels it is decoded to, and the pages of it."""
    zeros = png_chunk(b"IDAT", zlib.compress(bytes(2000)))
    exif = sharing_tags(5000, 1000)
    hidden = b"Exif\0\0" + sharing_tags(3000, 20_000)
    raw = zlib.compress(b"\nexif\n 1\n" + sharing_tags(4000, 8000).hex().encode())
    found: dict[str, bytes | tuple[bytes, int, Any]] = {
        "webp of 34 bytes": riff((b"VP8X", _canvas(16_383)), (b"VP8 ", b"")) + b"\0\0\0\0",
        "webp animation": _animation(),
        "webp lossless": riff(
            (b"VP8L", b"\x2f" + ((16_000 - 1) | (16_000 - 1) << 14).to_bytes(4, "little") + bytes(9))
        ),
        "webp lossy": riff((b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16_000, 16_000) + bytes(20))),
        "webp with tags that share bytes": riff(
            (b"VP8X", _canvas(48, 8)),
            (b"VP8L", encoded(noise().crop((0, 0, 48, 48)), "WEBP", lossless=True)[20:]),
            (b"EXIF", exif),
        ),
        "png of 16 bits": png(16_000, 16_000, zeros, depth=16, colour_type=6),
        "png interlaced": png(13_000, 13_000, zeros, depth=16, colour_type=2),
        "png one pixel wide": png(1, 400_000_000, zeros, colour_type=0),
        "png one pixel wide of 16 bits": png(1, 80_000_000, zeros, depth=16, colour_type=2),
        "png of text": _text_chunks(b"zTXt", 2**24),
        "png of many texts": _text_chunks(b"zTXt", 2**20 - 10, 70),
        "png of unicode text": _text_chunks(b"iTXt", 2**24),
        "png of a profile": _text_chunks(b"iCCP", 2**25),
        "png of empty chunks": png(4, 4, *[png_chunk(b"teSt", b"")] * 20_000, zeros),
        "png of exif in text": png(4, 4, png_chunk(b"zTXt", b"Raw profile type exif\0\0" + raw), zeros),
        "png of exif": png(4, 4, png_chunk(b"eXIf", exif), png_chunk(b"IDAT", zlib.compress(b"\0" * 52))),
        "apng of frames": (png(4, 4, png_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), zeros), 3, "all"),
        "tiff of depth": tiff(page(64, 64, depth=2**20)),
        "tiff of two depths": (tiff([*page(64, 64, samples=5, depth=2**20), (32997, 3, 1, 1)]), 5, "first"),
        "tiff of two heights": (tiff([*page(2**24, 64, samples=5), (257, 3, 1, 4)]), 5, "first"),
        "tiff of huge tiles": (tiff(page(4, 4, samples=5, tile_width=LARGE, tile_height=LARGE)), 5, "first"),
        "tiff of huge tiles for pillow": tiff(page(4, 4, compression=8, tile_width=LARGE, tile_height=LARGE)),
        "tiff of many samples": (tiff(page(8000, 8000, samples=60_000)), 60_000, "first"),
        "tiff of doubles": (tiff([*page(20_000, 20_000, bits=64), (339, 3, 1, 3)]), 1, "first"),
        "tiff of strips": tiff([(*tag[:2], 2**31, 8) if tag[0] in (273, 279) else tag for tag in page(8, 8)]),
        "tiff of a tag of 4 GB": tiff([*page(8, 8), (50000, 7, 2**32 - 1, 8)]),
        "tiff of tags that share bytes": sharing_tags(20_000, 200_000),
        "tiff of pages in a circle": (tiff([(254, 4, 1, 1), *page(8, 8)], following=8), 1, "channels"),
        "tiff of jpeg": (_inner(7, _jpeg(65_000, 65_000)), 5, "first"),
        "tiff of jpeg 2000": (_inner(34712, codestream(LARGE, LARGE, LARGE)), 5, "first"),
        "tiff of webp": (_inner(50001, riff((b"VP8X", _canvas(16_383)), (b"VP8 ", b""))), 5, "first"),
        "tiff of lzma": (_inner(34925, b"\xfd7zXZ\0"), 5, "first"),
        "jpeg of 1,500 scans": with_scans(1500, 1024),
        "jpeg of scans after junk": with_scans(1500, 1024, b"\0junk"),
        "jpeg of single scans": _sequential_scans(150),
        "jpeg of coefficients": _jpeg(11_000, 11_000, progressive=True),
        "jpeg of pixels": _jpeg(65_535, 65_535),
        "jpeg of tags that share bytes": b"\xff\xd8"
        + segment(0xE1, hidden[:65_000])
        + encoded(noise("CMYK"), "JPEG")[2:],
        "gif of a screen": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + encoded(noise("P"), "GIF")[10:],
        "gif that grows": (_gif_that_grows(), 3, 2),
        "avif": _with_size("AVIF", 30_000),
        "heic": _with_size("HEIF", 30_000),
        "jpeg 2000": codestream(LARGE, LARGE, LARGE),
        "jpeg 2000 behind a decoy": _jp2(codestream(LARGE, LARGE, LARGE), LARGE),
        "jpeg 2000 of another size": _jp2(codestream(30_000, 30_000, 30_000)),
        "jpeg 2000 of tiles": codestream(255, 257, 1),
        "jpeg 2000 of channels": codestream(255, 257, 1, 16_000),
        "npy of true": _shape("(True, 64, 64)"),
        "npy of negative lengths": _shape("(-8, -8, 3)"),
        "npy of floats": _shape("(8.0, 8, 3)"),
        "npy of one long": _shape("(10**30, 8)"),
        "npy of a long number": _shape(f"({'9' * 5000}, 8)"),
        "npy of large numbers": _shape("(4, 4)", "'|V2000000000'"),
        "npy of arrays": _shape("(4, 4)", "('|u1', (10000, 100000))"),
        "npy of names": _shape("(4, 4)", "[('a', '<f8'), ('b', '<f8')]"),
        "npy of long text": _shape("(4, 4)", "'<U500000000'"),
        "npy of nothing": _shape("(4000000000, 4000000000, 0)"),
        "npy of a header": npy_header("{" + "'a':" * 2_000_000, version=2),
        "npy of brackets": npy_header("(" * 9000),
        "npy of doubles": _shape("(12000, 12000)", "'<f8'"),
        "bmp": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, LARGE, -LARGE, 1, 24, 0, 0, 0, 0, 0, 0)
        + bytes(64),
        "bmp of lines": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 1, -(2**31), 1, 8, 1, 0, 0, 0, 0, 0),
        "tga": bytes([0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        + struct.pack("<HH", 65_535, 65_535)
        + bytes([32, 0, 255, 1, 2, 3, 4]),
        "qoi": b"qoif" + struct.pack(">II", 2**31, 2**31) + b"\x04\0" + b"\xfd" * 64 + bytes(7) + b"\1",
        "pcx": bytes([10, 5, 1, 8])
        + struct.pack("<HHHH", 0, 0, 65_535, 65_535)
        + bytes(53)
        + b"\x01"
        + bytes(62)
        + b"\xff\x01" * 9,
        "sun": struct.pack(">8I", 0x59A66A95, LARGE, LARGE, 24, 0, 1, 0, 0) + bytes(64),
        "ppm": b"P6 100000 100000 255\n" + bytes(64),
        "ppm of no white": b"P6 4 4 0\n" + bytes(64),
        "ppm of digits": b"P6 " + b"9" * 10_000_000 + b" 4 255\n",
        "pfm": b"Pf\n60000 60000\n-1.0\n" + bytes(64),
        "mpo of frames": (_multi_picture(2**31), 3, "all"),
    }
    return {name: file if isinstance(file, tuple) else (file, 3, "first") for name, file in found.items()}


def many_pages(count: int) -> bytes:
    """A TIFF of many pages of one tag each, which says that they are copies."""
    page = struct.pack("<HHHII", 1, 254, 4, 1, 1)
    starts = 8 + (len(page) + 4) * np.arange(1, count + 1)
    starts[-1] = 0
    return b"II*\0" + struct.pack("<I", 8) + b"".join(page + struct.pack("<I", start) for start in starts.tolist())


def measure(path: Path) -> None:
    """Decode the files of a folder, one after another; print of each how it went, seconds and MiB at the most."""
    from ssl_vit.data.decode.decode import decode
    from ssl_vit.data.decode.formats import contents, page_numbers

    found, noted = {}, json.loads((path / "files.json").read_text())
    for name, calls in _calls(path, noted, decode, page_numbers, contents):
        import time

        Path("/proc/self/clear_refs").write_text("5")  # forgets the most
        before, start = _resident("VmRSS"), time.perf_counter()
        try:
            outcome = f"decoded {calls()}"
        except (ValueError, OSError) as error:
            outcome = f"refused: {error}"[:200]
        except Exception as error:
            outcome = f"raised {type(error).__name__}: {error}"[:200]
        found[name] = [round(time.perf_counter() - start, 2), round((_resident("VmHWM") - before) / 1024), outcome]
    print(json.dumps(found))


def _calls(
    path: Path, noted: dict, decode: Any, page_numbers: Any, contents: Any
) -> list[tuple[str, Callable[[], str]]]:
    def run(file: str, channels: int, pages: Any) -> str:
        data = (path / file).read_bytes()
        if pages == "all":
            return f"{len(page_numbers(data))} pages"
        contents(data)
        return str(tuple(decode(data, channels, pages=pages).shape))

    return [
        (name, lambda noted=(file, channels, pages): run(*noted)) for name, (file, channels, pages) in noted.items()
    ]


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def measured(
    folder: Path, wanted: dict[str, tuple[bytes, int, Any]], seconds: float
) -> dict[str, tuple[float, int, str]]:
    """Of each file, in a process of their own: seconds, MiB at the most, and what came of it."""
    noted = {}
    for number, (name, (data, channels, pages)) in enumerate(wanted.items()):
        (folder / str(number)).write_bytes(data)
        noted[name] = (str(number), channels, pages)
    (folder / "files.json").write_text(json.dumps(noted))
    call = [sys.executable, "-W", "ignore", "-m", "tests.data.hostile", str(folder)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=seconds, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
