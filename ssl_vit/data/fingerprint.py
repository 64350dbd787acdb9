"""What tells the pictures of a source from others, and from themselves after a change."""

import hashlib
import os
import stat
from typing import Any

import numpy as np
from jaxtyping import Int

from ssl_vit.data.sources import Source


def fingerprint(source: Source, rows: Int[np.ndarray, " n"]) -> str:
    """What tells these rows of a source from others, and from themselves after a change.

    Of pictures in files of their own it is path, size and time of change, else the data set's own fingerprint.
    """
    digest = hashlib.sha256(np.ascontiguousarray(rows, dtype=np.int64).tobytes())
    digest.update(f"{source.rows._fingerprint} {source.image_column}".encode())
    digest.update(source.pages.encode() if isinstance(source.pages, str) else source.pages[rows].tobytes())
    first = (source.rows[int(rows[0])][source.image_column] or {}) if len(rows) else {}
    if first.get("bytes") is None and first.get("path") is not None:
        column = source.rows.with_format("arrow")
        for start in range(0, len(rows), 10_000):
            chunk: Any = column[rows[start : start + 10_000]]
            for path in chunk.column(source.image_column).combine_chunks().field("path").to_pylist():
                digest.update(f"{path} {_size_and_time(path)}\n".encode())
    return digest.hexdigest()


def _size_and_time(path: str | None) -> tuple[int, int] | None:
    try:
        status = os.stat(path) if path is not None else None  # noqa: PTH116  # a Path for each of millions is slow
    except OSError:
        return None
    return (status.st_size, status.st_mtime_ns) if status is not None and stat.S_ISREG(status.st_mode) else None
