"""Recognises by file names what this package wrote, so that none of it is taken for an image to learn from."""

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from ssl_vit.core.reading import MAX_JSON, open_regular, read_bytes
from ssl_vit.core.writing import UNFINISHED

MARKER = ".ssl_vit"
"""File that lists files of its folder that this package wrote; a dot stands for the whole folder."""

# Files that hardly any other program writes, and those that prove a run beside one of them.
_OF_A_RUN = {"run.lock", "heartbeat.json", "provenance.json", "bad_images.jsonl", "backbone.safetensors"}
_BESIDE = {"config.yaml", "config.json", "metrics.jsonl", "results.json", "skipped_steps.json", "checkpoints"}
_WEIGHTS = {"backbone.safetensors", "model.safetensors", "model.onnx", "model.pt2"}
_ABOUT_WEIGHTS = {"config.json", "state.json"}
_DECODED = {"about.json", "table.npy", "pixels.bin"}


def mark(folder: Path, name: str = ".") -> None:
    """Note that this package, and no user, wrote a file of a folder, or the whole folder.

    A folder that cannot be written is no error.
    """
    with suppress(OSError):
        if name not in _marked(folder):
            with os.fdopen(open_regular(folder / MARKER, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as file:
                file.write(f"{name}\n".encode(errors="surrogateescape"))


def is_output(folder: Path, names: Collection[str], *, named: bool = False) -> bool:
    """Whether a folder is a run, export, checkpoint or cache, of which some files may have been deleted.

    Args:
        names: of all files and folders in it.
        named: whether the user named this very folder. File names that any project may use then prove nothing.
    """
    held = set(names)
    return (
        (MARKER in held and "." in _marked(folder))
        or (bool(held & _OF_A_RUN) and len(held & (_OF_A_RUN | _BESIDE)) > 1)
        or (not named and bool(held & _WEIGHTS) and bool(held & _ABOUT_WEIGHTS))
        or (not named and "table.npy" in held and len(held & _DECODED) > 1)
        or (not named and {"config.yaml", "checkpoints"} <= held)
    )


def written_files(folder: Path, names: Collection[str]) -> set[str]:
    """Files that this package wrote into a folder, finished or not."""
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
