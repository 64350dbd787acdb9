"""A hash that changes with the images of a source."""

import hashlib
import os
import stat
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from ssl_vit.data.sources.source import Source
from ssl_vit.data.sources.stored import locate

_ROWS = 100_000  # rows that are read at once


def fingerprint(source: Source, rows: Int[np.ndarray, " n"]) -> str:
    """A hash that tells these rows of a source from others, and from themselves after a change.

    It covers path, size and time of change of each image in a file of its own; for all others the data set's own
    fingerprint, and size and time of its files.
    """
    digest = hashlib.sha256(np.ascontiguousarray(rows, dtype=np.int64).tobytes())
    digest.update(f"{source.rows._fingerprint} {source.image_column}\n".encode())
    digest.update(source.pages.encode() if isinstance(source.pages, str) else source.pages[rows].tobytes())
    digest.update(b"" if source.tiles is None else source.tiles[rows].tobytes())
    for file in source.rows.cache_files:
        digest.update(f"{_size_and_time(file['filename'])}\n".encode())
    for part, path in _files(source, rows):
        roots = source.roots[part]
        line = f"{roots} {path!r} {_size_and_time(locate(path, roots))}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files(source: Source, rows: Int[np.ndarray, " n"]) -> Iterator[tuple[int, str]]:
    """The source of the mixture and the path of each row that has a path and no bytes, in a fixed order.

    Read in Arrow without touching an image: there may be millions.
    """
    indices = source.rows._indices
    parts = np.full(source.rows.data.num_rows, -1)  # -1: not among `rows`
    places = rows if indices is None else np.asarray(indices.column(0))[rows]
    parts[places] = 0 if source.mixture is None else source.mixture.origin[rows]
    column = source.rows.data.column(source.image_column)
    for start in range(0, len(parts), _ROWS):
        data, path = (_field(column.slice(start, _ROWS), name) for name in ("bytes", "path"))
        here = parts[start : start + _ROWS]
        in_files = (here >= 0) & np.asarray(data.is_null()) & np.asarray(path.is_valid())
        yield from zip(here[in_files].tolist(), path.filter(pa.array(in_files)).to_pylist(), strict=True)


def _field(images: Any, name: str) -> Any:
    return pc.call_function("struct_field", [images], pc.StructFieldOptions([name]))


def _size_and_time(path: str | None) -> tuple[int, int] | None:
    try:
        status = os.stat(path) if path is not None else None  # noqa: PTH116  # a Path for each of millions is slow
    except OSError:
        return None
    return (status.st_size, status.st_mtime_ns) if status is not None and stat.S_ISREG(status.st_mode) else None
