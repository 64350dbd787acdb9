"""Scripts in processes of their own, each forked from one that has imported torch and has run nothing.

Importing takes longer than a small run. What torchrun does beside that is tested in test_two_processes.py.
"""

import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["scripts.pretrain_mae", "scripts.pretrain_dino", "scripts.pretrain_dinov2", "scripts.finetune", __name__]
)


def environments(num_processes: int) -> list[dict[str, str]]:
    """Return what a launcher sets for each process; nothing for a process that is alone."""
    if num_processes == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size = str(num_processes)
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


def run_two(work: Callable[..., None], *args: object) -> None:
    """Call `work` with what a launcher sets, and `args`, in two processes, and wait until both have succeeded."""
    processes = [SERVER.Process(target=work, args=(environment, *args)) for environment in environments(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0]


def redirect_output(out: Path, err: Path) -> None:
    """Let this process be the first of a group, write to files, and start loader workers as a script does."""
    multiprocessing.set_start_method(None, force=True)  # not from a server of its own, whose workers outlive a kill
    os.setsid()
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)


def _work(words: list[str], out: Path, err: Path, environment: dict[str, str]) -> None:
    redirect_output(out, err)
    os.environ.update(environment)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


class Launch:
    """A script, with its flags, in one or several processes; their output is in files until the block ends."""

    def __init__(self, words: list[str], num_processes: int = 1) -> None:
        self._desk = Path(tempfile.mkdtemp(prefix="launch_"))
        self._out = [self._desk / f"out.{rank}" for rank in range(num_processes)]
        self._err = [self._desk / f"err.{rank}" for rank in range(num_processes)]
        self.processes: list[BaseProcess] = []
        for *files, environment in zip(self._out, self._err, environments(num_processes), strict=True):
            for file in files:
                file.touch()
            self.processes.append(SERVER.Process(target=_work, args=(words, *files, environment)))
            self.processes[-1].start()

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._desk)

    def printed(self) -> str:
        return "".join(path.read_text() for path in self._out)

    def errors(self, rank: int = 0) -> str:
        return self._err[rank].read_text()

    def wait_for(self, pattern: str) -> None:
        """Wait until a line that begins as a regular expression says has been printed."""
        while not re.search(f"^{pattern}", self.printed(), re.MULTILINE):
            assert all(process.is_alive() for process in self.processes), self.errors()
            time.sleep(0.01)

    def kill(self) -> None:
        """End what still runs, without warning, but for processes that it has started."""
        for process in self.processes:
            process.kill()
            process.join()

    def send(self, number: int, rank: int = 0, *, to_group: bool = False) -> None:
        """Send a signal to a process, or also to those that it has started, as a terminal does."""
        pid = self.processes[rank].pid
        assert pid is not None
        (os.killpg if to_group else os.kill)(pid, number)

    def join(self, timeout: float = 300) -> list[int | None]:
        """Wait for the end; return the exit codes."""
        for process in self.processes:
            process.join(timeout)
        return [process.exitcode for process in self.processes]


def finish(words: list[str], num_processes: int = 1) -> str:
    """Run a script to its end, and return what it printed."""
    with Launch(words, num_processes) as launched:
        codes = launched.join()
        assert set(codes) == {0}, [launched.errors(rank) for rank in range(num_processes)]
        return launched.printed()


def kill_at(words: list[str], step: int) -> None:
    """Start a run and kill it, without warning, as soon as it has logged a step."""
    with Launch(words) as launched:
        launched.wait_for(rf"step {step}/")
        launched.kill()
        assert launched.join() == [-signal.SIGKILL]
