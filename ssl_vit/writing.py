"""Files that survive a kill and a full disk."""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

UNFINISHED = "unfinished-"
"""What the names of files and folders begin with that are not whole yet."""


def flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a file that is seen with its old content or its new one, and nothing between.

    Raises:
        OSError: it could not be written; the old content is still there.
    """
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        unfinished.write_text(text)
        flush(unfinished)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    flush(path.parent)


def replace_json(path: Path, content: Mapping[str, Any]) -> None:
    """`replace_text` with a JSON object."""
    replace_text(path, json.dumps(content, indent=2) + "\n")


def free_space(folder: Path) -> str:
    """The space that is left where a folder lies, in words."""
    return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB are free"


class JsonLines:
    """A file with a JSON object in each line, to which one process appends.

    A run is worth more than its log: lines that cannot be written wait for the next time, and a warning is printed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records behind those that are there, and those before them that could not be written."""
        late = bool(self._waiting)
        self._waiting += [json.dumps(record) + "\n" for record in records]
        try:
            _append("".join(self._waiting).encode(), self.path)
        except OSError as error:
            if not late:
                print(
                    f"WARNING: {self.path}: {error.strerror}, {free_space(self.path.parent)}; "
                    "what is to be logged waits until it can be written",
                    file=sys.stderr,
                    flush=True,
                )
            return
        self._waiting.clear()


def _append(content: bytes, path: Path) -> None:
    """Append all of the content or, with an OSError, nothing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        length = os.fstat(descriptor).st_size
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            os.ftruncate(descriptor, length)
            raise
    finally:
        os.close(descriptor)


def forget_after(path: Path, step: int) -> None:
    """Drop what a run that was killed logged after its last checkpoint; those steps are done again."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if kept == lines[: len(kept)]:  # always but for lines that something else damaged
        if len(kept) < len(lines):
            os.truncate(path, sum(map(len, kept)))  # needs no space on the disk
    else:
        replace_text(path, b"".join(kept).decode())


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):  # the line that a kill cut short
        return float("inf")
