"""What this package writes, told by the names of files, so that none of it is ever taken for an image to learn from."""

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from ssl_vit.core.reading import MAX_JSON, open_regular, read_bytes
from ssl_vit.core.writing import UNFINISHED

MARKER = ".ssl_vit"
"""File in which names of files of the same folder stand that this package wrote, or a dot for the whole folder."""

# What hardly any other program writes, and what tells a run beside one of them.
_OF_A_RUN = {"run.lock", "heartbeat.json", "provenance.json", "bad_images.jsonl", "backbone.safetensors"}
_BESIDE = {"config.yaml", "config.json", "metrics.jsonl", "results.json", "skipped_steps.json", "checkpoints"}
_WEIGHTS = {"backbone.safetensors", "model.safetensors", "model.onnx", "model.pt2"}
_ABOUT_WEIGHTS = {"config.json", "state.json"}
_DECODED = {"about.json", "table.npy", "pixels.bin"}


def mark(folder: Path, name: str = ".") -> None:
    """Note in a folder that a file of it, or the whole of it, was written by this package and by no user.

    A folder that cannot be written is no error.
    """
    with suppress(OSError):
        if name not in _marked(folder):
            with os.fdopen(open_regular(folder / MARKER, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as file:
                file.write(f"{name}\n".encode(errors="surrogateescape"))


def is_output(folder: Path, names: Collection[str], *, named: bool = False) -> bool:
    """Whether a folder is a run's, an export's, a checkpoint's or a cache's; some of its files may have been deleted.

    Args:
        names: of all that the folder holds.
        named: whether the user named this very folder. What any project's folder could hold is then no sign.
    """
    found = set(names)
    return (
        (MARKER in found and "." in _marked(folder))
        or (bool(found & _OF_A_RUN) and len(found & (_OF_A_RUN | _BESIDE)) > 1)
        or (not named and bool(found & _WEIGHTS) and bool(found & _ABOUT_WEIGHTS))
        or (not named and "table.npy" in found and len(found & _DECODED) > 1)
        or (not named and {"config.yaml", "checkpoints"} <= found)
    )


def written_files(folder: Path, names: Collection[str]) -> set[str]:
    """Those of a folder's files that this package wrote into it, whole or in part."""
    if MARKER not in names:
        return set()
    marked = _marked(folder)
    return marked | {UNFINISHED + name for name in marked}


def _marked(folder: Path) -> set[str]:
    try:
        text = read_bytes(folder / MARKER, MAX_JSON)
        return set(text.decode("utf-8", errors="surrogateescape").splitlines())
    except (OSError, ValueError):
        return set()
