"""Images read from front to back, without a copy: hub data sets, parquet files and WebDataset tars."""

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from jaxtyping import Int64, UInt8
from torch import Tensor

from ssl_vit.core.paths import as_path
from ssl_vit.data.config import KINDS, DataConfig, near_match, setting_error
from ssl_vit.data.copies import leave_out_copies
from ssl_vit.data.decode.bounds import MAX_IMAGE_BYTES
from ssl_vit.data.decode.decode import Pages, decode
from ssl_vit.data.sampler import SampleKey, epoch_order
from ssl_vit.data.sources.columns import find_image_column, find_label_column
from ssl_vit.data.sources.images import MAX_TRIES, Source
from ssl_vit.data.sources.source import open_source
from ssl_vit.data.sources.stored import Roots, find_stored
from ssl_vit.data.sources.tables import (
    check_hub,
    check_own_files,
    find_files,
    folder_of,
    hub_error,
    read_footers,
    read_parquet,
)
from ssl_vit.data.sources.tars import SUFFIXES, count_samples, read_tar, wanted_kinds

_READ_ROWS = 32  # rows taken from a shard at once


@dataclass(frozen=True, eq=False)
class Stream:
    """Undecoded images in shards, each of which can only be read from front to back."""

    images: Callable[[int, int], Iterator[dict[str, Any] | None]]
    """Undecoded images (`{"bytes": ..., "path": ...}`) of a shard, given its number and the first row to read."""
    shards: tuple[str, ...]
    """The name of each shard."""
    name: str = ""
    """`data.source` as the user wrote it."""
    roots: Roots = None
    """The files that rows may open."""
    counts: Int64[np.ndarray, " s"] | None = None
    """Rows of each shard; None where unknown."""
    num_samples: int | None = None
    """Images in an epoch; None where unknown."""
    max_image_bytes: int = MAX_IMAGE_BYTES
    """Images that take more are refused."""
    pages: Pages = "first"
    """What of an image of several pages is decoded."""
    class_names: tuple[str, ...] = ()
    num_classes: int = 0
    """No labels are read."""
    attribution: str | None = None
    notes: tuple[str, ...] = ()
    """Sentences for the user before the first step."""

    def read(
        self, shard: int, start: int = 0, stop: int | None = None, step: int = 1
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row numbers and undecoded images (`{"bytes": ..., "path": ...}`) of a shard.

        Raises:
            ValueError: the shard cannot be read.
        """
        rows = enumerate(self.images(shard, start), start)
        try:
            for row, stored in islice(rows, 0, None if stop is None else stop - start, step):
                yield row, stored or {}
        except Exception as error:  # damaged, gone, no network ...
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"data.source={self.name!r}: {self.shards[shard]} cannot be read: {reason}") from error

    def where(self, shard: int, row: int, path: str | None = None) -> str:
        """The beginning of an error about an image: source, shard, row and, if any, path."""
        return f"data.source={self.name!r}: {self.shards[shard]}, row {row}" + (f" ({path})" if path else "")

    def decode(
        self, shard: int, row: int, stored: dict[str, Any], num_channels: int
    ) -> UInt8[Tensor, "{num_channels} h w"]:
        """Decode an image that was read.

        Raises:
            ValueError: it cannot be decoded; names the source, the shard, the row and, if any, the path.
        """
        try:
            data = find_stored(stored, self.roots, self.max_image_bytes)
            return decode(data, num_channels, self.max_image_bytes, self.pages)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.where(shard, row, stored.get('path'))}: {error}") from error

    def first_images(self, count: int, num_channels: int) -> list[UInt8[Tensor, "{num_channels} h w"]]:
        """The first images that can be decoded, up to `count`, of the first shard that has any."""
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
        raise ValueError(f"data.source={self.name!r}: no image can be decoded")


def open_images(config: DataConfig) -> Source | Stream:
    """Open the images to learn from, as a stream or without copies if `config` asks for that.

    Raises:
        ValueError: see `open_source`, `open_stream` and `leave_out_copies`.
    """
    if config.streaming:
        return open_stream(config)
    source = open_source(config)
    return leave_out_copies(source, config) if config.drop_duplicates else source


def open_stream(config: DataConfig) -> Stream:
    """Open the shards that `config` names, reading their headers alone.

    Raises:
        ValueError: there are no usable images. The text begins with the setting at fault: `data.source='...': ...`.
    """
    source = cast(str, config.source)
    if not source:
        raise setting_error(config, "source", f"name the images: {KINDS}")
    path = as_path(source)
    if source == "openmoji" or path.is_dir():
        what = "the built-in source is" if source == "openmoji" else "the images of a folder are"
        hint = "" if source == "openmoji" else ", and for shards in it give a quoted glob"
        raise setting_error(config, "streaming", f"{what} read one by one anyway; leave this setting out{hint}")
    stream = _open_files(config) if path.exists() or glob.has_magic(source) else _open_hub(config)
    return replace(stream, name=source, max_image_bytes=config.max_image_bytes, pages=cast(Pages, config.pages))


def _open_files(config: DataConfig) -> Stream:
    if config.split != "train":
        raise setting_error(config, "split", "streamed files are the split 'train', and are not sliced")
    files = find_files(config)
    if any(file.lower().endswith(SUFFIXES) for file in files):
        counts, notes = count_samples(files, config)
        images, roots = partial(read_tar, tuple(files), wanted_kinds(config), config.max_image_bytes), None
    else:
        features, counts = read_footers(files, config)
        if config.num_samples not in (None, sum(counts)):
            raise setting_error(config, "num_samples", f"the files hold {sum(counts)} rows; leave this setting out")
        find_label_column(features, config)  # refuses a mistyped setting
        images = partial(read_parquet, tuple(files), find_image_column(features, config), config.max_image_bytes)
        notes = ()
        roots = folder_of(files, config)
    return Stream(
        images=images,
        shards=tuple(files),
        roots=roots,
        counts=None if counts is None else np.asarray(counts, dtype=np.int64),
        num_samples=config.num_samples if counts is None else sum(counts),
        notes=notes,
    )


def _open_hub(config: DataConfig) -> Stream:
    name, rows = check_hub(config), None
    try:
        builder = datasets.load_dataset_builder(name)
        check_own_files(name, builder.config.data_files)
        if not isinstance(builder, WebDataset):
            rows = cast(datasets.IterableDataset, builder.as_streaming_dataset(split=config.split))
    except Exception as error:  # not found, offline, unknown split, a format that needs code, samples that differ ...
        raise hub_error(config, f"it cannot be streamed from the hub: {type(error).__name__}: {error}") from error
    if rows is None:
        return _open_hub_tars(config, builder.config.data_files or {})
    features, num_shards = rows.features, rows.num_shards
    if features is None:
        raise setting_error(config, "source", "does not say what its columns hold; store it as parquet or WebDataset")
    column = find_image_column(features, config)
    find_label_column(features, config)  # refuses a mistyped setting
    # A split of the hub knows how many rows it has, unless nobody counted them.
    known = (rows.info.splits or {}).get(str(rows.split))
    images = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return Stream(
        images=partial(_read_hub, images, num_shards, column),
        shards=tuple(f"shard {number}" for number in range(num_shards)),
        roots=(f"hf://datasets/{name}",),
        num_samples=config.num_samples or (known.num_examples if known else None) or None,
    )


def _open_hub_tars(config: DataConfig, found: Mapping[Any, Sequence[str]]) -> Stream:
    """Open tars of the hub, read as local ones are, but not their headers: that would take a download."""
    files = tuple(found.get(config.split, ()))
    if not files:
        names = list(map(str, found))
        near = near_match(config.split, names)
        raise setting_error(config, "split", f"no such split; {near}there are: {', '.join(names)}")
    return Stream(
        images=partial(read_tar, files, wanted_kinds(config), config.max_image_bytes),
        shards=files,
        num_samples=config.num_samples,
    )


def _read_hub(
    rows: datasets.IterableDataset, num_shards: int, column: str, shard: int, start: int
) -> Iterator[dict[str, Any] | None]:
    rows = rows.shard(num_shards=num_shards, index=shard)
    # Not `iter(rows)`, which would divide a shard among the loader's workers once more.
    for batch in (rows.skip(start) if start else rows).iter(batch_size=_READ_ROWS):
        yield from cast("dict[str, list[Any]]", batch)[column]


class ShardSlice(NamedTuple):
    """Rows of a shard: every `step`-th from `start`, before `stop` (None: its end)."""

    shard: int
    start: int
    stop: int | None
    step: int


class ReaderState(NamedTuple):
    """How far a reader has come: its next sample is number `position` of the block that begins here."""

    epoch: int = 0
    slice: int = 0
    done: int = 0  # rows of that slice before the block
    block: int = 0
    position: int = 0


class Sample(NamedTuple):
    """An undecoded image, and what its random numbers are drawn from."""

    shard: int
    row: int
    stored: dict[str, Any]
    key: SampleKey


class BadSample(NamedTuple):
    """An image that cannot be decoded."""

    shard: str | None
    row: int
    path: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class ShardSchedule:
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

    def slices(self, epoch: int, reader: int) -> list[ShardSlice]:
        """What a reader reads in an epoch."""
        counts, num_shards = self.stream.counts, len(self.stream.shards)
        if counts is None:
            step = -(-self.num_readers // num_shards)
            order = epoch_order(num_shards * step, self.seed, epoch)[reader :: self.num_readers]
            return [ShardSlice(number % num_shards, number // num_shards, None, step) for number in order.tolist()]
        total = int(counts.sum())
        # The reader of the epoch's sample n is (epoch * total + n) % num_readers.
        first = (np.arange(self.num_readers) - epoch * total) % self.num_readers
        ends = np.cumsum(np.maximum(0, -(-(total - first) // self.num_readers)))
        begin, end = int(ends[reader - 1]) if reader else 0, int(ends[reader])
        slices, offset = [], 0
        for shard in epoch_order(num_shards, self.seed, epoch).tolist():
            size = int(counts[shard])
            start, stop = max(begin - offset, 0), min(end - offset, size)
            if start < stop:
                slices.append(ShardSlice(shard, start, stop, 1))
            offset += size
        return slices

    def samples(self, reader: int, state: ReaderState) -> Iterator[tuple[Sample, ReaderState]]:
        """The endless sequence of a reader's samples from `state` on, and its state after each.

        Raises:
            ValueError: a shard cannot be read, or there is nothing in many epochs.
        """
        epoch, number, done, block, position = state
        empty = 0
        while empty < MAX_TRIES:
            rows = self._rows(self.slices(epoch, reader), number, done)
            while taken := list(islice(rows, self.block_size)):
                rng = np.random.default_rng((self.seed, epoch, reader, block, 3))
                order = rng.permutation(len(taken)).tolist()
                for place in range(position, len(taken)):
                    _, _, shard, row, stored = taken[order[place]]
                    drawn = (block * self.block_size + place) * self.num_readers + reader
                    sample = Sample(shard, row, stored, SampleKey(epoch, drawn, row))
                    yield sample, ReaderState(epoch, number, done, block, place + 1)
                number, done, *_ = taken[-1]
                taken.clear()  # before the next block is read
                block, position = block + 1, 0
            empty = 0 if block else empty + 1
            epoch, number, done, block = epoch + 1, 0, 0, 0
        raise ValueError(f"data.source={self.stream.name!r}: holds too few samples for {self.num_readers} readers")

    def _rows(
        self, slices: list[ShardSlice], first: int, done: int
    ) -> Iterator[tuple[int, int, int, int, dict[str, Any]]]:
        """Rows of an epoch after `done` rows of its slice `first`: slice, rows of it so far, shard, row, image."""
        for number in range(first, len(slices)):
            shard, start, stop, step = slices[number]
            for row, stored in self.stream.read(shard, start + done * step, stop, step):
                done += 1
                yield number, done, shard, row, stored
            done = 0


def choose_num_readers(num_shards: int, wanted: int, num_processes: int) -> int:
    """Readers of a run: the most that processes, and by powers of two their workers, can share evenly."""
    readers = num_processes
    while 2 * readers <= min(num_shards, wanted):
        readers *= 2
    return readers
