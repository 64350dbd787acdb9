"""What can be told of a source's pictures by reading them: sizes, kinds, faults, duplicates, mean and deviation."""

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from tqdm import tqdm

from ssl_vit.data.copies import Copies, imagehash, take_print
from ssl_vit.data.decode.formats import Contents, contents, file_format
from ssl_vit.data.sources.source import Source

_SHOWN = 5  # faults and duplicates that are named
_LOOKED_AT = 32  # images whose headers tell how many channels there are


class Place(NamedTuple):
    """Where a picture is."""

    row: int
    """Row of the source."""
    path: str | None
    """Its file, where the source names one."""


class Unreadable(NamedTuple):
    """A picture that cannot be read."""

    place: Place
    reason: str


class Repeat(NamedTuple):
    """An image that is the same as one before it."""

    place: Place
    first: Place


@dataclass
class Repeats:
    """Pictures that are the same as one that was read before."""

    count: int = 0
    firsts: set[int] = field(default_factory=set)
    """Rows of those that they repeat."""
    examples: list[Repeat] = field(default_factory=list)
    """The first few of them."""


@dataclass
class Pictures:
    """What was found by reading pictures. Counts are of pictures; those that cannot be read have no size."""

    num_channels: int
    """Channels that they were decoded to."""
    num_read: int = 0
    """Pictures that were looked at, unreadable ones included."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Height and width in pixels of each readable picture, turned upright."""
    files: Counter[Contents] = field(default_factory=Counter)
    """What the files hold, of readable and unreadable ones."""
    contents: Counter[Contents] = field(default_factory=Counter)
    """The same of readable ones."""
    dropped: Counter[str] = field(default_factory=Counter)
    """What readable ones hold and a run does not use."""
    num_unreadable: int = 0
    unreadable: list[Unreadable] = field(default_factory=list)
    """The first few of them."""
    repeats: Repeats = field(default_factory=Repeats)
    """Readable pictures, byte for byte the same as another."""
    near_repeats: Repeats | None = None
    """Others that look the same as another; None without the library that finds them."""
    num_pixels: int = 0
    pixel_sums: list[int] = field(default_factory=list)
    """Sum of each channel's pixels in [0, 255], exact."""
    square_sums: list[int] = field(default_factory=list)
    """Sum of their squares, exact."""
    seconds: float = 0.0
    """Time that reading and decoding the readable ones took."""

    @property
    def num_readable(self) -> int:
        return len(self.sizes)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel over all pixels, in [0, 1]; () if no picture can be read."""
        return tuple(total / (255 * self.num_pixels) for total in self.pixel_sums)

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel over all pixels, in [0, 1]; () if no picture can be read."""
        count = self.num_pixels
        # In whole numbers up to here, so that nothing cancels.
        variances = (count * sq - total**2 for total, sq in zip(self.pixel_sums, self.square_sums, strict=True))
        return tuple(variance**0.5 / (255 * count) for variance in variances)

    @property
    def is_grey(self) -> bool:
        """Whether all readable pictures are stored without colour."""
        return self.num_readable > 0 and all(held.kind.startswith("greyscale") for held in self.contents)


def choose_rows(num_images: int, sample: int | None, seed: int) -> Int64[np.ndarray, " r"]:
    """A seeded sample of rows in ascending order; all of them for None, or where there are no more."""
    if sample is None or sample >= num_images:
        return np.arange(num_images)
    return np.sort(np.random.default_rng(seed).choice(num_images, size=sample, replace=False))


def read_pictures(source: Source, rows: Int64[np.ndarray, " r"], num_channels: int) -> Pictures:
    """Read and decode rows of a source, one after another; none is kept.

    Args:
        rows: which ones.
        num_channels: channels to decode to, see `decode`.
    """
    found = Pictures(num_channels, pixel_sums=[0] * num_channels, square_sums=[0] * num_channels)
    found.near_repeats = None if imagehash is None else Repeats()
    copies = Copies(source, num_channels)
    pages = source.pages if isinstance(source.pages, str) else "images"
    for row in tqdm(rows.tolist(), desc="reading", unit="image", leave=False, disable=None):
        found.num_read += 1
        place = Place(row, (source.rows[row][source.image_column] or {}).get("path"))
        data = None
        start = time.perf_counter()
        try:
            data = source.encoded(row)
            pixels = source.decode(row, data, num_channels)
        except (ValueError, OSError) as error:
            found.files[_contents(source, data)] += 1
            found.num_unreadable += 1
            if len(found.unreadable) < _SHOWN:
                found.unreadable.append(Unreadable(place, " ".join(str(error).split())))
            continue
        found.seconds += time.perf_counter() - start
        held = _contents(source, data)
        found.files[held] += 1
        found.contents[held] += 1
        found.dropped.update(held.dropped(num_channels, pages))
        _add_pixels(found, pixels)
        copy = copies.find(row, take_print(source, row, data, pixels))
        repeats = found.repeats if copy is None or copy.is_exact else found.near_repeats
        if copy is not None and repeats is not None:
            repeats.count += 1
            repeats.firsts.add(copy.first)
            if len(repeats.examples) < _SHOWN:
                path = source.rows[copy.first][source.image_column].get("path")
                repeats.examples.append(Repeat(place, Place(copy.first, path)))
    if not found.sizes:
        found.pixel_sums, found.square_sums = [], []
    return found


def _contents(source: Source, data: bytes | None) -> Contents:
    """What a file holds, of one page where pages are images; None: it could not be had."""
    held = Contents(file_format(None)) if data is None else contents(data)
    return held if isinstance(source.pages, str) else held._replace(pages=1)


def held_channels(source: Source, rows: Int64[np.ndarray, " r"]) -> int | None:
    """The channels that most of a few images hold, by their headers; None where there is no such number."""
    found: Counter[int] = Counter()
    stacks = isinstance(source.pages, str) and source.pages == "channels"
    for row in rows[:_LOOKED_AT].tolist():
        with suppress(ValueError, OSError):
            held = _contents(source, source.encoded(row))
            found[held.channels * (held.pages if stacks else 1)] += 1
    channels, count = found.most_common(1)[0] if found else (0, 0)
    return channels if channels and 2 * count > found.total() else None


def _add_pixels(found: Pictures, pixels: UInt8[Tensor, "c h w"]) -> None:
    height, width = pixels.shape[1:]
    found.sizes.append((height, width))
    found.num_pixels += height * width
    wide = pixels.flatten(1).to(torch.int32)
    for channel, (total, squares) in enumerate(zip(wide.sum(dim=1), (wide * wide).sum(dim=1), strict=True)):
        found.pixel_sums[channel] += int(total)
        found.square_sums[channel] += int(squares)


class Class(NamedTuple):
    """A class and how many pictures it has."""

    name: str
    size: int


@dataclass(frozen=True)
class LabelCounts:
    """How the labels of a whole source are spread."""

    num_classes: int
    """Classes that have pictures."""
    smallest: Class
    largest: Class
    num_unlabelled: int


def count_labels(source: Source) -> LabelCounts | None:
    """How a source's labels are spread over all of its rows; None where it has none. No picture is read."""
    if source.labels is None:
        return None
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.class_names))
    classes = [Class(name, count) for name, count in zip(source.class_names, counts.tolist(), strict=True) if count]
    smallest, largest = (choose(classes, key=lambda item: item.size) for choose in (min, max))
    return LabelCounts(len(classes), smallest, largest, int((source.labels < 0).sum()))
