"""Writes files that survive a kill and a full disk, and never follow links elsewhere."""

import ctypes
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ssl_vit.core.reading import MAX_JSON, open_regular, read_bytes, read_lines
from ssl_vit.core.text import plain

UNFINISHED = "unfinished-"
"""Prefix of the names of incomplete files and folders."""


def flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file, a link (not its target) or a folder with its contents; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def own_folder(folder: Path) -> Path:
    """Refuse a folder of a run that is a link, since its target is not the run's.

    Raises:
        ValueError: it is a link, or exists and is no folder.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        what = "a link" if folder.is_symlink() else "no folder"
        raise ValueError(f"{folder}: is {what}; remove it or put a folder there, in which the run keeps its files")
    return folder


@contextmanager
def replacing(path: Path, *, flushed: bool = True) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` at once: readers see the old or the new content, never a part.

    A link, FIFO or leftover of either name is replaced and never followed.

    Args:
        flushed: wait until it is on disk.

    Raises:
        OSError: the file could not be written; names the path. The old content remains.
    """
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        remove(unfinished)
        os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
        yield unfinished
        if flushed:
            flush(unfinished)
        unfinished.replace(path)
    except BaseException as error:
        with suppress(OSError):  # a read-only disk; the first error says more
            remove(unfinished)
        number = error_number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    if flushed:
        flush(path.parent)


def replace_text(path: Path, text: str, *, flushed: bool = True) -> None:
    """Write a text file; see `replacing`."""
    with replacing(path, flushed=flushed) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def replace_json(path: Path, content: Mapping[str, Any]) -> None:
    """`write_json` that replaces a file at once; see `replacing`."""
    with replacing(path) as unfinished:
        write_json(unfinished, content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file that every Hugging Face library reads."""
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(whole, file, metadata={"format": "pt"})


def settle(folder: Path, like: Path) -> None:
    """Flush a folder's files and give them the mode of `like`: safetensors makes files that only the owner can read."""
    for file in folder.iterdir():
        file.chmod(like.stat().st_mode)
        flush(file)


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """A new, empty folder that is removed afterwards; what a killed process left there is removed first."""
    remove(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        remove(folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Replace `folder` by `new` at once: readers see the old or the new folder."""
    if not os.path.lexists(folder):
        new.rename(folder)
    elif not _exchange(new, folder):
        # Two steps if the system has no atomic exchange; `restore_folder` undoes the first.
        before = folder.with_name(f"{UNFINISHED}{folder.name}-before")
        remove(before)
        folder.rename(before)
        new.rename(folder)
        remove(before)
    flush(folder.parent)


def restore_folder(folder: Path) -> None:
    """Restore the old folder after a kill in the middle of `replace_folder`."""
    before = folder.with_name(f"{UNFINISHED}{folder.name}-before")
    if before.is_dir() and not before.is_symlink() and not os.path.lexists(folder):
        before.rename(folder)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names; False if the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # not Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Name `path` in system errors, also in those that safetensors raises."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error_number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def free_space(folder: Path) -> str:
    """The free space of a folder's file system, in words."""
    return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB are free"


def error_number(error: BaseException) -> int | None:
    """The errno of a system error, which safetensors gives in its text only; None for other errors."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found.group(1)) if found else None


def report_error(error: Exception, *, failed_proof: bool = False) -> int:
    """Print an error in one line and return the exit code: 2 for input that cannot be used, 1 for the machine.

    Args:
        failed_proof: whether a RuntimeError may come from a failed proof, which is printed too.

    Raises:
        RuntimeError: the error itself, if it says nothing about the machine.
    """
    text, code = " ".join(str(error).split()), 2 if isinstance(error, ValueError) else 1
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if any(sign in text for sign in ("Too many open files", "items of ancdata")):
        text += "; raise `ulimit -n`, or lower the number of loader processes (num_workers)"
    elif any(sign in text for sign in ("/dev/shm", "shared memory", "Bus error")) or (
        text == os.strerror(errno.ENOENT) and not os.access("/dev/shm", os.W_OK)
    ):
        text += "; loader processes need /dev/shm; enlarge it if it is full (docker: --shm-size), or set num_workers 0"
    elif isinstance(error, RuntimeError) and not failed_proof:
        raise error
    print(f"error: {plain(text)}", file=sys.stderr, flush=True)
    return code


FAULTS = (ValueError, OSError, RuntimeError, SafetensorError)
"""Errors that `report_error` accepts."""


class JsonLines:
    """A file with one JSON object per line, to which one process appends.

    A failed write prints a warning instead of ending the run; the lines wait for the next write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records, after earlier ones that could not be written."""
        late = bool(self._waiting)
        self._waiting += [json.dumps(record) + "\n" for record in records]
        try:
            _append("".join(self._waiting).encode(), self.path)
        except OSError as error:
            if not late:
                print(
                    f"WARNING: {plain(self.path)}: {error.strerror}, {free_space(self.path.parent)}; "
                    "new lines wait until they can be written",
                    file=sys.stderr,
                    flush=True,
                )
            return
        self._waiting.clear()


def _append(content: bytes, path: Path) -> None:
    """Append all of the content or, on an OSError, nothing."""
    descriptor = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
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
    """Drop what a killed run logged after its last checkpoint, since those steps are repeated.

    Raises:
        ValueError, OSError: it is not a run's log; see `read_lines`.
    """
    if not os.path.lexists(path):
        return
    lines = list(read_lines(path))
    kept = [line for line in lines if _step_of(line) <= step]
    descriptor = open_regular(path, os.O_WRONLY)
    try:
        shared = os.fstat(descriptor).st_nlink > 1  # another hard link, such as a backup's, keeps its content
        if kept == lines[: len(kept)] and not shared:  # always, unless lines were damaged
            if len(kept) < len(lines):
                os.ftruncate(descriptor, sum(map(len, kept)))  # needs no space on the disk
            return
    finally:
        os.close(descriptor)
    with replacing(path) as unfinished:
        unfinished.write_bytes(b"".join(kept))


def _step_of(line: bytes) -> float:
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else float("inf")
        return step if isinstance(step, int | float) else float("inf")
    except (ValueError, KeyError, TypeError, RecursionError):  # the line that a kill cut short
        return float("inf")


MARKER = ".ssl_vit"
"""File that lists the files in its folder that this package wrote; a dot means the whole folder."""

# Files that hardly any other program writes, and files that prove a run beside one of these.
_OF_A_RUN = {"run.lock", "heartbeat.json", "provenance.json", "bad_images.jsonl", "backbone.safetensors"}
_BESIDE = {"config.yaml", "config.json", "metrics.jsonl", "results.json", "skipped_steps.json", "checkpoints"}
_WEIGHTS = {"backbone.safetensors", "model.safetensors", "model.onnx", "model.pt2"}
_ABOUT_WEIGHTS = {"config.json", "state.json"}
_DECODED = {"about.json", "table.npy", "pixels.bin"}


def mark(folder: Path, name: str = ".") -> None:
    """Record that this package, not a user, wrote a file of a folder or the whole folder.

    Does nothing if the folder cannot be written.
    """
    with suppress(OSError):
        if name not in _marked(folder):
            with os.fdopen(open_regular(folder / MARKER, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as file:
                file.write(f"{name}\n".encode(errors="surrogateescape"))


def is_output(folder: Path, names: Collection[str], *, named: bool = False) -> bool:
    """Whether a folder is a run, export, checkpoint or cache, even if files were deleted from it.

    Args:
        names: of all files and folders in it.
        named: whether the user named this folder; then file names that any project may use prove nothing.
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
    """Names of files that this package wrote into a folder, complete or not."""
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
