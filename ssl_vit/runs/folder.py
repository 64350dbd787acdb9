"""The folder of a run: new or moved aside, never overwritten silently; its lock and its heartbeat."""

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
    """Lock a run's folder for this process and create what is missing; only the main process calls this.

    Args:
        fresh: whether a run that the folder holds is moved aside first.

    Raises:
        ValueError: another run works in it.
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
        results: for `json.dump`; its "step" is the one the run ends at.
    """
    replace_json(folder / RESULTS_FILE, results)


def is_finished(folder: Path, num_steps: int) -> bool:
    """Whether a run of so many steps has written everything it ends with."""
    try:
        return read_json(folder / RESULTS_FILE).get("step") == num_steps
    except (OSError, ValueError):
        return False


def holds_anything(folder: Path) -> bool:
    """Whether there is more than a run leaves that was killed before it wrote its settings."""
    names = (path.name for path in folder.iterdir())
    return any(name not in (LOCK_FILE, MARKER) and not name.startswith(UNFINISHED) for name in names)


HEARTBEAT_FILE = "heartbeat.json"
State = Literal["starting", "training", "evaluating", "finishing", "finished", "stopped", "failed"]


def beat(folder: Path, state: State, step: int, num_steps: int, images_per_second: float | None = None) -> None:
    """Rewrite the heartbeat; a reader finds the old one or the new one, never a part. Only the main process calls this.

    Args:
        step: optimizer steps done.
        images_per_second: of all processes, over the last log interval.
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
    with suppress(OSError):  # a watcher's convenience must not end a run
        replace_text(folder / HEARTBEAT_FILE, json.dumps(values) + "\n", flushed=False)


def end_of_start(folder: Path, error: BaseException) -> None:
    """Note that this process was stopped, or failed, while it was starting a run; not where it never had the folder."""
    with suppress(OSError, ValueError, KeyError):
        found = read_json(folder / HEARTBEAT_FILE)
        if (found["state"], found["pid"]) == ("starting", os.getpid()):
            state: State = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            beat(folder, state, found["step"], found["num_steps"])


LOCK_FILE = "run.lock"

_held: dict[Path, int] = {}  # by path, the open files whose locks this process has


def lock_folder(folder: Path) -> None:
    """Take a folder for this process, until it ends; a folder that it has already stays its own.

    The file stays when the run is over, and only its lock counts. The lock is POSIX's: a process that is killed loses
    it at once, loader workers do not inherit it, and file systems share it among machines where they support that.

    Raises:
        ValueError: another process has it; names the machine and the process.
    """
    path = folder.resolve() / LOCK_FILE
    if path in _held:
        # Opening the file a second time would give the lock away when that is closed.
        if path.exists() and path.stat().st_ino == os.fstat(_held[path]).st_ino:
            return
        os.close(_held.pop(path))  # its folder was moved or deleted
    try:
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise ValueError(f"output_dir={str(folder)!r}: {path}: {error.strerror}; remove it if no run works") from error
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
                f"output_dir={str(folder)!r}: another run works in this folder, {_describe(holder)}; "
                "wait for it, end it, or choose another --output_dir"
            ) from error
        return
    _held[path] = descriptor
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}) + "\n"
    try:
        if os.fstat(descriptor).st_nlink == 1:  # what has another name as well, as in a backup, is left as it is
            os.pwrite(descriptor, text.encode(), 0)
            os.ftruncate(descriptor, len(text.encode()))
    except OSError:  # a full disk: the lock holds all the same
        pass


def _describe(holder: str) -> str:
    try:
        noted = json.loads(holder)
        return f"process {noted['pid']} on {noted['host']} since {noted['started']}"
    except (ValueError, KeyError, TypeError):
        return "whose process cannot be told"
