"""One run a folder: a lock that the system takes back when its process ends, however it ends."""

import errno
import fcntl
import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path

from ssl_vit.core.reading import open_regular
from ssl_vit.core.text import plain

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
