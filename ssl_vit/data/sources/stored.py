"""From a row of a table to the encoded image: its bytes, or the file that it names if that may be opened."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import fsspec

from ssl_vit.core.paths import path_from_text
from ssl_vit.data.decode.bounds import MAX_IMAGE_BYTES

_HUB = "hf://"
Roots = tuple[str, ...] | None
"""Folders that the files of rows must lie below, with links followed; relative paths begin at the first. (): the paths
were found by walking a folder, and all may be opened. None: rows open no files."""


def find_stored(stored: Mapping[str, Any] | None, roots: Roots, max_image_bytes: int = MAX_IMAGE_BYTES) -> bytes | Path:
    """The encoded image of a row, or its file, which `read_file` opens if it is a regular one.

    A path in a row is data, and data may open only what belongs to its own source: no address of any kind, no device,
    no file outside `roots`.

    Args:
        stored: `{"bytes": ..., "path": ...}`; the path is used where there are no bytes. `{"problem": ...}` says why
            there is no image.
        max_image_bytes: most bytes of a file of the hub.

    Raises:
        ValueError: the row holds no image, names what may not be opened, or names a file of the hub that cannot be
            read. The text is the reason alone.
    """
    stored = stored or {}
    data, path = stored.get("bytes"), stored.get("path")
    if data is not None:
        return data
    if path is None or roots is None:
        raise ValueError(stored.get("problem", "the row holds no image"))
    if roots and roots[0].startswith(_HUB):
        return _read_from_hub(path, roots[0], max_image_bytes)
    file = Path(locate(path, roots))
    if roots and ("://" in path or "::" in path) and not file.is_file():
        raise ValueError("the row names an address, and addresses in rows are not opened; keep the bytes in the rows")
    if roots:
        file = Path(os.path.realpath(file))
    if roots and not any(file.is_relative_to(root) for root in roots):
        raise ValueError(
            f"lies outside {roots[0]}, and rows open no files outside the folder of their source; "
            "allow_outside_paths=True (--data.allow_outside_paths true) lets them"
        )
    return file


def locate(path: str, roots: Roots) -> str:
    """The full path of the file that a row names."""
    return os.path.join(roots[0], path) if roots else path_from_text(path)  # noqa: PTH118  # a Path for each of millions is slow


def is_of_hub(path: str, repository: str) -> bool:
    """Whether an address is that of a file inside a repository, `hf://datasets/OWNER/NAME`."""
    inside = path.startswith((f"{repository}@", f"{repository}/")) and ".." not in path.split("/")
    return inside and "::" not in path


def _read_from_hub(path: str, repository: str, max_image_bytes: int) -> bytes:
    """Read a file of the streamed repository; `datasets` gives images in folders there by such addresses."""
    if not is_of_hub(path, repository):
        raise ValueError(
            f"the row names a file that is none of {repository}, and no other is opened; leave data.streaming out "
            "where the images lie in archives"
        )
    try:
        with fsspec.open(path, "rb") as file:
            return cast(Any, file).read(max_image_bytes + 1)
    except Exception as error:  # each kind of network has its own
        raise ValueError(f"cannot be read from the hub: {type(error).__name__}: {error}") from error
