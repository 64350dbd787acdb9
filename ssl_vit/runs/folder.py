"""The folder of a run: never overwritten silently, with a lock and a heartbeat."""

import errno
import fcntl
import json
import os
import platform
import socket
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from ssl_vit.core.reading import open_regular, read_json
from ssl_vit.core.text import plain
from ssl_vit.core.writing import MARKER, UNFINISHED, own_folder, replace_json, replace_text
from ssl_vit.runs.checkpoint import remove_unfinished

CONFIG_FILE, METRICS_FILE, RESULTS_FILE = "config.yaml", "metrics.jsonl", "results.json"
PICTURES_FOLDER = "pictures"


def take_folder(folder: Path, *, fresh: bool) -> None:
    """Lock a run's folder for this process, creating it if needed; only the main process calls this.

    Args:
        fresh: first move an existing run aside.

    Raises:
        ValueError: another run uses the folder.
    """
    if folder.exists():
        lock_folder(folder)
    if fresh and folder.exists() and holds_anything(folder):
        aside = folder.with_name(f"{folder.name}-before-{datetime.now():%Y%m%d-%H%M%S}")
        folder.rename(aside)
        print(f"Moved the existing run aside: {plain(aside)}")
    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder)
    own_folder(folder / PICTURES_FOLDER)
    remove_unfinished(folder)


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json, which marks a run as finished and therefore comes last.

    Args:
        results: for `json.dump`; "step" is the last step of the run.
    """
    replace_json(folder / RESULTS_FILE, results)


def is_finished(folder: Path, num_steps: int) -> bool:
    """Whether a run of `num_steps` steps has written all its final outputs."""
    try:
        return read_json(folder / RESULTS_FILE).get("step") == num_steps
    except (OSError, ValueError):
        return False


def read_results(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """results.json of a finished run; None while it trains, also where it was lengthened since it had finished.

    Args:
        settings: the run's config.yaml.
    """
    try:
        results = read_json(folder / RESULTS_FILE)
    except (OSError, ValueError):
        return None
    step, length, extended = results.get("step"), settings.get("steps"), settings.get("extended")
    if not isinstance(step, int) or (isinstance(length, int) and length != step):
        return None
    # A length in epochs is not known here, but where the run was lengthened is.
    last = extended[-1] if isinstance(extended, list) and extended else None
    was_lengthened = isinstance(last, list) and bool(last) and isinstance(last[0], int) and last[0] >= step
    return None if was_lengthened else results


def holds_anything(folder: Path) -> bool:
    """Whether a folder holds more than the leftovers of a run that was killed before it wrote its settings."""
    names = (path.name for path in folder.iterdir())
    return any(name not in (LOCK_FILE, MARKER) and not name.startswith(UNFINISHED) for name in names)


HEARTBEAT_FILE = "heartbeat.json"
State = Literal["starting", "training", "evaluating", "finishing", "finished", "stopped", "failed"]


def write_heartbeat(
    folder: Path, state: State, step: int, num_steps: int, images_per_second: float | None = None
) -> None:
    """Replace the heartbeat file at once; only the main process calls this.

    Args:
        step: optimizer steps done.
        images_per_second: by all processes, over the last log interval.
    """
    values = {
        "state": state,
        "step": step,
        "num_steps": num_steps,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "images_per_second": images_per_second,
        "host": platform.node(),
        "pid": os.getpid(),
    }
    with suppress(OSError):  # a failed heartbeat must not end a run
        replace_text(folder / HEARTBEAT_FILE, json.dumps(values) + "\n", flushed=False)


def end_of_start(folder: Path, error: BaseException) -> None:
    """Set the heartbeat of this process's starting run to "stopped" or "failed"; leave other runs' heartbeats alone."""
    with suppress(OSError, ValueError, KeyError):
        found = read_json(folder / HEARTBEAT_FILE)
        if (found["state"], found["pid"]) == ("starting", os.getpid()):
            state: State = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            write_heartbeat(folder, state, found["step"], found["num_steps"])


LOCK_FILE = "run.lock"

_held: dict[Path, int] = {}  # path of a lock file: its open descriptor


def lock_folder(folder: Path) -> None:
    """Lock a folder until this process ends; does nothing if this process holds the lock already.

    The lock file stays after the run; only its lock counts. It is a POSIX lock: a killed process loses it at once,
    loader workers do not inherit it, and some file systems share it among machines.

    Raises:
        ValueError: another process holds the lock; names the machine and the process.
    """
    path = folder.resolve() / LOCK_FILE
    if path in _held:
        # Closing a second descriptor of the file would release the lock.
        if path.exists() and path.stat().st_ino == os.fstat(_held[path]).st_ino:
            return
        os.close(_held.pop(path))  # its folder was moved or deleted
    try:
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise ValueError(f"output_dir={str(folder)!r}: {path}: {error.strerror}; remove it if unused") from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 4096).decode(errors="replace")
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            why = f"this file system has no locks ({error.strerror}); start one run in this folder"
            print(f"note       {plain(path)}: {why}")
        os.close(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ValueError(
                f"output_dir={str(folder)!r}: another run uses this folder, {_describe(holder)}; "
                "wait for it, end it, or choose another --output_dir"
            ) from error
        return
    _held[path] = descriptor
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}) + "\n"
    try:
        if os.fstat(descriptor).st_nlink == 1:  # another hard link, such as a backup's, keeps its content
            os.pwrite(descriptor, text.encode(), 0)
            os.ftruncate(descriptor, len(text.encode()))
    except OSError:  # the disk is full; the lock holds anyway
        pass


def _describe(holder: str) -> str:
    try:
        noted = json.loads(holder)
        return f"process {noted['pid']} on {noted['host']} since {noted['started']}"
    except (ValueError, KeyError, TypeError):
        return "its process is unknown"
