"""Files that survive a kill and a full disk, and are written nowhere but where they are said to be."""

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
"""What the names of files and folders begin with that are not whole yet."""


def flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete whatever has a name, if anything has: a file, a link itself, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def own_folder(folder: Path) -> Path:
    """Refuse a folder of a run that is a link, since what it leads to is not the run's.

    Raises:
        ValueError: it is one, or something that is no folder.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        what = "a link" if folder.is_symlink() else "no folder"
        raise ValueError(f"{folder}: is {what}, and a run keeps its own files; put a folder there, or take this away")
    return folder


@contextmanager
def replacing(path: Path, *, flushed: bool = True) -> Iterator[Path]:
    """Where to write a file that is then seen under `path`: with its old content or its new one, and nothing between.

    A link, FIFO or leftover of either name is replaced itself, and never followed.

    Args:
        flushed: wait until it is on disk.

    Raises:
        OSError: it could not be written; names the path. The old content is still there.
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
        with suppress(OSError):  # of a disk that is read-only, where the first error says more
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
    """`write_json` to a file that keeps its old content until the new one is whole; see `replacing`."""
    with replacing(path) as unfinished:
        write_json(unfinished, content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file that every library of Hugging Face reads."""
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(whole, file, metadata={"format": "pt"})


def settle(folder: Path, like: Path) -> None:
    """Flush the files of a folder, readable for whoever may read `like`: safetensors lets only its owner read."""
    for file in folder.iterdir():
        file.chmod(like.stat().st_mode)
        flush(file)


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """A new, empty folder to work in, which is gone afterwards; what a killed process left in its place is removed."""
    remove(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        remove(folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Let a whole folder take the place of another at once, so that whoever looks finds the one or the other."""
    if not os.path.lexists(folder):
        new.rename(folder)
    elif not _exchange(new, folder):
        # Two steps where the system has no single one; `restore_folder` takes back the first.
        before = folder.with_name(f"{UNFINISHED}{folder.name}-before")
        remove(before)
        folder.rename(before)
        new.rename(folder)
        remove(before)
    flush(folder.parent)


def restore_folder(folder: Path) -> None:
    """Put back what a kill in the middle of `replace_folder` left beside its place."""
    before = folder.with_name(f"{UNFINISHED}{folder.name}-before")
    if before.is_dir() and not before.is_symlink() and not os.path.lexists(folder):
        before.rename(folder)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # other systems than Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Say of an error of the system, whoever's library met it, what could not be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error_number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def free_space(folder: Path) -> str:
    """The space that is left where a folder lies, in words."""
    return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB are free"


def error_number(error: BaseException) -> int | None:
    """The system's number of an error, which safetensors tells in its text alone; None where it is no such error."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found.group(1)) if found else None


def tell_error(error: Exception, *, failed_proof: bool = False) -> int:
    """Print an error in one line and return the exit code: 2 where something named cannot be used, 1 for the machine.

    Args:
        failed_proof: whether a RuntimeError may be that of a proof.

    Raises:
        RuntimeError: the error itself, where it says nothing about the machine.
    """
    text, code = " ".join(str(error).split()), 2 if isinstance(error, ValueError) else 1
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if any(sign in text for sign in ("Too many open files", "items of ancdata")):
        text += "; raise `ulimit -n`, or lower the number of loader processes (num_workers)"
    elif any(sign in text for sign in ("/dev/shm", "shared memory", "Bus error")) or (
        text == os.strerror(errno.ENOENT) and not os.access("/dev/shm", os.W_OK)
    ):
        text += "; loader processes need /dev/shm, a larger one where it is full (docker: --shm-size), or num_workers 0"
    elif isinstance(error, RuntimeError) and not failed_proof:
        raise error
    print(f"error: {plain(text)}", file=sys.stderr, flush=True)
    return code


FAULTS = (ValueError, OSError, RuntimeError, SafetensorError)
"""What `tell_error` takes."""


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
                    f"WARNING: {plain(self.path)}: {error.strerror}, {free_space(self.path.parent)}; "
                    "what is to be logged waits until it can be written",
                    file=sys.stderr,
                    flush=True,
                )
            return
        self._waiting.clear()


def _append(content: bytes, path: Path) -> None:
    """Append all of the content or, with an OSError, nothing."""
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
    """Drop what a run that was killed logged after its last checkpoint; those steps are done again.

    Raises:
        ValueError, OSError: it is no log that a run wrote; see `read_lines`.
    """
    if not os.path.lexists(path):
        return
    lines = list(read_lines(path))
    kept = [line for line in lines if _step_of(line) <= step]
    descriptor = open_regular(path, os.O_WRONLY)
    try:
        shared = os.fstat(descriptor).st_nlink > 1  # another name of it, as in a backup, keeps what it has
        if kept == lines[: len(kept)] and not shared:  # always but for lines that something else damaged
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
