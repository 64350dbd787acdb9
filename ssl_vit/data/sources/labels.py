"""Labels out of the columns of a data set."""

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

# More "classes" than this are identifiers, not labels.
_MAX_CLASSES = 1_000_000
_FEW = 10  # so few different numbers are classes, however few rows there are
_IGNORED = 255  # what masks and tables of bytes say for "no label"
Labels = tuple[Int64[np.ndarray, " n"] | None, tuple[str, ...]]
"""Index into the class names of each row, -1 = no label, or None if no row has a label; and those names."""


def is_integer(feature: Any) -> bool:
    """Whether a column holds integers."""
    return isinstance(feature, datasets.Value) and pa.types.is_integer(feature.pa_type)


def is_text_or_bool(feature: Any) -> bool:
    """Whether a column holds strings or booleans, which are classes where it is named."""
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "bool")


def read_labels(rows: datasets.Dataset, column: str, *, is_named: bool = True) -> tuple[Labels, tuple[str, ...]]:
    """Labels and class names of a column of classes, integers, booleans or strings; and what a user should know of it.

    Numbers count from 0, to the last name where the column names its classes; else those that occur are the classes.
    None, -1, and 255 where all others are below 128, stand for no label. Integers that hardly repeat are no classes
    unless the user named the column.

    Raises:
        ValueError: another type, or a number that is no label.
    """
    feature, notes = rows.features[column], ()
    if is_integer(feature) or isinstance(feature, datasets.ClassLabel) or type_name(feature) == "bool":
        labels, notes = _checked(rows, column)
        if isinstance(feature, datasets.ClassLabel):
            names = tuple(feature.names)
        else:
            numbers, has_label = np.unique(labels[labels >= 0]), labels >= 0
            if not is_named and len(numbers) > max(_FEW, has_label.sum() / 2):
                told = f"column {column!r} holds {len(numbers):,} different numbers in {has_label.sum():,} rows"
                return (None, ()), (f"no labels: {told}; give --data.label_column {column} if these are classes",)
            names = tuple(map(str, numbers.tolist()))
            labels = np.where(has_label, np.searchsorted(numbers, labels), -1)
    elif is_text_or_bool(feature):
        labels, names = encode(_arrow_column(rows, column))
    else:
        what = f"holds {type_name(feature)}; labels are classes, integers, booleans or strings"
        raise ValueError(f"data.label_column={column!r}: {what}; name another column, or 'none'")
    return ((labels, names) if (labels >= 0).any() else (None, ())), notes


def _checked(rows: datasets.Dataset, column: str) -> tuple[Int64[np.ndarray, " n"], tuple[str, ...]]:
    """Labels of which none is out of range."""
    feature, values = rows.features[column], _arrow_column(rows, column)
    # uint64 may be more than int64 holds, and would turn negative.
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
    """A column of integers or booleans, with -1 where there is none."""
    values = pc.cast(_arrow_column(rows, column), pa.int64(), safe=False)
    return np.asarray(pc.fill_null(values, -1), dtype=np.int64)


def encode(values: list[str] | pa.ChunkedArray) -> tuple[Int64[np.ndarray, " n"], tuple[str, ...]]:
    """Index of each string among the sorted different ones, -1 for None; and those strings."""
    # In Arrow: ten million Python strings would take a gigabyte and half a minute.
    column: Any = pa.chunked_array([pa.array(values, pa.string())]) if isinstance(values, list) else values
    names = sorted(name for name in column.unique().to_pylist() if name is not None)
    found = pc.call_function("index_in", [column], pc.SetLookupOptions(pa.array(names, column.type), skip_nulls=True))
    return np.asarray(pc.fill_null(found, -1), dtype=np.int64), tuple(names)


def type_name(feature: Any) -> str:
    """What to call the type of a column."""
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
