"""Colour profiles are applied, whichever library reads the file."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ssl_vit.data.decode.decode import decode
from tests.data.broken import encoded, png_chunk
from tests.data.decode.pixels import RNG, check, drawn, tiff, write_png


def _profile(gamma: int, space: bytes = b"RGB ") -> bytes:
    """A profile with the primaries of sRGB, D50, or grey, and a curve of gamma * 256."""

    def s15(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, gamma) + bytes(2)
    white = b"XYZ " + bytes(4) + s15(0.9642, 1.0, 0.8249)
    tags = {b"wtpt": white}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        primaries = {b"r": (0.4361, 0.2225, 0.0139), b"g": (0.3851, 0.7169, 0.0971), b"b": (0.1431, 0.0606, 0.7139)}
        for name, xyz in primaries.items():
            tags |= {name + b"XYZ": b"XYZ " + bytes(4) + s15(*xyz), name + b"TRC": curve}
    table, body, place = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", place + len(body), len(content))
        body += content
    header = bytes(4) + b"lcms" + struct.pack(">I", 0x02400000) + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    header = header.ljust(68, b"\0") + s15(0.9642, 1.0, 0.8249)
    data = header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(data)) + data[4:]


def from_linear(values: np.ndarray) -> np.ndarray:
    """8-bit linear light as 8-bit sRGB."""
    light = values / 255
    return np.rint(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))


def _with_profile(kind: str, profile: bytes, pixels: np.ndarray) -> bytes:
    if kind == "PNG16":
        iccp = png_chunk(b"iCCP", b"any\0\0" + zlib.compress(profile))
        return write_png(pixels.astype(np.uint16) * 257, 16, iccp)
    if kind.startswith("TIFF"):
        stored = pixels if kind == "TIFF" else pixels.astype(np.uint16) * 257
        return tiff(np.squeeze(stored), photometric="rgb" if pixels.shape[2] > 1 else "minisblack", iccprofile=profile)
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(kind, {"quality": 98})
    return encoded(Image.fromarray(np.squeeze(pixels)), kind, icc_profile=profile, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG16", "WEBP", "TIFF", "TIFF16", "AVIF"])
def test_colour_profiles_are_applied(kind: str):
    pixels = np.repeat(np.repeat(RNG.integers(60, 200, (2, 3, 1)).astype(np.uint8), 16, axis=0), 16, axis=1)
    pixels = np.repeat(pixels, 3, axis=2)  # greys, which every kind of compression keeps
    check(_with_profile(kind, _profile(256), pixels), from_linear(pixels), tolerance=4)
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    check(_with_profile(kind, same, pixels), pixels.astype(int), tolerance=2)
    for useless in (b"no profile", _profile(256, b"GRAY")):
        check(_with_profile(kind, useless, pixels), pixels.astype(int), tolerance=2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "TIFF16"])
def test_profiles_of_grey_are_applied(kind: str):
    pixels = np.repeat(np.repeat(RNG.integers(60, 200, (2, 3, 1)).astype(np.uint8), 16, axis=0), 16, axis=1)
    data = _with_profile(kind, _profile(256, b"GRAY"), pixels)
    check(data, from_linear(pixels), tolerance=3)
    check(data, np.repeat(from_linear(pixels), 3, axis=2), tolerance=3)


def test_a_profile_moves_colours_as_the_reference_does():
    pixels = drawn(16, 24, 4)
    profile = _profile(461)  # gamma 1.8
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    rgb = Image.fromarray(pixels[..., :3])
    applied = ImageCms.profileToProfile(rgb, opened, ImageCms.createProfile("sRGB"), outputMode="RGB")
    expected = np.concatenate([np.array(applied), pixels[..., 3:]], axis=-1).astype(int)
    check(_with_profile("PNG", profile, pixels), expected)
    check(encoded(rgb, "PNG", icc_profile=profile), np.array(applied).astype(int))
    long = profile + bytes(150_000)  # more than one segment of a JPEG
    jpeg = encoded(rgb, "JPEG", icc_profile=long)
    assert not torch.equal(decode(jpeg, 3), decode(encoded(rgb, "JPEG"), 3))
