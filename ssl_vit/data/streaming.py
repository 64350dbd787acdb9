"""Images read from front to back: hub data sets, parquet files and WebDataset tars, without a copy of them."""

import glob
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import fsspec
import numpy as np
from jaxtyping import Int64, UInt8
from torch import Tensor

from ssl_vit.data.columns import find_image_column, find_label_column
from ssl_vit.data.config import KINDS, DataConfig, setting_error
from ssl_vit.data.decode import Pages, decode
from ssl_vit.data.headers import MAX_PIXELS
from ssl_vit.data.sampler import SampleKey, epoch_order
from ssl_vit.data.sources import MAX_TRIES, Source, count_parquet_rows, find_files, hub_id, open_source

_READ_ROWS = 32  # taken from a shard at once
_TAR_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.][^/]*")  # WebDataset: the files of a sample share what is before a dot


@dataclass(frozen=True, eq=False)
class Stream:
    """A set of undecoded images in shards, each of which can be read from front to back only."""

    name: str
    """`data.source` as the user wrote it."""
    rows: datasets.IterableDataset
    """The image column alone, as `Image(decode=False)`."""
    image_column: str
    """Name of that column."""
    shards: tuple[str, ...]
    """What to call each shard."""
    counts: Int64[np.ndarray, " s"] | None = None
    """Rows of each shard; None where they are not known."""
    num_samples: int | None = None
    """Images of an epoch; None where that is not known."""
    max_pixels: int = MAX_PIXELS
    """Larger pictures are refused."""
    pages: Pages = "first"
    """What of an image of several pages is decoded."""
    class_names: tuple[str, ...] = ()
    """No labels are read."""
    attribution: str | None = None
    notes: tuple[str, ...] = ()
    """What the user should know before the first step, a sentence each."""

    def read(
        self, shard: int, start: int = 0, stop: int | None = None, step: int = 1
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row numbers and undecoded images (`{"bytes": ..., "path": ...}`) of a shard.

        Raises:
            ValueError: the shard cannot be read.
        """
        rows = self.rows.shard(num_shards=len(self.shards), index=shard)
        if start:
            rows = rows.skip(start)

        def images() -> Iterator[dict[str, Any]]:
            # Not `iter(rows)`, which would divide a shard among the loader's workers once more.
            for batch in rows.iter(batch_size=_READ_ROWS):
                yield from cast("dict[str, list[Any]]", batch)[self.image_column]

        try:
            for row, stored in islice(enumerate(images(), start), 0, None if stop is None else stop - start, step):
                yield row, stored or {}
        except Exception as error:  # damaged, gone, no network ...
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"data.source={self.name!r}: {self.shards[shard]} cannot be read: {reason}") from error

    def decode(
        self, shard: int, row: int, stored: dict[str, Any], num_channels: int
    ) -> UInt8[Tensor, "{num_channels} h w"]:
        """Decode an image that was read.

        Raises:
            ValueError: it cannot be decoded. Names the source, the shard, the row and, if any, the path.
        """
        path = stored.get("path")
        try:
            data = stored.get("bytes") or path
            if data is None:
                raise ValueError("the row holds no image")
            if isinstance(data, str) and "://" in data:
                with fsspec.open(data, "rb") as file:
                    data = cast(Any, file).read()
            return decode(data, num_channels, self.max_pixels, self.pages)
        except (ValueError, OSError) as error:
            where = f"row {row}" + (f" ({path})" if path else "")
            raise ValueError(f"data.source={self.name!r}: {self.shards[shard]}, {where}: {error}") from error

    def first_images(self, count: int, num_channels: int) -> list[UInt8[Tensor, "{num_channels} h w"]]:
        """The first pictures that can be decoded, up to `count`, of the first shard that has any."""
        for shard in range(len(self.shards)):
            found = []
            for row, stored in islice(self.read(shard), count + MAX_TRIES):
                try:
                    found.append(self.decode(shard, row, stored, num_channels))
                except ValueError:
                    continue
                if len(found) == count:
                    break
            if found:
                return found
        raise ValueError(f"data.source={self.name!r}: no picture can be decoded")


def open_images(config: DataConfig) -> Source | Stream:
    """Open the images that `config` names, as a stream where it asks for one. None is decoded yet.

    Raises:
        ValueError: see `open_source` and `open_stream`.
    """
    return open_stream(config) if config.streaming else open_source(config)


def open_stream(config: DataConfig) -> Stream:
    """Open the shards that `config` names. Nothing but their headers is read.

    Raises:
        ValueError: nothing usable there. The text begins with the setting at fault: `data.source='...': ...`.
    """
    source = cast(str, config.source)
    if not source:
        raise setting_error(config, "source", f"name the images: {KINDS}")
    path = Path(source).expanduser()
    if source == "openmoji" or path.is_dir():
        what = "the built-in source is" if source == "openmoji" else "the pictures of a folder are"
        hint = "" if source == "openmoji" else ", and for shards in it give a quoted glob"
        raise setting_error(config, "streaming", f"{what} read one by one anyway; leave this setting out{hint}")
    if path.exists() or glob.has_magic(source):
        return _open_files(config)
    return _open_hub(config)


def _open_files(config: DataConfig) -> Stream:
    if config.split != "train":
        raise setting_error(config, "split", "streamed files are the split 'train', and are not sliced")
    files = find_files(config)
    counts: list[int] | None = None
    if any(file.lower().endswith(".tar") for file in files):
        builder = "webdataset"
        for file in files:
            if not tarfile.is_tarfile(file):
                raise setting_error(config, "source", f"{file} is not a tar file, or is empty or damaged")
        if config.num_samples is None:
            counts = [_count_tar_samples(file, config) for file in files]
    else:
        builder, counts = "parquet", count_parquet_rows(files, config)
        if config.num_samples not in (None, sum(counts)):
            raise setting_error(config, "num_samples", f"the files hold {sum(counts)} rows; leave this setting out")
    # Taken for patterns.
    escaped = [glob.escape(file) for file in files]
    rows = _load(config, builder, split="train", data_files={"train": escaped})
    if rows.num_shards != len(files):
        raise setting_error(config, "source", f"{len(files)} files were found and {rows.num_shards} opened")
    return _describe(rows, config, tuple(files), counts)


def _open_hub(config: DataConfig) -> Stream:
    rows = _load(config, hub_id(config), split=config.split)
    return _describe(rows, config, tuple(f"shard {number}" for number in range(rows.num_shards)), None)


def _load(config: DataConfig, name: str, **settings: Any) -> datasets.IterableDataset:
    try:
        return cast(datasets.IterableDataset, datasets.load_dataset(name, streaming=True, **settings))
    except Exception as error:  # not found, offline, unknown split, a format that needs code, samples that differ ...
        what = f"cannot be streamed: {type(error).__name__}: {error}"
        raise setting_error(config, "source", " ".join(what.split())) from error


def _describe(
    rows: datasets.IterableDataset, config: DataConfig, shards: tuple[str, ...], counts: list[int] | None
) -> Stream:
    if rows.features is None:
        raise setting_error(config, "source", "does not say what its columns hold; store it as parquet or WebDataset")
    image_column = find_image_column(rows.features, config)
    find_label_column(rows.features, config)  # finds a mistyped setting
    num_samples = config.num_samples
    if num_samples is None:
        # A split of the hub says how many rows it has, unless nobody counted them.
        known = (rows.info.splits or {}).get(str(rows.split))
        num_samples = sum(counts) if counts is not None else (known.num_examples or None) if known else None
    if num_samples == 0:
        raise setting_error(config, "source", "holds no samples")
    images = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return Stream(
        name=cast(str, config.source),
        rows=images,
        image_column=image_column,
        shards=shards,
        counts=None if counts is None else np.asarray(counts, dtype=np.int64),
        num_samples=num_samples,
        max_pixels=config.max_pixels,
        pages=cast(Pages, config.pages),
    )


def _count_tar_samples(file: str, config: DataConfig) -> int:
    """Samples of a WebDataset tar, found by its headers alone, as `datasets` groups its members."""
    count, before = 0, None
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                cast(Any, tar).members = []  # or all of them would be kept
                match = _TAR_MEMBER.fullmatch(member.name)
                if member.isreg() and match and not member.name.rpartition("/")[2].startswith((".", "__")):
                    count += match[1] != before
                    before = match[1]
    except (tarfile.TarError, OSError) as error:
        raise setting_error(config, "source", f"{file} is damaged: {error}") from error
    return count


class Segment(NamedTuple):
    """Rows of a shard: every `step`-th from `start`, before `stop` (None: its end)."""

    shard: int
    start: int
    stop: int | None
    step: int


class Place(NamedTuple):
    """How far a reader has come: the next sample is number `position` of the block that begins here."""

    epoch: int = 0
    segment: int = 0
    done: int = 0  # rows of that segment before the block
    block: int = 0
    position: int = 0


class Sample(NamedTuple):
    """An undecoded image, and what its random numbers are drawn from."""

    shard: int
    row: int
    stored: dict[str, Any]
    key: SampleKey


class BadSample(NamedTuple):
    """A picture that cannot be decoded."""

    shard: str | None
    row: int
    path: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Walk:
    """How `num_readers` readers share the shards of a stream: all of it once an epoch, in a new order.

    Sample n of the run, counted over everything, is read by reader n % num_readers. Where the rows of the shards are
    known, an epoch's shards are laid end to end and cut where the readers' shares end, so that each epoch of the run
    holds each sample exactly once. Else each reader takes whole shards (or each k-th row of one, where there are fewer
    shards than readers), and one with less to read begins its next epoch earlier.
    """

    stream: Stream
    seed: int
    num_readers: int
    block_size: int
    """Samples that a reader shuffles at once."""

    def segments(self, epoch: int, reader: int) -> list[Segment]:
        """What a reader reads in an epoch."""
        counts, num_shards = self.stream.counts, len(self.stream.shards)
        if counts is None:
            step = -(-self.num_readers // num_shards)
            order = epoch_order(num_shards * step, self.seed, epoch)[reader :: self.num_readers]
            return [Segment(number % num_shards, number // num_shards, None, step) for number in order.tolist()]
        total = int(counts.sum())
        # The reader of the epoch's sample n is (epoch * total + n) % num_readers.
        first = (np.arange(self.num_readers) - epoch * total) % self.num_readers
        ends = np.cumsum(np.maximum(0, -(-(total - first) // self.num_readers)))
        begin, end = int(ends[reader - 1]) if reader else 0, int(ends[reader])
        segments, offset = [], 0
        for shard in epoch_order(num_shards, self.seed, epoch).tolist():
            size = int(counts[shard])
            start, stop = max(begin - offset, 0), min(end - offset, size)
            if start < stop:
                segments.append(Segment(shard, start, stop, 1))
            offset += size
        return segments

    def samples(self, reader: int, place: Place) -> Iterator[tuple[Sample, Place]]:
        """The endless sequence of a reader, from a place on, and the place after each sample.

        Raises:
            ValueError: a shard cannot be read, or there is nothing in many epochs.
        """
        epoch, segment, done, block, position = place
        empty = 0
        while empty < MAX_TRIES:
            rows = self._rows(self.segments(epoch, reader), segment, done)
            while taken := list(islice(rows, self.block_size)):
                rng = np.random.default_rng((self.seed, epoch, reader, block, 3))
                order = rng.permutation(len(taken)).tolist()
                for number in range(position, len(taken)):
                    _, _, shard, row, stored = taken[order[number]]
                    drawn = (block * self.block_size + number) * self.num_readers + reader
                    sample = Sample(shard, row, stored, SampleKey(epoch, drawn, row))
                    yield sample, Place(epoch, segment, done, block, number + 1)
                segment, done, *_ = taken[-1]
                taken.clear()  # before the next block is read
                block, position = block + 1, 0
            empty = 0 if block else empty + 1
            epoch, segment, done, block = epoch + 1, 0, 0, 0
        raise ValueError(f"data.source={self.stream.name!r}: holds too few samples for {self.num_readers} readers")

    def _rows(
        self, segments: list[Segment], first: int, done: int
    ) -> Iterator[tuple[int, int, int, int, dict[str, Any]]]:
        """Rows of an epoch after `done` rows of its segment `first`: segment, rows of it so far, shard, row, image."""
        for number in range(first, len(segments)):
            shard, start, stop, step = segments[number]
            for row, stored in self.stream.read(shard, start + done * step, stop, step):
                done += 1
                yield number, done, shard, row, stored
            done = 0


def choose_num_readers(num_shards: int, wanted: int, num_processes: int) -> int:
    """Readers of a run: as many as there may be, in equal parts for the processes and, by halves, for their workers."""
    readers = num_processes
    while 2 * readers <= min(num_shards, wanted):
        readers *= 2
    return readers
