"""Which columns of a data set hold the images and the classes; and labels from a column of classes."""

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

from ssl_vit.data.config import DataConfig, near_match, setting_error

# Columns taken for labels if they hold integers, and preferred if there are several columns of classes.
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
_MAX_CLASSES = 1_000_000  # more "classes" than this are identifiers
_FEW = 10  # so few different numbers are classes, however few rows there are
_IGNORED = 255  # "no label" in masks and tables of bytes
Labels = tuple[Int64[np.ndarray, " n"] | None, tuple[str, ...]]
"""Index into the class names of each row, -1 = no label, or None if no row has a label; and those names."""


def check_column(features: datasets.Features, config: DataConfig, field: str) -> str:
    """The column that a setting names; refuses a name that there is not."""
    name = getattr(config, field)
    if name not in list(features):
        near = near_match(name, list(features))
        raise setting_error(config, field, f"no such column; {near}there are: {columns_with_types(features)}")
    return name


def columns_with_types(features: datasets.Features) -> str:
    return ", ".join(f"{name} ({type_name(feature)})" for name, feature in features.items())


def find_image_column(features: datasets.Features, config: DataConfig) -> str:
    ranks = {name: rank for name, feature in features.items() if (rank := _image_rank(feature))}
    if config.image_column is not None:
        name = check_column(features, config, "image_column")
        if name not in ranks:
            raise setting_error(config, "image_column", f"not a column of images: {columns_with_types(features)}")
        return name
    candidates = [name for name, rank in ranks.items() if rank == min(ranks.values())]
    if not candidates:
        raise setting_error(config, "source", f"no column holds images; there are: {columns_with_types(features)}")
    if len(candidates) > 1:
        listed = ", ".join(candidates)
        raise setting_error(config, "image_column", f"several columns hold images, name one of them: {listed}")
    return candidates[0]


def _image_rank(feature: Any) -> int:
    """How surely a column holds images: 1 surely to 3 possibly; 0 = it does not.

    A parquet file without Hugging Face's metadata has structs or plain bytes only.
    """
    if isinstance(feature, datasets.Image):
        return 1
    if isinstance(feature, dict) and "bytes" in feature and set(feature) <= {"bytes", "path"}:
        return 2
    return 3 if isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary") else 0


def find_label_column(features: datasets.Features, config: DataConfig) -> str | None:
    if config.label_column == "none":
        return None
    if config.label_column is not None:
        return check_column(features, config, "label_column")
    candidates = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in _LABEL_COLUMNS if name in candidates]
    if len(candidates) > 1 and not usual:
        listed = ", ".join(candidates)
        raise setting_error(config, "label_column", f"several columns hold classes, name one or 'none': {listed}")
    numbered = [name for name in _LABEL_COLUMNS if is_integer(features.get(name))]
    return next(iter(usual + candidates + numbered), None)


def notes_on_other_columns(features: datasets.Features) -> tuple[str, ...]:
    """Why columns whose names look like labels are not used, where no setting names one."""
    return tuple(
        f"no labels: column {name!r} holds {type_name(features[name])}"
        + (f"; give --data.label_column {name} if these are classes" if is_text_or_bool(features[name]) else "")
        for name in _LABEL_COLUMNS
        if name in features
    )


def is_integer(feature: Any) -> bool:
    """Whether a column holds integers."""
    return isinstance(feature, datasets.Value) and pa.types.is_integer(feature.pa_type)


def is_text_or_bool(feature: Any) -> bool:
    """Whether a column holds strings or booleans, which are classes where a setting names it."""
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "bool")


def read_labels(rows: datasets.Dataset, column: str, *, is_named: bool = True) -> tuple[Labels, tuple[str, ...]]:
    """Labels and class names of a column of classes, integers, booleans or strings; and notes for the user.

    Numbers count from 0, to the last name where the column names its classes; else the numbers that occur are the
    classes. None, -1, and 255 where all others are below 128, mean no label. Integers that hardly repeat are no
    classes unless the user named the column (`is_named`).

    Raises:
        ValueError: another type, or a number that cannot be a label.
    """
    feature, notes = rows.features[column], ()
    if is_integer(feature) or isinstance(feature, datasets.ClassLabel) or type_name(feature) == "bool":
        labels, notes = _check_labels(rows, column)
        if isinstance(feature, datasets.ClassLabel):
            names = tuple(feature.names)
        else:
            numbers, has_label = np.unique(labels[labels >= 0]), labels >= 0
            if not is_named and len(numbers) > max(_FEW, has_label.sum() / 2):
                what = f"column {column!r} holds {len(numbers):,} different numbers in {has_label.sum():,} rows"
                return (None, ()), (f"no labels: {what}; give --data.label_column {column} if these are classes",)
            names = tuple(map(str, numbers.tolist()))
            labels = np.where(has_label, np.searchsorted(numbers, labels), -1)
    elif is_text_or_bool(feature):
        labels, names = encode(_arrow_column(rows, column))
    else:
        what = f"holds {type_name(feature)}; labels are classes, integers, booleans or strings"
        raise ValueError(f"data.label_column={column!r}: {what}; name another column, or 'none'")
    return ((labels, names) if (labels >= 0).any() else (None, ())), notes


def _check_labels(rows: datasets.Dataset, column: str) -> tuple[Int64[np.ndarray, " n"], tuple[str, ...]]:
    """The labels of a column of numbers, none out of range; and notes for the user."""
    feature, values = rows.features[column], _arrow_column(rows, column)
    # uint64 may exceed int64, and would turn negative.
    highest = pc.call_function("max", [values])
    is_huge = pa.types.is_uint64(values.type) and (highest.as_py() or 0) > np.iinfo(np.int64).max
    labels = integers(rows, column)
    end = len(feature.names) if isinstance(feature, datasets.ClassLabel) else _MAX_CLASSES
    notes = ()
    is_ignored = (labels == _IGNORED) & (end <= _IGNORED or end == _MAX_CLASSES)
    if is_ignored.any() and (labels[~is_ignored] <= _IGNORED // 2).all():
        labels = np.where(is_ignored, -1, labels)
        notes = (f"{is_ignored.sum():,} rows of column {column!r} hold {_IGNORED} and count as rows without a label",)
    wrong = np.flatnonzero((labels < -1) | (labels >= end))
    if is_huge or len(wrong):
        row = int(pc.index(values, highest).as_py() if is_huge else wrong[0])
        what = f"row {row} holds {values[row].as_py()}; labels count from 0 (-1 = no label) to below {end}"
        raise ValueError(f"data.label_column={column!r}: {what}; mend the column, name another one, or 'none'")
    return labels, notes


def _arrow_column(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    table: Any = rows.select_columns([column]).with_format("arrow")[:]
    return table.column(column)


def integers(rows: datasets.Dataset, column: str) -> Int64[np.ndarray, " n"]:
    """A column of integers or booleans, with -1 for missing values."""
    values = pc.cast(_arrow_column(rows, column), pa.int64(), safe=False)
    return np.asarray(pc.fill_null(values, -1), dtype=np.int64)


def encode(values: list[str] | pa.ChunkedArray) -> tuple[Int64[np.ndarray, " n"], tuple[str, ...]]:
    """Index of each string among the sorted distinct strings, -1 for None; and those strings."""
    # In Arrow: ten million Python strings would take a gigabyte and half a minute.
    column: Any = pa.chunked_array([pa.array(values, pa.string())]) if isinstance(values, list) else values
    names = sorted(name for name in column.unique().to_pylist() if name is not None)
    indices = pc.call_function("index_in", [column], pc.SetLookupOptions(pa.array(names, column.type), skip_nulls=True))
    return np.asarray(pc.fill_null(indices, -1), dtype=np.int64), tuple(names)


def type_name(feature: Any) -> str:
    """The name of a column's type."""
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
