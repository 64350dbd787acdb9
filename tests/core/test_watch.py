"""A process that gives no sign of life is named, and ended without where that is wanted; a busy one never."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from ssl_vit.core import distributed, watch
from ssl_vit.core.distributed import end_processes, start_processes
from ssl_vit.core.watch import EVERY, GO_ON, SILENT, Watch
from ssl_vit.training.config import parse_run
from ssl_vit.training.signals import StopSignal
from tests.conftest import OBJECTIVES, SMALL_RUN
from tests.processes import Launch, run_two

TURNS = int(SILENT / EVERY)


class Store(dict):
    """As torch.distributed's, in one process; `gone` names what is not heard of any more."""

    def add(self, key: str, number: int) -> int:
        self[key] = self.get(key, 0) + number
        return self[key]

    def set(self, key: str, text: str) -> None:
        self[key] = text.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


class Others:
    """Watches of several processes on one store, which take turns as their threads would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hosts: list[str]) -> None:
        self.store, self.ended, self.hosts, self._patch = Store(), [], hosts, monkeypatch
        self.all = [Watch(self.store, index, len(hosts)) for index in range(len(hosts))]
        for index, host in enumerate(hosts):
            self.store[f"watch/place/{index}"] = f"{host}\n{100 + index}".encode()
        monkeypatch.setattr(os, "_exit", self._exit)

    def _exit(self, code: int) -> None:
        self.ended.append(code)
        raise SystemExit(code)

    def pass_turns(self, number: int, stopped: tuple[int, ...] = (), deaf: tuple[int, ...] = ()) -> None:
        """Let all but the stopped ones hear and count; the deaf ones wait for the store."""
        for _ in range(number):
            for one in self.all:
                if one.index not in (*stopped, *deaf):
                    one.hear()
            for one in self.all:
                if one.index not in stopped:
                    self._patch.setattr(watch.platform, "node", lambda one=one: self.hosts[one.index])
                    one.turn()


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_one_that_stops_is_named_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By one process of each machine alone."""
    others = Others(monkeypatch, ["a", "a", "b", "b"])
    others.pass_turns(5 * TURNS)
    assert lines(capsys) == []
    others.pass_turns(TURNS - 1, stopped=(0,))
    assert lines(capsys) == []
    others.pass_turns(1, stopped=(0,))
    said = "WARNING: waiting for process 0 on a (pid 100): no sign of life for 1 min"
    assert [line.startswith(said) for line in lines(capsys)] == [True, True]
    others.pass_turns(TURNS, stopped=(0,))
    assert len([line for line in lines(capsys) if "no sign of life for 2 min" in line]) == 2
    others.pass_turns(3 * TURNS)
    assert lines(capsys) == []
    others.pass_turns(TURNS + 1, stopped=(1, 2))
    assert all("process 1 on a (pid 101), process 2 on b (pid 102)" in line for line in lines(capsys))


def test_one_that_was_stopped_itself_blames_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    others = Others(monkeypatch, ["a", "a"])
    others.pass_turns(2)
    others.pass_turns(TURNS + 1, stopped=(1,))
    assert len(lines(capsys)) == 1
    others.pass_turns(2 * TURNS)
    assert lines(capsys) == []


def test_where_the_store_does_not_answer_process_0_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    others = Others(monkeypatch, ["a", "a", "a"])
    others.pass_turns(3)
    others.pass_turns(TURNS, stopped=(0,), deaf=(1, 2))
    (line,) = lines(capsys)
    assert "process 0 on a (pid 100): no sign" in line


def test_as_long_as_it_gets_on_nothing_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher that holds the store and hangs stops no run."""
    others = Others(monkeypatch, ["a", "a"])
    for _ in range(3 * TURNS):
        others.all[1].progress += 1
        others.pass_turns(1, stopped=(0,), deaf=(1,))
    assert lines(capsys) == []


def _count_agreements(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    start_processes()
    watched, stop = distributed._watch, StopSignal()
    assert watched is not None
    for _ in range(3):
        assert stop.agreed() == 0
    assert watched.progress == 3
    end_processes()


def test_each_step_on_which_the_processes_agree_is_progress() -> None:
    run_two(_count_agreements)


def test_one_that_ended_well_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    others = Others(monkeypatch, ["a", "a"])
    others.pass_turns(2)
    others.all[1].start()
    others.all[1].close()
    others.pass_turns(3 * TURNS, stopped=(1,))
    assert lines(capsys) == []


def test_max_wait_ends_the_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    others = Others(monkeypatch, ["a", "a"])
    done = []
    others.all[0].max_wait, others.all[0].flag = 2, "--max_wait"
    others.all[0].at_end = lambda: done.append("noted")
    others.pass_turns(2 * TURNS - 1, stopped=(1,))
    assert others.ended == []
    with pytest.raises(SystemExit):
        others.pass_turns(2, stopped=(1,))
    assert (others.ended, done) == ([1], ["noted"])
    said = lines(capsys)[-1]
    assert said.startswith("error: process 1 on a (pid 101): no sign of life for 2")
    assert said.endswith(f"; the limit is 2 min (--max_wait). {GO_ON}")


@pytest.mark.parametrize("value", [0, -1, 241, 1e9])
def test_max_wait_is_no_longer_than_the_processes_wait_for_each_other(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match=r"max_wait=.*: must lie in \(0, 240\] minutes"):
        parse_run(OBJECTIVES["mae"][0], ["--steps=1", f"--max_wait={value}"])


FAST = """
import sys
import ssl_vit.core.watch as watch
from scripts.pretrain_mae import DEFAULTS
from ssl_vit.training.loop import main

watch.EVERY, watch.SILENT = 0.1, 0.5
sys.exit(main(DEFAULTS))
"""


def test_processes_that_are_stopped(photo_folder: Path, tmp_path: Path) -> None:
    """First the one that holds the store, which goes on again; then the other, until the time is over."""
    run, script = tmp_path / "run", tmp_path / "fast.py"
    script.write_text(FAST)
    settings = [f"--data.source={photo_folder}", f"--output_dir={run}", "--data.label_column=none", "--steps=100000"]

    def step() -> int:
        heartbeat = run / "heartbeat.json"
        return json.loads(heartbeat.read_text())["step"] if heartbeat.exists() else 0

    with Launch([str(script), *SMALL_RUN, *settings, "--max_wait=0.1", "--quiet"], num_processes=2) as launched:
        first, second = launched.processes

        def wait_for(rank: int, text: str) -> None:
            end = time.monotonic() + 60
            while text not in launched.errors(rank):
                assert time.monotonic() < end, [launched.errors(rank) for rank in (0, 1)]
                time.sleep(0.05)

        def wait_for_step(least: int) -> None:
            while step() < least:
                assert first.is_alive()
                time.sleep(0.05)

        wait_for_step(2)
        launched.send(signal.SIGSTOP, rank=0)
        wait_for(1, f"(pid {first.pid}): no sign of life")
        before = step()
        launched.send(signal.SIGCONT, rank=0)
        wait_for_step(before + 1)
        launched.send(signal.SIGSTOP, rank=1)
        wait_for(0, f"WARNING: waiting for process 1 on {os.uname().nodename} (pid {second.pid})")
        first.join(timeout=60)
        assert first.exitcode == 1
        wait_for(0, f"the limit is 0.1 min (--max_wait). {GO_ON}")
    assert json.loads((run / "heartbeat.json").read_text())["state"] == "failed"
