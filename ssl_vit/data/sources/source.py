"""Every kind of source as an indexable set of undecoded images."""

import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar, cast
from unicodedata import normalize

import datasets
import numpy as np
from jaxtyping import Int64, UInt8
from torch import Tensor
from tqdm import tqdm

from ssl_vit.core.paths import as_path, path_to_text
from ssl_vit.data.config import KINDS, DataConfig, setting_error
from ssl_vit.data.decode.bounds import MAX_IMAGE_BYTES, read_file
from ssl_vit.data.decode.decode import decode
from ssl_vit.data.decode.formats import note_of_dropped, page_numbers
from ssl_vit.data.sampler import Mixture, as_text
from ssl_vit.data.sources import openmoji
from ssl_vit.data.sources.columns import (
    find_image_column,
    find_label_column,
    integers,
    notes_on_other_columns,
    read_labels,
)
from ssl_vit.data.sources.folders import UNASKED, find_images
from ssl_vit.data.sources.stored import Roots, find_stored
from ssl_vit.data.sources.tables import check_cache, is_saved_dataset, load_from_hub, load_parquet, load_saved

MAX_TRIES = 50  # rows among which an image that can be decoded is sought
_LOOKED_AT = 32  # images whose headers show which of their contents are not used
_Candidate = TypeVar("_Candidate")


@dataclass(frozen=True, eq=False)
class Source:
    """An indexable set of undecoded images."""

    name: str
    """`data.source` as the user wrote it."""
    rows: datasets.Dataset
    """The image column alone, as `Image(decode=False)`: `{"bytes": ..., "path": ...}` per row."""
    image_column: str
    """Name of that column."""
    labels: Int64[np.ndarray, " n"] | None = None
    """Index into `class_names` of each row, -1 = no label; None if no row has a label."""
    class_names: tuple[str, ...] = ()
    """Names of the classes; () when there are no labels."""
    groups: Int64[np.ndarray, " n"] | None = None
    """Rows of one group are variants of one image and stay on one side of any split; None = no variants."""
    columns: datasets.Dataset | None = None
    """The other columns of the same rows; None where there are none."""
    attribution: str | None = None
    """Text that the images' licence asks to be shown with them."""
    max_image_bytes: int = MAX_IMAGE_BYTES
    """Images that take more are refused."""
    pages: Literal["first", "channels"] | Int64[np.ndarray, " n"] = "first"
    """What of an image of several pages is decoded; an array holds the page of each row."""
    mixture: Mixture | None = None
    """The source that each row comes from; None where there is only one."""
    roots: tuple[Roots, ...] = ((),)
    """The files that rows may open, for each source of the mixture or the only one."""
    notes: tuple[str, ...] = ()
    """Sentences for the user before the first step: files left aside, classes found."""
    unlabelled: str = ""
    """Why there are no labels, and what to do; "" where there are."""
    root: str | None = None
    """The folder of images, or of its split, below which paths tell them apart; None for other sources."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_samples(self) -> int:
        """Images in an epoch."""
        return len(self)

    @property
    def num_classes(self) -> int:
        """Number of classes that have images."""
        return 0 if self.labels is None else len(np.unique(self.labels[self.labels >= 0]))

    def subset(self, rows: Int64[np.ndarray, " r"]) -> "Source":
        """The source with the given rows alone, in their order."""
        return replace(
            self,
            rows=self.rows.select(rows),
            columns=None if self.columns is None else self.columns.select(rows),
            labels=None if self.labels is None else self.labels[rows],
            groups=None if self.groups is None else self.groups[rows],
            pages=self.pages if isinstance(self.pages, str) else self.pages[rows],
            mixture=None if self.mixture is None else self.mixture.subset(rows),
        )

    def image(self, index: int, num_channels: int) -> UInt8[Tensor, "{num_channels} h w"]:
        """Decode the image of one row, see `decode`.

        Raises:
            ValueError: the image cannot be decoded; names the source, the row and, if any, the path.
        """
        try:
            return self.decode(index, self.file(index), num_channels)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.where(index)}: {error}") from error

    def file(self, index: int) -> bytes | Path:
        """The encoded image of a row, or its file; errors hold the reason alone, see `find_stored`."""
        return find_stored(self.rows[index][self.image_column], self.roots[self.part(index)])

    def encoded(self, index: int) -> bytes:
        """The encoded image of a row, read from its file if it has one."""
        data = self.file(index)
        return data if isinstance(data, bytes) else read_file(data, self.max_image_bytes)

    def part(self, index: int) -> int:
        """The number of a row's source in the mixture; 0 where there is only one."""
        return 0 if self.mixture is None else int(self.mixture.origin[index])

    def decode(self, index: int, data: bytes | Path, num_channels: int) -> UInt8[Tensor, "{num_channels} h w"]:
        """Decode the file of a row by the source's settings; errors hold the reason alone."""
        pages = self.pages if isinstance(self.pages, str) else int(self.pages[index])
        return decode(data, num_channels, self.max_image_bytes, pages)

    def note_of_dropped(self, num_channels: int) -> str | None:
        """A sentence on contents of a few images that are not used, by their headers; None where all are."""
        if not isinstance(self.pages, str):
            return None
        rows = np.unique(np.linspace(0, len(self) - 1, _LOOKED_AT).astype(int)).tolist()
        return note_of_dropped(filter(None, map(self._file_or_none, rows)), num_channels, self.pages)

    def _file_or_none(self, index: int) -> bytes | Path | None:
        try:
            return self.file(index)
        except (ValueError, OSError):
            return None

    def _origin(self, index: int) -> tuple[str, int]:
        """The name of a row's source, and the row's number there."""
        if self.mixture is None:
            return self.name, index
        origin = self.mixture.origin
        return self.mixture.names[origin[index]], int((origin[:index] == origin[index]).sum())

    def where(self, index: int) -> str:
        """The beginning of an error about the image of a row: source, row and, if any, path."""
        path = (self.rows[index][self.image_column] or {}).get("path")
        name, row = self._origin(index)
        page = "" if isinstance(self.pages, str) else f", page {self.pages[index]}"
        return f"data.source={name!r}: row {row}" + (f" ({path}{page})" if path else page)

    def next_image(
        self, index: int, num_channels: int, at: Callable[[int], None] | None = None
    ) -> tuple[UInt8[Tensor, "{num_channels} h w"], int]:
        """Decode `index` or the next decodable row (wrapping); return image and row.

        In a mixture the next row is one of the same source.

        Args:
            at: called with each row before it is decoded.

        Raises:
            ValueError: none of `MAX_TRIES` rows can be decoded. Names the first.
        """

        def rows() -> Iterator[int]:
            yield index
            following = np.roll(np.arange(len(self)), -index) if self.mixture is None else self.mixture.alike(index)
            yield from following[1:MAX_TRIES].tolist()

        def decode(row: int) -> Tensor:
            if at is not None:
                at(row)
            return self.image(row, num_channels)

        return decode_first(rows(), decode)


def decode_first(
    candidates: Iterator[_Candidate],
    decode: Callable[[_Candidate], Tensor],
    skipped: Callable[[_Candidate, ValueError], None] | None = None,
) -> tuple[UInt8[Tensor, "c h w"], _Candidate]:
    """Decode the first candidate that can be decoded; return image and candidate.

    Args:
        skipped: called with each candidate that cannot be decoded, and why.

    Raises:
        ValueError: none of `MAX_TRIES` can be decoded. Names the first.
    """
    first = None
    for candidate in islice(candidates, MAX_TRIES):
        try:
            return decode(candidate), candidate
        except ValueError as error:
            first = first or error
            if skipped is not None:
                skipped(candidate, error)
    raise ValueError(f"{first}; nor can any of the next {MAX_TRIES - 1} be decoded") from first


def open_source(config: DataConfig) -> Source:
    """Open the images that `config` names, without decoding any.

    Raises:
        ValueError: there are no usable images. The text begins with the setting at fault: `data.source='...': ...`.
    """
    if config.streaming:
        raise setting_error(config, "streaming", "images are needed here in any order; leave this setting out")
    opened = _open_mixture(config) if isinstance(config.source, dict) else _open(config)
    if config.pages == "images":
        opened = _with_row_for_each_page(opened)
    elif config.pages == "channels":
        opened = replace(opened, pages="channels")
    return replace(opened, max_image_bytes=config.max_image_bytes)


def _with_row_for_each_page(source: Source) -> Source:
    """The source with each page or frame of its files as an image; pages of one file are one group."""
    numbers = []
    for row in tqdm(range(len(source)), desc="counting pages", unit="file", leave=False, disable=None):
        numbers.append(page_numbers(source._file_or_none(row) or b""))
    rows = np.repeat(np.arange(len(source)), [len(pages) for pages in numbers])
    groups = source.groups if source.groups is not None else np.arange(len(source))
    note = f"{len(source):,} files hold {len(rows):,} pages or frames, each of which is an image"
    notes = (*source.notes, note) if len(rows) > len(source) else source.notes
    pages = np.concatenate(numbers).astype(np.int64)
    return replace(replace(source, groups=groups).subset(rows), pages=pages, notes=notes)


def _open_mixture(config: DataConfig) -> Source:
    """The sources of a mixture as one, their rows one after another."""
    weights = cast("dict[str, float]", config.source)
    parts = [_open(_own_settings(config, name), in_mixture=True) for name in weights]
    mixture = Mixture(tuple(weights), tuple(weights.values()), np.repeat(np.arange(len(parts)), list(map(len, parts))))
    for name, count in zip(weights, mixture.draws(), strict=True):
        if count == 0:
            raise ValueError(f"data.source={as_text(weights)}: {name!r} would never be drawn; give it more weight")
    images = [
        part.rows if part.image_column == "image" else part.rows.rename_column(part.image_column, "image")
        for part in parts
    ]
    class_names = tuple(dict.fromkeys(normalize("NFC", name) for part in parts for name in part.class_names))
    labels = np.concatenate([_labels_among(class_names, part) for part in parts])
    attributions = dict.fromkeys(part.attribution for part in parts if part.attribution)
    return Source(
        name=path_to_text(as_text(weights)),
        rows=datasets.concatenate_datasets(images),
        image_column="image",
        labels=labels if class_names else None,
        class_names=class_names,
        groups=_join_groups(parts),
        attribution=" ".join(attributions) or None,
        mixture=mixture,
        unlabelled="" if class_names else "none of the sources that are mixed has any; name a labelled one",
        roots=tuple(part.roots[0] for part in parts),
        notes=tuple(f"{name}: {note}" for name, part in zip(weights, parts, strict=True) for note in part.notes),
    )


def _own_settings(config: DataConfig, name: str) -> DataConfig:
    """The settings of one source of a mixture: settings of splits and columns skip sources without them."""
    path = as_path(name)
    if name == "openmoji" or (path.is_dir() and not is_saved_dataset(path)):
        label_column = "none" if config.label_column == "none" else None
        split = "train" if name == "openmoji" else config.split
        return replace(config, source=name, split=split, image_column=None, label_column=label_column)
    return replace(config, source=name)


def _labels_among(class_names: tuple[str, ...], part: Source) -> Int64[np.ndarray, " n"]:
    """A source's labels in the mixture's numbers: classes of the same name are one class."""
    if part.labels is None:
        return np.full(len(part), -1, dtype=np.int64)
    index = {name: number for number, name in enumerate(class_names)}
    # -1 stays -1: it points to the last entry.
    numbers = [*(index[normalize("NFC", name)] for name in part.class_names), -1]
    return np.array(numbers, dtype=np.int64)[part.labels]


def _join_groups(parts: list[Source]) -> Int64[np.ndarray, " n"] | None:
    """The groups of all sources, numbered apart; each row of a source without groups is a group of its own."""
    if all(part.groups is None for part in parts):
        return None
    joined, used = [], 0
    for part in parts:
        groups = np.unique(np.arange(len(part)) if part.groups is None else part.groups, return_inverse=True)[1]
        joined.append(groups + used)
        used += int(groups.max()) + 1
    return np.concatenate(joined)


def _open(config: DataConfig, in_mixture: bool = False) -> Source:
    assert isinstance(config.source, str)
    if not config.source:
        raise setting_error(config, "source", f"name the images: {KINDS}")
    if config.source == "openmoji":
        return _open_openmoji(config)
    try:
        path = as_path(config.source)
        if path.is_dir():
            if not is_saved_dataset(path):
                return _open_folder(path, config, split_may_be_missing=in_mixture)
            rows, roots = load_saved(path, config)
        elif path.exists() or glob.has_magic(config.source):
            rows, roots = load_parquet(config)
        else:
            rows, roots = load_from_hub(config)
    except (OSError, RuntimeError) as error:
        raise setting_error(config, "source", f"cannot be read: {error}") from error
    return open_rows(rows, config, roots)


def _refuse_columns(config: DataConfig, what: str) -> None:
    """Refuse settings that have no effect on a source without columns."""
    for field, values in {"image_column": (None,), "label_column": (None, "none")}.items():
        if getattr(config, field) not in values:
            raise setting_error(config, field, f"{what} has no columns; leave this setting out")


def _open_openmoji(config: DataConfig) -> Source:
    _refuse_columns(config, "the built-in source")
    if config.split != "train":
        raise setting_error(config, "split", "the built-in source has no splits; leave this setting out")
    check_cache()
    rows = openmoji.load()
    keep_labels = config.label_column != "none"
    return Source(
        name=cast(str, config.source),
        rows=rows.select_columns(["image"]),
        image_column="image",
        labels=integers(rows, "label") if keep_labels else None,
        class_names=openmoji.GROUP_NAMES if keep_labels else (),
        unlabelled="" if keep_labels else UNASKED,
        groups=integers(rows, "group"),
        attribution=openmoji.ATTRIBUTION,
        notes=("these are the built-in images; the folder of this name here is ./openmoji",)
        if Path("openmoji").exists()
        else (),
    )


def _open_folder(root: Path, config: DataConfig, split_may_be_missing: bool) -> Source:
    _refuse_columns(config, "a folder of images")
    found = find_images(root, config, split_may_be_missing=split_may_be_missing)
    labels, class_names = found.labels
    # Arrow holds the paths in one block: millions of them cost little memory and are shared with the workers.
    rows = datasets.Dataset.from_dict({"image": found.paths})
    return Source(
        name=path_to_text(cast(str, config.source)),
        rows=rows.cast_column("image", datasets.Image(decode=False)),
        image_column="image",
        labels=labels,
        class_names=class_names,
        unlabelled=found.unlabelled,
        root=found.root,
        notes=found.notes,
    )


def open_rows(rows: datasets.Dataset, config: DataConfig, roots: Roots) -> Source:
    """A table as a source: its column of images, and of classes where there is one.

    Args:
        roots: the folders whose files rows may open.

    Raises:
        ValueError: it holds no rows, or no column is known to hold images.
    """
    if len(rows) == 0:
        raise setting_error(config, "source", f"split {config.split!r} holds no rows")
    image_column = find_image_column(rows.features, config)
    label_column = find_label_column(rows.features, config)
    labels, class_names, notes = None, (), ()
    if label_column is not None:
        (labels, class_names), notes = read_labels(rows, label_column, is_named=config.label_column is not None)
    elif config.label_column is None:
        notes = notes_on_other_columns(rows.features)
    images = rows.with_format(None).select_columns([image_column])
    others = [name for name in rows.column_names if name != image_column]
    known = f"there are {', '.join(others)}: name one in data.label_column" if others else "name a labelled source"
    unlabelled = UNASKED if config.label_column == "none" else f"no column is known to hold classes; {known}"
    return Source(
        name=path_to_text(cast(str, config.source)),
        rows=images.cast_column(image_column, datasets.Image(decode=False)),
        image_column=image_column,
        labels=labels,
        class_names=class_names,
        columns=rows.with_format(None).select_columns(others) if others else None,
        unlabelled=unlabelled if labels is None else "",
        roots=(roots,),
        notes=notes,
    )
