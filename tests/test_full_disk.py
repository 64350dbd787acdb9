"""Runs whose disk is full, for a while or for good."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from scripts.pretrain_mae import DEFAULTS
from ssl_vit import checkpoint, writing
from ssl_vit.checkpoint import find_damage, list_checkpoints
from ssl_vit.data.sources import Source
from ssl_vit.train import main
from tests.conftest import ROOT, SMALL_RUN
from tests.test_resume import command, finish, losses, same, weights
from tests.test_writing import FullDisk

STEPS = 12


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()
    torch.set_num_threads(threads)


@pytest.fixture
def start(photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def start(run: Path, *flags: str) -> int:
        AcceleratorState._reset_state()
        PartialState._reset_state()
        words = [f"--data.source={photo_folder}", f"--output_dir={run}", f"--steps={STEPS}"]
        usual = ["--data.label_column=none", "--checkpoint.every_steps=3"]
        monkeypatch.setattr(sys, "argv", ["pretrain_mae.py", *SMALL_RUN, *words, *usual, *flags])
        return main(DEFAULTS)

    return start


def steps(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in list_checkpoints(run)]


def full_at(monkeypatch: pytest.MonkeyPatch, saves: set[int]) -> None:
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
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start(whole) == 0
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
    assert same(weights(whole), weights(run)) == []
    assert losses(run) == losses(whole)


def test_a_last_save_that_fails_is_said_and_can_be_made_up_for(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start(whole) == 0
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
    assert same(weights(whole), weights(run)) == []


def test_what_the_last_checkpoint_takes_the_place_of_makes_room_for_it(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_at(monkeypatch, {4})
    assert start(tmp_path / "run", "--checkpoint.keep=3") == 0
    assert steps(tmp_path / "run") == [6, 9, 12]


def test_a_signal_whose_save_fails_ends_with_an_error(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start(whole) == 0
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
    assert losses(run) == losses(whole)
    assert same(weights(whole), weights(run)) == []


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
    start: Callable[..., int], small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", small_disk / "run"
    assert start(whole) == 0
    size = sum(path.stat().st_size for path in list_checkpoints(whole)[-1].iterdir())
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
    assert same(weights(whole), weights(run)) == []
    assert losses(run) == losses(whole)


FULL_IN_ONE_PROCESS = """
import errno, os, sys
sys.path.insert(0, {root!r})
from scripts.pretrain_mae import DEFAULTS
from ssl_vit import checkpoint
from ssl_vit.train import main

save_file, names = checkpoint.save_file, []

def full_at_times(tensors, path):
    names.append(path.parent.name)
    if path.parent.name.endswith(("06", "12")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save_file(tensors, path)

checkpoint.save_file = full_at_times
sys.exit(main(DEFAULTS))
"""


def test_two_processes_both_learn_of_a_full_disk(photo_folder: Path, tmp_path: Path) -> None:
    """Only one of them writes; the other must neither wait for it nor go on alone. One process can then go on."""
    flags = ["--checkpoint.every_steps=3", "--encoder.drop_path_rate=0"]
    script, run = tmp_path / "full.py", tmp_path / "run"
    script.write_text(FULL_IN_ONE_PROCESS.format(root=str(ROOT)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*launcher, str(script), *command(photo_folder, run, *flags)[1:]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert "2 processes on cpu" in done.stdout
    assert done.stdout.count("step-00000006: cannot be saved: No space left on device") == 1
    assert done.returncode != 0
    assert "step-00000012: cannot be saved: No space left on device" in done.stderr
    assert steps(run) == [9]
    text = finish([sys.executable, *command(photo_folder, run, *flags)])
    assert "Going on from" in text
    assert "processes.count 2 -> 1" in text
    assert steps(run) == [9, 12]
