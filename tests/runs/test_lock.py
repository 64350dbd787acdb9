import errno
import fcntl
import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from ssl_vit.runs.folder import lock_folder
from tests.processes import SERVER


def hold(folder: Path, pipe: Connection) -> None:
    """Lock a folder until this process is killed; tell of a child, as a loader worker, which lives on for a while."""
    lock_folder(folder)
    child = os.fork()
    if child:
        pipe.send(child)
    time.sleep(600)


def test_a_second_run_is_refused_until_the_first_is_gone_however_it_goes(tmp_path: Path) -> None:
    ours, theirs = SERVER.Pipe()
    holder = SERVER.Process(target=hold, args=(tmp_path, theirs))
    holder.start()
    assert ours.poll(60)
    child = ours.recv()
    try:
        named = f"process {holder.pid} on {re.escape(socket.gethostname())} since "
        for _ in range(2):  # looking does not take it away
            with pytest.raises(ValueError, match=named) as refused:
                lock_folder(tmp_path)
        assert "\n" not in str(refused.value)
        assert str(refused.value).startswith(f"output_dir={str(tmp_path)!r}: another run uses this folder")
        holder.kill()
        holder.join()
        os.kill(child, 0)  # still there
        lock_folder(tmp_path)
    finally:
        holder.kill()
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    assert f'"pid": {os.getpid()}' in (tmp_path / "run.lock").read_text()


def try_to_lock(folder: Path) -> None:
    try:
        lock_folder(folder)
    except ValueError as error:
        sys.exit(3 if "another run uses this folder" in str(error) else 4)


def is_free(folder: Path) -> bool:
    process = SERVER.Process(target=try_to_lock, args=(folder,))
    process.start()
    process.join(60)
    assert process.exitcode in (0, 3)
    return process.exitcode == 0


def test_a_process_keeps_what_it_takes_twice_and_lets_go_of_a_folder_that_moved(tmp_path: Path) -> None:
    folder, aside = tmp_path / "run", tmp_path / "aside"
    folder.mkdir()
    lock_folder(folder)
    lock_folder(folder)
    assert not is_free(folder)
    folder.rename(aside)
    folder.mkdir()
    lock_folder(folder)
    assert not is_free(folder)
    assert is_free(aside)


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", fail)
    lock_folder(tmp_path)
    assert "this file system has no locks" in capsys.readouterr().out
