"""Images that repeat one before them, byte for byte or nearly, and sources without them."""

import hashlib
import json
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.core.reading import entry, read_json
from ssl_vit.core.writing import replace_json
from ssl_vit.data.config import DataConfig, setting_error
from ssl_vit.data.decoded import cache_folder
from ssl_vit.data.sources.fingerprint import fingerprint
from ssl_vit.data.sources.source import Source
from ssl_vit.data.workers import in_workers

try:
    import imagehash
except ImportError:
    imagehash = None

INSTALL = "pip install 'ssl-vit[dedup]'"
# These thresholds find nine copies in 20,000 images of CIFAR-10 (200 million pairs), each the same photograph as
# another; 266 in 2,465 OpenMoji drawings, many of which differ by a detail. Of 150 photographs saved again as JPEG of
# quality 20 to 90, as WebP or at half the size they find all; of images of 32 pixels at quality 50, 97 %.
_MOST_BITS = 4  # of a hash's 64 that differ
_BANDS = tuple(13 * band for band in range(5))  # where four bits differ, one of five bands of bits is the same
_MOST_DIFFERENCE = 0.15  # of thumbnails: root mean square, over the deviation of the image's pixels
_MOST_COMPARED = 32  # images of similar hashes (blank ones have them) whose thumbnails are compared
_FORMAT = 1  # raised when copies are found by other rules


class Print(NamedTuple):
    """What is kept of an image to compare it by."""

    digest: bytes
    """Hash of its file, and of the page in it where pages are images."""
    hashes: tuple[int, ...]
    """pHash and dHash, perceptual hashes of 64 bits: dHash for smooth images, where pHash sees noise. () without the
    library."""


class Copy(NamedTuple):
    """What a copy repeats."""

    first: int
    """Row of the image that it repeats."""
    is_exact: bool
    """Byte for byte; else nearly."""


def take_print(source: Source, row: int, data: bytes, pixels: UInt8[Tensor, "c h w"]) -> Print:
    """The print of a row's image, given its file and pixels; takes 2 ms at 500 x 375 pixels."""
    page = b"" if isinstance(source.pages, str) else str(source.pages[row]).encode()
    digest = hashlib.blake2b(data + page, digest_size=16).digest()
    if imagehash is None:
        return Print(digest, ())
    shown = pixels.permute(1, 2, 0) if len(pixels) == 3 else pixels.float().mean(dim=0).round().byte()
    grey = Image.fromarray(shown.numpy()).convert("L")
    grey = grey.reduce(max(1, min(grey.size) // 64))
    hashes = (imagehash.phash(grey), imagehash.dhash(grey))
    return Print(digest, tuple(int.from_bytes(np.packbits(found.hash).tobytes(), "big") for found in hashes))


class Copies:
    """Finds copies among images, in the order of rows; each image is compared with those that are no copies."""

    def __init__(self, source: Source, num_channels: int) -> None:
        self.source, self.num_channels = source, num_channels
        self._by_digest: dict[bytes, int] = {}
        self._by_band: defaultdict[tuple[int, int, int], list[tuple[int, int]]] = defaultdict(list)
        self._thumbnail = lru_cache(4096)(self._shrink)

    def find(self, row: int, image: Print) -> Copy | None:
        """What a row is a copy of, or None; call this once for each row."""
        first = self._by_digest.setdefault(image.digest, row)
        if first != row:
            return Copy(first, True)
        bands = [
            (own, self._by_band[number, shift, own >> shift & 0x1FFF])
            for number, own in enumerate(image.hashes)
            for shift in _BANDS
        ]
        near = {((own ^ their).bit_count(), other) for own, band in bands for other, their in band}
        for _, other in sorted(pair for pair in near if pair[0] <= _MOST_BITS)[:_MOST_COMPARED]:
            # So few are compared that decoding them again beats keeping thumbnails of millions.
            (thumbnail, contrast), (before, _) = self._thumbnail(row), self._thumbnail(other)
            if (thumbnail - before).square().mean().sqrt() <= _MOST_DIFFERENCE * contrast:
                return Copy(other, False)
        for own, band in bands:
            band.append((row, own))
        return None

    def _shrink(self, row: int) -> tuple[Float[Tensor, "c 8 8"], float]:
        """The thumbnail of a row and its contrast: the standard deviation of its pixels, at least 1."""
        image = self.source.image(row, self.num_channels).float()
        return F.adaptive_avg_pool2d(image, 8), max(image.std().item(), 1.0)


def leave_out_copies(source: Source, config: DataConfig) -> Source:
    """The source without images that repeat one before them in any of its parts; undecodable images stay.

    Reads all images, with all CPUs, and keeps the list of copies in `data.cache_dir` for the next start.

    Raises:
        ValueError: the library for near-duplicates is missing, or a part of a mixture would never be drawn.
    """
    if imagehash is None:
        raise setting_error(config, "drop_duplicates", f"near-duplicates are found by ImageHash: {INSTALL}")
    about = [fingerprint(source, np.arange(len(source))), len(config.mean), source.max_image_bytes, _FORMAT]
    file = cache_folder(config) / f"copies-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.json"
    try:
        copies = {kind: entry(read_json(file), kind, list[int], file) for kind in ("exact", "near", "unread")}
        if any(_print_of(source, len(config.mean), row) is not None for row in copies["unread"]):
            raise ValueError("images could not be read before")
    except (OSError, ValueError):
        copies = _find_all(source, len(config.mean))
        with suppress(OSError):  # then the next start searches again
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_json(file, copies)
    kept = np.setdiff1d(np.arange(len(source)), np.array(copies["exact"] + copies["near"], dtype=np.int64))
    if source.mixture is not None:
        for number, name in enumerate(source.mixture.names):
            if not (source.mixture.origin[kept] == number).any():
                raise setting_error(config, "drop_duplicates", f"all images of {name!r} are copies; leave it out")
        for name, count in zip(source.mixture.names, source.mixture.subset(kept).draws(), strict=True):
            if count == 0:
                what = f"without copies {name!r} would never be drawn; give it more weight in data.source"
                raise setting_error(config, "drop_duplicates", what)
    counts = f"{len(copies['exact']):,} byte for byte the same as another, {len(copies['near']):,} nearly so"
    note = f"data.drop_duplicates: {len(source) - len(kept):,} of {len(source):,} images are left out ({counts})"
    return replace(source.subset(kept), notes=(*source.notes, note))


def _find_all(source: Source, num_channels: int) -> dict[str, list[int]]:
    """Rows that are copies, by kind, and those that cannot be read."""
    copies, kinds = Copies(source, num_channels), {"exact": [], "near": [], "unread": []}
    with in_workers(
        partial(_print_of, source, num_channels), range(len(source)), source.where, doing="looking for copies"
    ) as prints:
        for row, image in enumerate(prints):
            copy = None if image is None else copies.find(row, image)
            if image is None:
                kinds["unread"].append(row)
            elif copy is not None:
                kinds["exact" if copy.is_exact else "near"].append(row)
    return kinds


def _print_of(source: Source, num_channels: int, row: int) -> Print | None:
    """The print of a row; None where it cannot be decoded."""
    try:
        data = source.encoded(row)
        return take_print(source, row, data, source.decode(row, data, num_channels))
    except (ValueError, OSError):
        return None
