"""Reads a source's images for what they hold: sizes, kinds, faults, duplicates, mean and standard deviation."""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int64
from tqdm import tqdm

from ssl_vit.data.copies import Copies, imagehash, take_print
from ssl_vit.data.decode.formats import Contents, contents, file_format
from ssl_vit.data.sources.source import Source
from ssl_vit.doctor.facts import Class, Duplicates, Labels, Pixels, Place, Repeat, Unreadable, UnreadableImage
from ssl_vit.evaluation.scores import wilson_interval

_SHOWN = 5  # faults and duplicates that are named
_LOOKED_AT = 32  # images whose headers tell how many channels there are


@dataclass
class Images:
    """What reading images found. Counts are numbers of images; unreadable ones have no size."""

    num_channels: int
    """Channels that the images were decoded to."""
    num_read: int
    """Images that were looked at, unreadable ones included."""
    unreadable: Unreadable = field(default_factory=Unreadable)
    duplicates: Duplicates = field(default_factory=Duplicates)
    """Readable images that are byte for byte the same as an earlier one."""
    near_duplicates: Duplicates | None = None
    """Other images that look the same as an earlier one; None without the library that finds them."""
    pixels: Pixels = field(default_factory=Pixels)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Height and width in pixels of each readable image, turned upright."""
    files: Counter[Contents] = field(default_factory=Counter)
    """What the files hold, readable or not."""
    contents: Counter[Contents] = field(default_factory=Counter)
    """What the readable files hold."""
    dropped: Counter[str] = field(default_factory=Counter)
    """What readable files hold and a run does not use."""
    seconds: float = 0.0
    """Time that reading and decoding the readable images took."""

    @property
    def num_readable(self) -> int:
        return len(self.sizes)

    @property
    def is_grey(self) -> bool:
        """Whether all readable images are stored without colour."""
        return self.num_readable > 0 and all(held.kind.startswith("greyscale") for held in self.contents)

    def count(self, belongs: Callable[[Contents], bool]) -> int:
        """Readable images whose contents `belongs` holds for."""
        return sum(number for held, number in self.contents.items() if belongs(held))


def choose_rows(num_images: int, sample: int | None, seed: int) -> Int64[np.ndarray, " r"]:
    """A seeded sample of rows in ascending order; all rows if `sample` is None or not smaller."""
    if sample is None or sample >= num_images:
        return np.arange(num_images)
    return np.sort(np.random.default_rng(seed).choice(num_images, size=sample, replace=False))


def read_images(source: Source, rows: Int64[np.ndarray, " r"], num_channels: int) -> Images:
    """Read and decode `rows` of a source one after another, to `num_channels` each; no image is kept."""
    found = Images(num_channels, len(rows), near_duplicates=None if imagehash is None else Duplicates())
    copies = Copies(source, num_channels)
    originals: tuple[set[int], set[int]] = (set(), set())  # rows that look the same, and rows that are the same
    sums = np.zeros((2, num_channels), dtype=np.int64)  # of pixels in [0, 255] and of their squares, exact
    pages = source.pages if isinstance(source.pages, str) else "images"
    for row in tqdm(rows.tolist(), desc="reading", unit="image", leave=False, disable=None):
        data = None
        start = time.perf_counter()
        try:
            data = source.encoded(row)
            pixels = source.decode(row, data, num_channels)
        except (ValueError, OSError) as error:
            found.files[_contents(source, data)] += 1
            found.unreadable.count += 1
            if len(found.unreadable.examples) < _SHOWN:
                reason = " ".join(str(error).split())
                found.unreadable.examples.append(UnreadableImage(row, _path(source, row), reason))
            continue
        found.seconds += time.perf_counter() - start
        held = _contents(source, data)
        found.files[held] += 1
        found.contents[held] += 1
        found.dropped.update(held.dropped(num_channels, pages))
        height, width = pixels.shape[1:]
        found.sizes.append((height, width))
        wide = pixels.flatten(1).to(torch.int32)
        sums += torch.stack([wide.sum(dim=1), (wide * wide).sum(dim=1)]).numpy()
        copy = copies.find(row, take_print(source, row, data, pixels))
        duplicates = found.duplicates if copy is None or copy.is_exact else found.near_duplicates
        if copy is not None and duplicates is not None:
            duplicates.count += 1
            originals[copy.is_exact].add(copy.first)
            duplicates.groups = len(originals[copy.is_exact])
            if len(duplicates.examples) < _SHOWN:
                same_as = Place(copy.first, _path(source, copy.first))
                duplicates.examples.append(Repeat(row, _path(source, row), same_as))
    found.unreadable.share = found.unreadable.count / found.num_read
    if found.num_read < len(source):
        found.unreadable.interval = wilson_interval(found.unreadable.count, found.num_read)
    if found.sizes:
        found.pixels = _pixels(sum(height * width for height, width in found.sizes), *sums.tolist())
    return found


def _path(source: Source, row: int) -> str | None:
    return (source.rows[row][source.image_column] or {}).get("path")


def _pixels(count: int, sums: list[int], squares: list[int]) -> Pixels:
    """Mean and standard deviation of each channel by sums over `count` pixels."""
    # In whole numbers up to the variance, so that nothing cancels.
    variances = (count * square - total**2 for total, square in zip(sums, squares, strict=True))
    mean = tuple(total / (255 * count) for total in sums)
    return Pixels(count, mean, tuple(variance**0.5 / (255 * count) for variance in variances))


def _contents(source: Source, data: bytes | None) -> Contents:
    """What a file holds, as one page where each page is an image; `data` None: the file could not be read."""
    held = Contents(file_format(None)) if data is None else contents(data, source.max_image_bytes)
    return held if isinstance(source.pages, str) else held._replace(pages=1)


def most_common_channels(source: Source, rows: Int64[np.ndarray, " r"]) -> int | None:
    """Channels that more than half of the first few images hold, by their headers; None if there is no such number."""
    found: Counter[int] = Counter()
    stacks = isinstance(source.pages, str) and source.pages == "channels"
    for row in rows[:_LOOKED_AT].tolist():
        with suppress(ValueError, OSError):
            held = _contents(source, source.encoded(row))
            found[held.channels * (held.pages if stacks else 1)] += 1
    channels, count = found.most_common(1)[0] if found else (0, 0)
    return channels if channels and 2 * count > found.total() else None


def count_labels(source: Source) -> Labels | None:
    """Count a source's labels over all of its rows, without reading an image; None if it has none."""
    if source.labels is None:
        return None
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.class_names)).tolist()
    classes = [Class(name, size) for name, size in zip(source.class_names, counts, strict=True) if size]
    smallest, largest = (choose(classes, key=lambda item: item.size) for choose in (min, max))
    return Labels(len(classes), smallest, largest, int((source.labels < 0).sum()))
