"""Runs that are killed again and again, at any moment, end as those that nobody disturbed.

`pytest -m slow tests/test_kills.py -s` tells of each kill.
"""

import multiprocessing
import os
import random
import re
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

import scripts.pretrain_dino
import scripts.pretrain_mae
from ssl_vit.checkpoint import find_damage, list_checkpoints
from ssl_vit.train import main
from tests.conftest import SMALL_DINO, SMALL_RUN
from tests.test_resume import losses

STEPS, EVERY = 40, 2
SMALL = {"mae": SMALL_RUN, "dino": [*SMALL_DINO, "--objective.freeze_last_layer=0.5"]}
DEFAULTS = {"mae": scripts.pretrain_mae.DEFAULTS, "dino": scripts.pretrain_dino.DEFAULTS}
# A fresh process for each start, forked from one that has imported torch and has run nothing.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.test_kills"])


def work(objective: str, flags: list[str], log: Path, environment: dict[str, str]) -> None:
    """A process of a run, as a launcher starts it, on one core, with output in a file.

    Flushing takes 15 ms longer, so that more of the kills come in the middle of a save.
    """
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, [cores[int(environment["LOCAL_RANK"]) % len(cores)]])
    fsync = os.fsync

    def slowly(descriptor: int) -> None:
        time.sleep(0.015)
        fsync(descriptor)

    os.fsync = slowly
    sys.argv = [f"pretrain_{objective}.py", *flags]
    code = main(DEFAULTS[objective])
    sys.stdout.flush()
    sys.exit(code)


def start(objective: str, flags: list[str], log: Path, num_processes: int) -> list[BaseProcess]:
    log.unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launched: list[BaseProcess] = []
    for rank in map(str, range(num_processes)):
        size = str(num_processes)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        launched.append(SERVER.Process(target=work, args=(objective, flags, log, environment)))
        launched[-1].start()
    return launched


def end(objective: str, flags: list[str], log: Path, num_processes: int) -> str:
    """Run to the end, and return what it printed."""
    for process in start(objective, flags, log, num_processes):
        process.join(timeout=600)
        assert process.exitcode == 0, log.read_text()
    return log.read_text()


def kill_all(launched: list[BaseProcess]) -> None:
    """Kill the processes and all that they started, at once, as a machine that loses its power would."""
    doomed = [psutil.Process(process.pid) for process in launched]
    doomed += [child for one in doomed for child in one.children(recursive=True)]
    for one in doomed:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    for process in launched:
        process.join()
    psutil.wait_procs(doomed, timeout=30)


def unfinished(run: Path) -> list[str]:
    return [path.name for path in (run / "checkpoints").glob("unfinished-*")]


def kill_at_random(launched: list[BaseProcess], run: Path, log: Path, rng: random.Random) -> str:
    """Kill a run at a random moment of its first steps; says when, and what was half written."""
    moment = rng.choice(["start", "step", "step", "save", "save", "save"])
    num_steps, delay = rng.randrange(1, 5), rng.uniform(0, 0.1 if moment == "save" else 0.3)
    what, num_seen = (r"^folder ", 1) if moment == "start" else (r"^step ", num_steps)
    while not log.exists() or len(re.findall(what, log.read_text(), re.MULTILINE)) < num_seen:
        assert all(process.is_alive() for process in launched), log.read_text()
        time.sleep(0.005)
    deadline = time.monotonic() + 20
    while moment == "save" and not unfinished(run) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    kill_all(launched)
    assert [process.exitcode for process in launched] == [-9] * len(launched), log.read_text()
    return f"{moment} + {delay * 1000:3.0f} ms, {' '.join(unfinished(run)) or 'nothing'} half written"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "num_processes", "num_kills"),
    [
        ("mae", 1, 8),
        ("dino", 1, 8),
        ("mae", 2, 7),
        ("dino", 2, 7),
    ],
)
def test_a_run_that_is_killed_at_random_moments_ends_bit_for_bit_the_same(
    photo_folder: Path, tmp_path: Path, objective: str, num_processes: int, num_kills: int
) -> None:
    def flags(run: Path) -> list[str]:
        settings = [f"--data.source={photo_folder}", f"--output_dir={run}", f"--steps={STEPS}"]
        workers = f"--data.num_workers={2 - num_processes}"
        return [*SMALL[objective], *settings, "--data.label_column=none", f"--checkpoint.every_steps={EVERY}", workers]

    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert f"{num_processes} process" in end(objective, flags(whole), log, num_processes)
    rng = random.Random(f"{objective} {num_processes}")
    in_saves = 0
    for number in range(1, num_kills + 1):
        told = kill_at_random(start(objective, flags(run), log, num_processes), run, log, rng)
        in_saves += "nothing" not in told
        left = list_checkpoints(run)
        assert [find_damage(folder) for folder in left] == [None] * len(left)
        at = left[-1].name if left else "no step"
        print(f"{objective}, {num_processes} processes, kill {number}: {told}, {at} whole")
    print(f"{in_saves} of {num_kills} kills came in the middle of a save")
    assert in_saves > 0
    text = end(objective, flags(run), log, num_processes)
    assert re.search(r"Going on from .*step-\d+, step", text)
    last = f"checkpoints/step-{STEPS:08d}"
    for name in ("model", "optimizer"):
        file = f"{last}/{name}.safetensors"
        assert (run / file).read_bytes() == (whole / file).read_bytes(), name
    assert (run / "backbone.safetensors").read_bytes() == (whole / "backbone.safetensors").read_bytes()
    assert losses(run) == losses(whole)
