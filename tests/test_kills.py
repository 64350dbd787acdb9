"""Runs that are killed again and again, at any moment, end as those that nobody disturbed.

`pytest -m slow tests/test_kills.py -s` tells of each kill.
"""

import random
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ssl_vit.checkpoint import find_damage, list_checkpoints
from tests.conftest import ROOT, SMALL_DINO, SMALL_RUN
from tests.test_resume import losses

STEPS, EVERY = 40, 2
SMALL = {"mae": SMALL_RUN, "dino": [*SMALL_DINO, "--objective.freeze_last_layer=0.5"]}
# Flushing takes 15 ms longer a file, so that more of the kills come in the middle of a save. A core for each process
# makes so small a model faster.
SLOW_SAVES = """
import os, sys, time
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, [cores[int(os.environ.get("LOCAL_RANK", "0")) % len(cores)]])
sys.path.insert(0, {root!r})
from scripts.pretrain_{objective} import DEFAULTS
from ssl_vit.train import main

fsync = os.fsync

def slowly(descriptor):
    time.sleep(0.015)
    fsync(descriptor)

os.fsync = slowly
sys.exit(main(DEFAULTS))
"""


def kill_all(process: subprocess.Popen) -> None:
    """Kill a process and all that it started, as a machine that loses its power would; torchrun's have own groups."""
    doomed = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in doomed:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(doomed[1:], timeout=30)


def unfinished(run: Path) -> list[str]:
    return [path.name for path in (run / "checkpoints").glob("unfinished-*")]


def kill_at_random(words: list[str], run: Path, rng: random.Random) -> str:
    """Start a run and kill it at a random moment of its first steps; says when, and what was half written."""
    moment = rng.choice(["start", "step", "step", "save", "save", "save"])
    num_steps, delay = rng.randrange(1, 5), rng.uniform(0, 0.1 if moment == "save" else 0.3)
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        seen = 0
        for line in process.stdout:
            if moment == "start" and line.startswith(("folder", "Going on")):
                break
            seen += line.startswith("step ")
            if seen == num_steps:
                break
        else:
            raise AssertionError(f"the run ended before it was killed, with code {process.wait()}")
        if moment == "save":
            deadline = time.monotonic() + 20
            while not unfinished(run) and time.monotonic() < deadline:
                time.sleep(0.001)
        time.sleep(delay)
        kill_all(process)
    return f"{moment} {delay * 1000:3.0f} ms, {unfinished(run) or 'nothing'} half written"


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
    script = tmp_path / "slow_saves.py"
    script.write_text(SLOW_SAVES.format(root=str(ROOT), objective=objective))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    launcher = [sys.executable, *(launcher if num_processes > 1 else [])]

    def words(run: Path) -> list[str]:
        settings = [f"--data.source={photo_folder}", f"--output_dir={run}", f"--steps={STEPS}"]
        workers = f"--data.num_workers={2 - num_processes}"
        usual = ["--data.label_column=none", f"--checkpoint.every_steps={EVERY}", workers]
        return [*launcher, str(script), *SMALL[objective], *settings, *usual]

    def end(run: Path) -> str:
        done = subprocess.run(words(run), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert f"{num_processes} process" in done.stdout
        return done.stdout

    whole, run = tmp_path / "whole", tmp_path / "run"
    end(whole)
    rng = random.Random(f"{objective} {num_processes}")
    in_saves = 0
    for number in range(num_kills):
        told = kill_at_random(words(run), run, rng)
        in_saves += "nothing" not in told
        assert [find_damage(folder) for folder in list_checkpoints(run)] == [None] * len(list_checkpoints(run))
        at = [folder.name for folder in list_checkpoints(run)][-1:]
        print(f"{objective}, {num_processes} processes, kill {number + 1}: {told}, newest {at}")
    print(f"{in_saves} of {num_kills} kills came in the middle of a save")
    assert in_saves > 0
    text = end(run)
    assert re.search(r"Going on from .*step-\d+, step", text)
    last = f"checkpoints/step-{STEPS:08d}"
    for name in ("model", "optimizer"):
        file = f"{last}/{name}.safetensors"
        assert (run / file).read_bytes() == (whole / file).read_bytes(), name
    assert (run / "backbone.safetensors").read_bytes() == (whole / "backbone.safetensors").read_bytes()
    assert losses(run) == losses(whole)
