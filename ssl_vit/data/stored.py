"""From a row of a table to the encoded image: its bytes, or the file that it names where that may be opened."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import fsspec

from ssl_vit.data.paths import path_from_text

_HUB = "hf://"
Roots = tuple[str, ...] | None
"""Folders that the files of rows must lie below, links followed; relative paths begin at the first. (): the paths were
found by walking a folder, and all are opened. None: rows open no files."""


def find_stored(stored: Mapping[str, Any] | None, roots: Roots) -> bytes | Path:
    """The encoded image of a row, or the file that it lies in.

    A path in a row is data, and data opens nothing but what belongs to its own source: no address of any kind, no
    device, no file outside `roots`.

    Args:
        stored: `{"bytes": ..., "path": ...}`; a path counts where there are no bytes.

    Raises:
        ValueError: the row holds no image, or names what may not be opened. The text is the reason only.
        OSError: a file of the hub cannot be read.
    """
    stored = stored or {}
    data, path = stored.get("bytes"), stored.get("path")
    if data is not None:
        return data
    if path is None or roots is None:
        raise ValueError("the row holds no image")
    if roots and roots[0].startswith(_HUB):
        return _read_from_hub(path, roots[0])
    file = Path(locate(path, roots))
    if roots and not file.is_file() and ("://" in path or "::" in path):
        raise ValueError("the row names an address, and addresses in rows are not opened; keep the bytes in the rows")
    if roots:
        file = Path(os.path.realpath(file))
    if roots and not any(file.is_relative_to(root) for root in roots):
        raise ValueError(
            f"lies outside {roots[0]}, and rows open no files outside the folder of their source; "
            "allow_outside_paths=True (--data.allow_outside_paths true) lets them"
        )
    if file.exists() and not file.is_file():
        raise ValueError("is not a regular file")
    return file


def locate(path: str, roots: Roots) -> str:
    """Where the file that a row names lies."""
    return os.path.join(roots[0], path) if roots else path_from_text(path)  # noqa: PTH118  # a Path for each of millions is slow


def _read_from_hub(path: str, repository: str) -> bytes:
    """A file of the streamed repository itself, as `datasets` names those of a folder of images."""
    inside = path.startswith((f"{repository}@", f"{repository}/")) and ".." not in path.split("/")
    if not inside or "::" in path:
        raise ValueError(
            f"the row names a file that is none of {repository}, and no other is opened; leave data.streaming out "
            "where the images lie in archives"
        )
    with fsspec.open(path, "rb") as file:
        return cast(Any, file).read()
