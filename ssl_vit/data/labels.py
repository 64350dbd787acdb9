"""Labels out of the columns of a data set."""

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

# More "classes" than this are identifiers, not labels.
_MAX_CLASSES = 1_000_000
Labels = tuple[Int64[np.ndarray, " n"] | None, tuple[str, ...]]
"""Index into the class names of each row, -1 = no label, or None if no row has a label; and those names."""


def is_integer(feature: Any) -> bool:
    """Whether a column holds integers."""
    return isinstance(feature, datasets.Value) and pa.types.is_integer(feature.pa_type)


def read_labels(rows: datasets.Dataset, column: str) -> Labels:
    """Labels and class names of a column of classes, integers, booleans or strings."""
    feature = rows.features[column]
    dtype = type_name(feature)
    if isinstance(feature, datasets.ClassLabel):
        labels, names = integers(rows, column), tuple(feature.names)
    elif is_integer(feature) or dtype == "bool":
        labels = integers(rows, column)
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < -1 or highest >= _MAX_CLASSES:
            what = f"holds {lowest} to {highest}; labels count from 0 (-1 = no label) to below {_MAX_CLASSES}"
            raise ValueError(f"data.label_column={column!r}: {what}; name another column, or 'none'")
        names = tuple(map(str, range(highest + 1)))
    elif dtype in ("string", "large_string"):
        labels, names = encode(_arrow_column(rows, column))
    else:
        what = f"holds {dtype}; labels are classes, integers or strings"
        raise ValueError(f"data.label_column={column!r}: {what}; name another column, or 'none'")
    return (labels, names) if (labels >= 0).any() else (None, ())


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
