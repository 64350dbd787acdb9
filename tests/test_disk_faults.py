"""Runs whose disk is full, for a while or for good, or damages what they saved."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

import scripts.pretrain_dino
import scripts.pretrain_mae
from ssl_vit.core import writing
from ssl_vit.data.sources.source import Source
from ssl_vit.runs import checkpoint
from ssl_vit.runs.checkpoint import find_damage, list_checkpoints
from ssl_vit.training.loop import main
from tests.core.test_writing import FullDisk
from tests.processes import Launch
from tests.runs.test_checkpoint import flip_a_byte, truncate
from tests.test_resume import command, losses, same, weights

Start, Whole = Callable[..., int], Callable[..., Path]
Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
DEFAULTS = {"mae": scripts.pretrain_mae.DEFAULTS, "dino": scripts.pretrain_dino.DEFAULTS}
# What is drawn on the device (drop path) may depend on the number of processes.
USUAL = ["--checkpoint.every_steps=3", "--encoder.drop_path_rate=0"]


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def start(photo_folder: Path) -> Start:
    """Run a script in this process; returns its exit code."""

    def start(run: Path, *flags: str, objective: str = "mae") -> int:
        AcceleratorState._reset_state()
        PartialState._reset_state()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", command(photo_folder, run, *USUAL, *flags, objective=objective))
            return main(DEFAULTS[objective])

    return start


@pytest.fixture(scope="module")
def whole(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs that nobody disturbed, with all their checkpoints."""

    @cache
    def whole(objective: str = "mae") -> Path:
        run = tmp_path_factory.mktemp("runs") / objective
        assert start(run, "--checkpoint.keep=9", objective=objective) == 0
        return run

    return whole


def as_if_ended_at(whole: Path, run: Path, step: int) -> None:
    """Copy what an undisturbed run had written when it had saved a step."""
    shutil.copytree(whole, run)
    (run / "results.json").unlink()
    for folder in list_checkpoints(run):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def steps(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in list_checkpoints(run)]


def full_at(monkeypatch: Patch, saves: set[int]) -> None:
    """Let the disk be full when some of the saves are flushed, counted from 1."""
    fsync, count = os.fsync, 0

    def flush(path: Path) -> None:
        nonlocal count
        if path.name == checkpoint.MODEL_FILE:
            count += 1
            if count in saves:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        descriptor = os.open(path, os.O_RDONLY)
        fsync(descriptor)
        os.close(descriptor)

    monkeypatch.setattr(checkpoint, "flush", flush)


def test_a_save_that_fails_leaves_the_run_going_and_earlier_checkpoints_whole(
    start: Start,
    whole: Whole,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Capture,
) -> None:
    run = tmp_path / "run"
    capsys.readouterr()
    full_at(monkeypatch, {2, 3})
    assert start(run, "--checkpoint.keep=9") == 0
    assert steps(run) == [3, 12]
    warnings = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(warnings) == 2
    assert re.search(
        r"step-00000006: cannot be saved: No space left on device, [\d.,]+ MiB are free; .* goes on", warnings[0]
    )
    assert [find_damage(folder) for folder in list_checkpoints(run)] == [None, None]
    assert same(weights(whole()), weights(run)) == []
    assert losses(run) == losses(whole())


def test_a_last_save_that_fails_is_said_and_can_be_made_up_for(
    start: Start,
    whole: Whole,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Capture,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        full_at(patched, {4, 5})
        assert start(run) == 1
    error = capsys.readouterr().err
    assert re.search(
        r"^error: .*step-00000012: cannot be saved: No space left on device, .*before it are whole\.$", error, re.M
    )
    assert "Traceback" not in error
    assert steps(run) == [9]  # the other one was deleted to make room
    assert list(run.glob("**/unfinished-*")) == []
    assert start(run) == 0
    assert same(weights(whole()), weights(run)) == []


def test_what_the_last_checkpoint_takes_the_place_of_makes_room_for_it(
    start: Start, tmp_path: Path, monkeypatch: Patch
) -> None:
    full_at(monkeypatch, {4})
    assert start(tmp_path / "run", "--checkpoint.keep=3") == 0
    assert steps(tmp_path / "run") == [6, 9, 12]


def test_a_signal_whose_save_fails_ends_with_an_error(
    start: Start, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    image, drawn = Source.image, 0

    def interrupted(self: Source, index: int, num_channels: int):
        nonlocal drawn
        drawn += 1
        if drawn == 36:  # in the fifth step
            os.kill(os.getpid(), signal.SIGTERM)
        return image(self, index, num_channels)

    monkeypatch.setattr(Source, "image", interrupted)
    full_at(monkeypatch, {2, 3})
    assert start(tmp_path / "run") == 1
    assert "step-00000005: cannot be saved" in capsys.readouterr().err
    assert steps(tmp_path / "run") == [3]


def test_a_log_that_cannot_be_written_does_not_end_the_run(
    start: Start,
    whole: Whole,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Capture,
) -> None:
    run = tmp_path / "run"
    append, calls = writing._append, 0

    def sometimes(content: bytes, path: Path) -> None:
        nonlocal calls
        calls += 1
        with pytest.MonkeyPatch.context() as patched:
            if 3 <= calls <= 8:
                patched.setattr(os, "write", FullDisk(room=30))
            append(content, path)

    monkeypatch.setattr(writing, "_append", sometimes)
    assert start(run) == 0
    assert capsys.readouterr().err.count("metrics.jsonl: No space left on device") == 1
    assert losses(run) == losses(whole())
    assert same(weights(whole()), weights(run)) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB of its own, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="has no mount")
def test_a_disk_that_is_really_full(
    start: Start,
    whole: Whole,
    small_disk: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    run = small_disk / "run"
    size = sum(path.stat().st_size for path in list_checkpoints(whole())[-1].iterdir())
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - int(1.5 * size)))
    capsys.readouterr()
    assert start(run, "--checkpoint.keep=1") == 1  # there is room for one, and its successor must be there first
    out, error = capsys.readouterr()
    assert out.count("cannot be saved: No space left on device") == 2
    assert "step-00000012: cannot be saved: No space left on device" in error
    assert steps(run) == [3]
    assert find_damage(list_checkpoints(run)[0]) is None
    ballast.unlink()
    assert start(run, "--checkpoint.keep=1") == 0
    assert same(weights(whole()), weights(run)) == []
    assert losses(run) == losses(whole())


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a flipped byte": ("model.safetensors", flip_a_byte, "has another content than was written"),
    "a file cut short": ("optimizer.safetensors", truncate, "bytes, and"),
    "a missing file": ("state.json", Path.unlink, "cannot be read: No such file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_to_the_same_weights(
    start: Start,
    whole: Whole,
    tmp_path: Path,
    capsys: Capture,
    fault: str,
) -> None:
    run = tmp_path / "run"
    as_if_ended_at(whole(), run, 12)
    name, damage, problem = FAULTS[fault]
    newest = run / "checkpoints" / "step-00000012"
    damage(newest / name)
    damaged = {path.name: path.read_bytes() for path in newest.iterdir()}
    assert start(run) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^Skipping the damaged checkpoint {newest}: {name}.*{problem}", text, re.MULTILINE)
    assert "step-00000009, step 9 of 12" in text
    assert same(weights(whole()), weights(run)) == []
    assert losses(run) == losses(whole())
    kept = newest.with_name("damaged-step-00000012")
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == damaged


FULL_IN_ONE_PROCESS = """
import errno, os, sys
from scripts.pretrain_{objective} import DEFAULTS
from ssl_vit.runs import checkpoint
from ssl_vit.training.loop import main

save_file, names = checkpoint.save_file, []

def full_at_times(tensors, path):
    names.append(path.parent.name)
    if path.parent.name.endswith(("06", "12")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save_file(tensors, path)

checkpoint.save_file = full_at_times
sys.exit(main(DEFAULTS))
"""


@pytest.mark.parametrize("objective", ["mae", pytest.param("dino", marks=pytest.mark.slow)])
def test_runs_change_their_number_of_processes_and_all_of_these_learn_of_a_full_disk(
    start: Start,
    whole: Whole,
    photo_folder: Path,
    tmp_path: Path,
    capsys: Capture,
    objective: str,
) -> None:
    """From one to two, whose one writer must neither be waited for nor leave the other alone, and back to one."""
    script, run = tmp_path / "full.py", tmp_path / "run"
    as_if_ended_at(whole(objective), run, 3)
    script.write_text(FULL_IN_ONE_PROCESS.format(objective=objective))
    flags = [*USUAL, "--batch.per_device=2"]
    words = [str(script), *command(photo_folder, run, *flags, objective=objective)[1:]]
    with Launch(words, num_processes=2) as launched:
        assert 0 not in launched.join()
        printed = launched.printed()
        errors = launched.errors(0) + launched.errors(1)
    assert "8 = 2 processes x 2 micro-batches x 2 images" in printed
    assert "step-00000003, step 3 of 12" in printed
    assert "processes.count 1 -> 2" in printed
    assert printed.count("step-00000006: cannot be saved: No space left on device") == 1
    assert "step-00000012: cannot be saved: No space left on device" in errors
    assert steps(run) == [9]
    capsys.readouterr()
    assert start(run, objective=objective) == 0
    text = capsys.readouterr().out
    assert "8 = 1 process x 1 micro-batch x 8 images" in text
    assert "step-00000009, step 9 of 12" in text
    assert "processes.count 2 -> 1" in text
    counts = [
        session["processes"]["count"] for session in json.loads((run / "provenance.json").read_text())["sessions"]
    ]
    assert counts == [1, 2, 1]
    assert losses(run) == pytest.approx(losses(whole(objective)), rel=1e-4)
    found = weights(run)
    for name, value in weights(whole(objective)).items():
        if not name.startswith("optimizer "):
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-4)
