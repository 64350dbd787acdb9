import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from ssl_vit.runs.folder import lock_folder

HOLD = """
import os, sys, time
from pathlib import Path
from ssl_vit.runs.folder import lock_folder
lock_folder(Path(sys.argv[1]))
child = os.fork()  # as a loader worker, which lives on for a while
if child:
    print(child, flush=True)
time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_is_gone_however_it_goes(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            named = f"process {holder.pid} on {re.escape(socket.gethostname())} since "
            for _ in range(2):  # looking does not take it away
                with pytest.raises(ValueError, match=named) as refused:
                    lock_folder(tmp_path)
            assert "\n" not in str(refused.value)
            assert str(refused.value).startswith(f"output_dir={str(tmp_path)!r}: another run uses this folder")
            holder.send_signal(signal.SIGKILL)
            os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
            os.kill(child, 0)  # still there
            lock_folder(tmp_path)
        finally:
            holder.kill()
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    assert f'"pid": {os.getpid()}' in (tmp_path / "run.lock").read_text()


TRY = "import sys; from pathlib import Path; from ssl_vit.runs.folder import lock_folder; "
TRY += "lock_folder(Path(sys.argv[1]))"


def is_free(folder: Path) -> bool:
    done = subprocess.run([sys.executable, "-c", TRY, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0 or "another run uses this folder" in done.stderr
    return done.returncode == 0


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
