"""Runs that are killed again and again, at any moment, end as those that nobody disturbed.

`pytest -m slow tests/test_kills.py -s` tells of each kill.
"""

import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import scripts.pretrain_dino
import scripts.pretrain_mae
from ssl_vit.core import writing
from ssl_vit.evaluation import command, extract
from ssl_vit.export import export_backbone, load_backbone
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.vit import ViT
from ssl_vit.runs.checkpoint import find_damage, list_checkpoints
from ssl_vit.training.loop import main
from tests.conftest import SMALL_DINO, SMALL_RUN, TINY
from tests.processes import SERVER, environments, redirect_output
from tests.specs import grey
from tests.test_resume import losses

STEPS, EVERY = 40, 2
SMALL = {"mae": SMALL_RUN, "dino": [*SMALL_DINO, "--objective.freeze_last_layer=0.5"]}
DEFAULTS = {"mae": scripts.pretrain_mae.DEFAULTS, "dino": scripts.pretrain_dino.DEFAULTS}


def work(objective: str, flags: list[str], log: Path, environment: dict[str, str]) -> None:
    """A process of a run, as a launcher starts it, on one core, with output in a file.

    Flushing takes 15 ms longer, so that more of the kills come in the middle of a save.
    """
    redirect_output(log, log)
    os.environ.update(environment)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, [cores[int(environment.get("LOCAL_RANK", "0")) % len(cores)]])
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
    launched: list[BaseProcess] = []
    for environment in environments(num_processes):
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


class Killed(BaseException):
    """Ends what is under way, as SIGKILL does."""


def dies_at(step: int, work: Callable[[], object]) -> bool:
    """Do something that is killed at its STEPth change of the disk, after which nothing changes it; whether it was."""
    left = step

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **settings: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:  # what would clear up does not run, either
                raise Killed
            return call(*args, **settings)

        return change

    with pytest.MonkeyPatch.context() as patched:
        for name in ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir"):
            patched.setattr(os, name, dying(getattr(os, name)))
        patched.setattr(writing, "_exchange", dying(writing._exchange))
        try:
            work()
        except Killed:
            return True
    return False


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if "unfinished" in path.name]


def build(seed: int) -> ViT:
    torch.manual_seed(seed)
    return EncoderConfig(image_size=32, **{**TINY, "depth": 1}).build().eval()


def export(encoder: ViT, folder: Path) -> None:
    export_backbone(encoder, folder, normalization=grey(mean=0.1 * encoder.vit.num_features / 32), provenance={})


@pytest.mark.parametrize("other_width", [False, True])
def test_a_kill_in_an_export_leaves_a_pair_or_an_error_and_the_next_one_mends_it(
    tmp_path: Path, other_width: bool
) -> None:
    folder, old = tmp_path / "run", build(1)
    new = (
        EncoderConfig(image_size=32, **{**TINY, "embed_dim": 64, "depth": 1}).build().eval()
        if other_width
        else build(2)
    )
    folder.mkdir()
    refused, step = 0, 1
    while True:
        export(old, folder)
        if not dies_at(step, lambda: export(new, folder)):
            break
        try:
            found = load_backbone(folder).vit.patch_embed.proj.weight
            assert any(torch.equal(found, one.vit.patch_embed.proj.weight) for one in (old, new))
        except ValueError as error:
            refused += "backbone.safetensors" in str(error)
        export(new, folder)
        assert torch.equal(load_backbone(folder).vit.patch_embed.proj.weight, new.vit.patch_embed.proj.weight)
        assert leftovers(tmp_path) == []
        step += 1
    assert step > 5
    assert refused == 1  # between the two renames


def test_a_kill_in_a_first_export_leaves_no_half_of_it(tmp_path: Path) -> None:
    step, folder, encoder = 1, tmp_path / "new", build(1)
    while dies_at(step, lambda: export(encoder, folder)):
        assert not folder.exists() or sorted(path.name for path in folder.iterdir()) == [
            "backbone.safetensors",
            "config.json",
        ]
        shutil.rmtree(folder, ignore_errors=True)
        step += 1
    assert step > 4


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_kill_while_an_export_is_overwritten_leaves_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool
) -> None:
    """Where no system call exchanges two names, the next call finds the old one again."""
    if not in_one_step:
        monkeypatch.setattr(writing, "_exchange", lambda one, other: False)
    folder, step = tmp_path / "timm", 1

    def write(text: str) -> None:
        writing.restore_folder(folder)
        with writing.fresh_folder(tmp_path / "unfinished-timm") as unfinished:
            for name in ("one", "two"):
                (unfinished / name).write_text(text)
            writing.replace_folder(unfinished, folder)

    def read() -> set[str]:
        return {path.read_text() for path in folder.iterdir()} if folder.exists() else set()

    while True:
        write("old")
        if not dies_at(step, lambda: write("new")):
            break
        if not in_one_step:
            writing.restore_folder(folder)
        assert read() in ({"old"}, {"new"}), step
        write("newest")
        assert read() == {"newest"}
        assert leftovers(tmp_path) == []
        step += 1
    assert step > 4


def test_a_kill_while_a_report_is_written_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    out, step = tmp_path / "report.html", 1
    while True:
        writing.replace_text(out, "old")
        if not dies_at(step, lambda: writing.replace_text(out, "new")):
            break
        assert out.read_text() in ("old", "new")
        step += 1
    assert step > 3
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("suffix", ["safetensors", pytest.param("parquet", marks=pytest.mark.slow)])
def test_a_kill_in_an_extraction_leaves_what_the_next_one_ends(photo_folder: Path, tmp_path: Path, suffix: str) -> None:
    export(build(1), tmp_path / "backbone")
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        shutil.copy(photo_folder / "disc" / f"{number:02d}.png", images)

    def run(output: Path) -> int:
        flags = [
            f"--source={images}",
            f"--output={output}",
            "--rows_per_part=2",
            "--batch_size=2",
            "--num_workers=0",
        ]
        return command.main(extract.extract, {"": extract.ExtractConfig}, None, [str(tmp_path / "backbone"), *flags])

    assert run(tmp_path / f"whole.{suffix}") == 0
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    step, output = 1, tmp_path / "out" / f"features.{suffix}"
    while dies_at(step, lambda: run(output)):
        assert not output.exists() or output.read_bytes() == whole
        if step % 3 == 0:  # killed again before it is ended
            dies_at(2, lambda: run(output))
        assert run(output) == 0
        assert output.read_bytes() == whole
        assert [path.name for path in output.parent.iterdir()] == [output.name]
        output.unlink()
        step += 1
    assert step > 10
