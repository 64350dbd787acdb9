"""Where the images come from: every kind of source as an indexable set of undecoded images."""

import difflib
import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8
from torch import Tensor

from ssl_vit.data import openmoji
from ssl_vit.data.decode import decode
from ssl_vit.data.headers import MAX_PIXELS
from ssl_vit.data.labels import Labels, encode, integers, is_integer, read_labels, type_name

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "npy")
MAX_TRIES = 50  # rows in which a picture that can be decoded is looked for
# A source that ends in one of these is a mistyped path rather than the name of a data set on the hub.
_FILE_SUFFIXES = (*_IMAGE_SUFFIXES, "parquet", "arrow", "csv", "json", "npz", "zip", "tar", "gz")
_KINDS = (
    "'openmoji' (built-in demo pictures), a folder of images, a parquet file or a quoted glob of them, "
    "a folder written by datasets' save_to_disk, or the id of a data set on the Hugging Face hub"
)
# Columns taken for labels if they hold integers, and preferred if there are several columns of classes.
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


@dataclass(frozen=True)
class DataConfig:
    """Which images to use, and how they become numbers."""

    source: str = ""
    """openmoji | folder of images | parquet file or glob | save_to_disk folder | Hugging Face hub id."""
    split: str = "train"
    """Split of a hub, parquet or save_to_disk source. Hub and parquet also take slices: `train[:10%]`."""
    image_column: str | None = None
    """Column that holds the images; found by its type where there is only one."""
    label_column: str | None = None
    """Column that holds the classes, for evaluation; found where possible. `none` = ignore labels."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, of images scaled to [0, 1]. Their number is the number of channels."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, of images scaled to [0, 1]."""
    max_pixels: int = MAX_PIXELS
    """Most pixels, height times width, of a picture; larger ones are refused before memory is taken for them."""
    on_bad_image: Literal["skip", "raise"] = "skip"
    """When training draws a picture that cannot be decoded: take the next good one and note it, or stop."""
    max_bad_share: float = 0.05
    """Stop when more than this share of the pictures drawn, or of the source, cannot be decoded."""
    num_workers: int = -1
    """Loader processes of each training process; -1 = chosen from the machine."""

    def __post_init__(self) -> None:
        if not self.split:
            raise ValueError(f"split={self.split!r}: name a split, such as 'train'")
        if not self.mean or not all(0 <= value <= 1 for value in self.mean):
            raise ValueError(f"mean={self.mean!r}: give one number in [0, 1] per channel; divide 0-255 by 255")
        if not all(0 < value <= 1 for value in self.std):
            raise ValueError(f"std={self.std!r}: give one number in (0, 1] per channel; divide 0-255 by 255")
        if len(self.std) != len(self.mean):
            raise ValueError(f"std={self.std!r}: give as many numbers as in mean={self.mean!r}")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels={self.max_pixels!r}: must be at least 1")
        if self.on_bad_image not in ("skip", "raise"):
            raise ValueError(f"on_bad_image={self.on_bad_image!r}: choose 'skip' or 'raise'")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share={self.max_bad_share!r}: must lie between 0 and 1; 1 never stops")
        if self.num_workers < -1:
            raise ValueError(f"num_workers={self.num_workers!r}: must be at least 0, or -1 (automatic)")


@dataclass(frozen=True, eq=False)
class Source:
    """An indexable set of images, undecoded."""

    name: str
    """`data.source` as the user wrote it."""
    rows: datasets.Dataset
    """The image column alone, as `Image(decode=False)`: `{"bytes": ..., "path": ...}` per row."""
    image_column: str
    """Name of that column."""
    labels: Int64[np.ndarray, " n"] | None = None
    """Index into `class_names` of each row, -1 = no label. None if no row has a label."""
    class_names: tuple[str, ...] = ()
    """Names of the classes; () when there are no labels."""
    groups: Int64[np.ndarray, " n"] | None = None
    """Rows of one group are variants of one picture and stay on one side of any split. None: no variants."""
    columns: datasets.Dataset | None = None
    """The other columns of the same rows; None where there are none."""
    attribution: str | None = None
    """Text that the pictures' licence asks to be shown with them."""
    max_pixels: int = MAX_PIXELS
    """Larger pictures are refused."""

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, rows: Int64[np.ndarray, " r"]) -> "Source":
        """Some rows of the source, in this order."""
        return replace(
            self,
            rows=self.rows.select(rows),
            columns=None if self.columns is None else self.columns.select(rows),
            labels=None if self.labels is None else self.labels[rows],
            groups=None if self.groups is None else self.groups[rows],
        )

    def image(self, index: int, num_channels: int) -> UInt8[Tensor, "{num_channels} h w"]:
        """Decode the image of one row, see `decode`.

        Raises:
            ValueError: the image cannot be decoded. Names the source, the row and, if any, the path.
        """
        stored = self.rows[index][self.image_column] or {}
        path = stored.get("path")
        data = stored.get("bytes") or path
        try:
            if data is None:
                raise ValueError("the row holds no image")
            return decode(data, num_channels, self.max_pixels)
        except (ValueError, OSError) as error:
            where = f"row {index}" + (f" ({path})" if path else "")
            raise ValueError(f"data.source={self.name!r}: {where}: {error}") from error

    def next_image(self, index: int, num_channels: int) -> tuple[UInt8[Tensor, "{num_channels} h w"], int]:
        """The picture of a row, or of the next one that can be decoded, round the end; and the row it is of.

        Raises:
            ValueError: none of `MAX_TRIES` rows can be decoded. Names the first.
        """
        first: ValueError | None = None
        for row in range(index, index + min(MAX_TRIES, len(self))):
            try:
                return self.image(row % len(self), num_channels), row % len(self)
            except ValueError as error:
                first = first or error
        raise ValueError(f"{first}; nor can any of the next {MAX_TRIES - 1} be decoded") from first


def open_source(config: DataConfig) -> Source:
    """Open the images that `config` names. None is decoded yet.

    Raises:
        ValueError: nothing usable there. The text begins with the setting at fault: `data.source='...': ...`.
    """
    return replace(_open(config), max_pixels=config.max_pixels)


def _open(config: DataConfig) -> Source:
    if not config.source:
        raise _error(config, "source", f"name the images: {_KINDS}")
    if config.source == "openmoji":
        return _open_openmoji(config)
    try:
        path = Path(config.source).expanduser()
        if path.is_dir():
            if not _is_saved_dataset(path):
                return _open_folder(path, config)
            rows = _load_saved(path, config)
        elif path.exists() or glob.has_magic(config.source):
            rows = _load_parquet(path, config)
        else:
            rows = _load_from_hub(config)
    except (OSError, RuntimeError) as error:
        raise _error(config, "source", f"cannot be read: {error}") from error
    return _open_rows(rows, config)


def _error(config: DataConfig, field: str, what: str) -> ValueError:
    """An error about one setting; use as `raise _error(...)`."""
    return ValueError(f"data.{field}={getattr(config, field)!r}: {what}")


def near_match(name: str, names: list[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {matches[0]!r}? " if matches else ""


def _refuse_columns(config: DataConfig, what: str) -> None:
    """Refuse settings that would have no effect on a source that has neither splits nor columns."""
    no_effect = {"split": ("train",), "image_column": (None,), "label_column": (None, "none")}
    for field, values in no_effect.items():
        if getattr(config, field) not in values:
            raise _error(config, field, f"{what} has neither splits nor columns; leave this setting out")


def _open_openmoji(config: DataConfig) -> Source:
    _refuse_columns(config, "the built-in source")
    rows = openmoji.load()
    keep_labels = config.label_column != "none"
    return Source(
        name=config.source,
        rows=rows.select_columns(["image"]),
        image_column="image",
        labels=integers(rows, "label") if keep_labels else None,
        class_names=openmoji.GROUP_NAMES if keep_labels else (),
        groups=integers(rows, "group"),
        attribution=openmoji.ATTRIBUTION,
    )


def _open_folder(root: Path, config: DataConfig) -> Source:
    _refuse_columns(config, "a folder of images")
    prefix = str(root).rstrip(os.sep) + os.sep
    files = sorted(path.removeprefix(prefix) for path in _walk(str(root)))
    images = [file for file in files if _suffix(file) in _IMAGE_SUFFIXES]
    if not images:
        parquet = any(_suffix(file) == "parquet" for file in files)
        hint = f"; for its parquet files, give a quoted glob: '{prefix}**/*.parquet'" if parquet else ""
        kinds = " ".join(_IMAGE_SUFFIXES)
        raise _error(config, "source", f"no images in this folder or below it (looked for {kinds}){hint}")
    # Arrow holds the paths in one block: millions of them cost little memory and are shared with the workers.
    rows = datasets.Dataset.from_dict({"image": [prefix + file for file in images]})
    labels, class_names = _folder_labels(images) if config.label_column != "none" else (None, ())
    return Source(
        name=config.source,
        rows=rows.cast_column("image", datasets.Image(decode=False)),
        image_column="image",
        labels=labels,
        class_names=class_names,
    )


def _walk(root: str) -> Iterator[str]:
    """Paths of all files below a folder but hidden ones. Links are followed, each folder is read once."""
    pending, seen = [root], set()
    while pending:
        folder = pending.pop()
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link to a folder above it, or to one read before
        seen.add((status.st_dev, status.st_ino))
        subfolders = []
        with os.scandir(folder) as entries:
            for entry in entries:
                # Path's tests take a link that leads nowhere, or to itself, for no folder and no file.
                item = Path(entry.path) if entry.is_symlink() else entry
                if entry.name.startswith("."):
                    continue
                if item.is_dir():
                    subfolders.append(entry.path)
                elif item.is_file():
                    yield entry.path
        pending += sorted(subfolders, reverse=True)  # a fixed order: of two links the same one always wins


def _suffix(file: str) -> str:
    return file.lower().rpartition(".")[2] if "." in file else ""


def _folder_labels(images: list[str]) -> Labels:
    """Labels by first-level folder, if every image lies in one and there are at least two."""
    folders = [image.partition(os.sep)[0] for image in images if os.sep in image]
    labels, names = encode(folders)
    return (labels, names) if len(folders) == len(images) and len(names) > 1 else (None, ())


def _is_saved_dataset(folder: Path) -> bool:
    is_dict = (folder / "dataset_dict.json").is_file()
    return is_dict or ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file())


def _load_saved(folder: Path, config: DataConfig) -> datasets.Dataset:
    try:
        saved = datasets.load_from_disk(folder)
    except Exception as error:  # whatever a half-written folder makes the reader stumble over
        raise _error(config, "source", f"this save_to_disk folder is empty or incomplete: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        if config.split not in saved:
            names = list(map(str, saved))
            near = near_match(config.split, names)
            raise _error(config, "split", f"no such split; {near}there are: {', '.join(names)}")
        return saved[config.split]
    if config.split not in ("train", str(saved.split)):
        raise _error(config, "split", "data.source is one data set without splits; leave data.split out")
    return saved


def _load_parquet(path: Path, config: DataConfig) -> datasets.Dataset:
    # Path.glob refuses absolute patterns.
    files = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
    if not files:
        raise _error(config, "source", "no file matches this pattern")
    num_rows = 0
    for file in files:
        if _suffix(file) != "parquet":
            raise _error(config, "source", f"{file} is not a parquet file; data.source may be {_KINDS}")
        try:
            num_rows += pq.read_metadata(file).num_rows
        except pa.ArrowException as error:
            raise _error(config, "source", f"{file} is not a readable parquet file: {error}") from error
    if num_rows == 0:
        raise _error(config, "source", "holds no rows")
    try:
        loaded = datasets.load_dataset("parquet", data_files={"train": files}, split=config.split)
        return cast(datasets.Dataset, loaded)
    except ValueError as error:  # what `datasets` raises for an unknown split, or a slice it cannot parse
        raise _error(config, "split", f"{error} Parquet files are the split 'train'") from error
    except Exception as error:
        reason = error.__cause__ or error  # the outer error only says that there was one
        raise _error(config, "source", f"reading the parquet files failed: {reason}") from error


def _load_from_hub(config: DataConfig) -> datasets.Dataset:
    source = config.source
    starts_as_path = source.startswith(("/", ".", "~"))
    if starts_as_path or source.count("/") > 1 or "\\" in source or _suffix(source) in _FILE_SUFFIXES:
        raise _error(config, "source", "no such file or folder")
    try:
        return cast(datasets.Dataset, datasets.load_dataset(source, split=config.split))
    except Exception as error:  # not found, not allowed, offline, unknown split, a format that needs code ...
        what = (
            f"no such file or folder here, and loading split {config.split!r} of the data set of this name "
            f"from the Hugging Face hub failed: {error}. data.source may be {_KINDS}"
        )
        raise _error(config, "source", what) from error


def _open_rows(rows: datasets.Dataset, config: DataConfig) -> Source:
    if len(rows) == 0:
        raise _error(config, "source", f"split {config.split!r} holds no rows")
    image_column = _find_image_column(rows, config)
    label_column = _find_label_column(rows, config)
    labels, class_names = read_labels(rows, label_column) if label_column else (None, ())
    images = rows.with_format(None).select_columns([image_column])
    others = [name for name in rows.column_names if name != image_column]
    return Source(
        name=config.source,
        rows=images.cast_column(image_column, datasets.Image(decode=False)),
        image_column=image_column,
        labels=labels,
        class_names=class_names,
        columns=rows.with_format(None).select_columns(others) if others else None,
    )


def _check_column(rows: datasets.Dataset, config: DataConfig, field: str) -> str:
    """The column named by a setting, if there is one of this name."""
    name = getattr(config, field)
    if name not in rows.column_names:
        near = near_match(name, rows.column_names)
        raise _error(config, field, f"no such column; {near}there are: {_columns_with_types(rows)}")
    return name


def _columns_with_types(rows: datasets.Dataset) -> str:
    return ", ".join(f"{name} ({type_name(feature)})" for name, feature in rows.features.items())


def _find_image_column(rows: datasets.Dataset, config: DataConfig) -> str:
    ranks = {name: rank for name, feature in rows.features.items() if (rank := _image_rank(feature))}
    if config.image_column is not None:
        name = _check_column(rows, config, "image_column")
        if name not in ranks:
            raise _error(config, "image_column", f"not a column of images: {_columns_with_types(rows)}")
        return name
    candidates = [name for name, rank in ranks.items() if rank == min(ranks.values())]
    if not candidates:
        raise _error(config, "source", f"no column holds images; there are: {_columns_with_types(rows)}")
    if len(candidates) > 1:
        listed = ", ".join(candidates)
        raise _error(config, "image_column", f"several columns hold images, name one of them: {listed}")
    return candidates[0]


def _image_rank(feature: Any) -> int:
    """1 for surely images to 3 for possibly, 0 for surely not.

    A parquet file written without Hugging Face's metadata has structs or plain bytes only.
    """
    if isinstance(feature, datasets.Image):
        return 1
    if isinstance(feature, dict) and "bytes" in feature and set(feature) <= {"bytes", "path"}:
        return 2
    return 3 if isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary") else 0


def _find_label_column(rows: datasets.Dataset, config: DataConfig) -> str | None:
    if config.label_column == "none":
        return None
    if config.label_column is not None:
        return _check_column(rows, config, "label_column")
    candidates = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in _LABEL_COLUMNS if name in candidates]
    if len(candidates) > 1 and not usual:
        listed = ", ".join(candidates)
        raise _error(config, "label_column", f"several columns hold classes, name one or 'none': {listed}")
    numbered = [name for name in _LABEL_COLUMNS if is_integer(rows.features.get(name))]
    return next(iter(usual + candidates + numbered), None)
