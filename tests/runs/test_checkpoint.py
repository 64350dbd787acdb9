import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from ssl_vit.core import manifest
from ssl_vit.runs import checkpoint
from ssl_vit.runs.checkpoint import (
    CheckpointConfig,
    checkpoint_folder,
    find_damage,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)


def build(seed: int = 0) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias, *model[1].parameters()], "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.1, fused=True)


def step(model: nn.Module, optimizer: torch.optim.AdamW, times: int) -> None:
    for number in range(times):
        model(torch.randn(8, 4, generator=torch.Generator().manual_seed(number))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(run: Path, number: int, **state) -> Path:
    model, optimizer = build()
    step(model, optimizer, 1)
    return save_checkpoint(run, number, model, optimizer, state)


def test_a_loaded_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = build()
    step(model, optimizer, 3)
    folder = save_checkpoint(tmp_path, 3, model, optimizer, {"note": "x"})
    step(model, optimizer, 4)
    other, other_optimizer = build(seed=1)
    assert load_checkpoint(folder, other, other_optimizer) == {"step": 3, "note": "x"}
    step(other, other_optimizer, 4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert [group["weight_decay"] for group in other_optimizer.param_groups] == [0.01, 0.0]


def test_a_checkpoint_before_any_step_that_was_taken_counts_none(tmp_path: Path) -> None:
    """As after steps that fp16's scaler skipped."""
    model, optimizer = build()
    folder = save_checkpoint(tmp_path, 1, model, optimizer, {})
    step(model, optimizer, 2)
    other, other_optimizer = build(seed=1)
    load_checkpoint(folder, other, other_optimizer)
    step(other, other_optimizer, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert json.loads((folder / "state.json").read_text())["step"] == 1


def test_a_save_that_is_cut_short_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(tmp_path, 1)

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(
            OSError, match=r"step-00000002: cannot be saved: No space left on device, [\d.,]+ MiB are free"
        ):
            save(tmp_path, 2)
    assert newest_checkpoint(tmp_path) == first
    assert list_checkpoints(tmp_path) == [first]
    assert save(tmp_path, 2) == newest_checkpoint(tmp_path)  # what was left does not disturb


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


FAULTS = {
    "missing": (Path.unlink, "cannot be read: No such file"),
    "truncated": (truncate, r"has [\d,]+ bytes, and [\d,]+ were written"),
    "garbage": (lambda file: file.write_bytes(b"\xff" * 20), r"has 20 bytes, and [\d,]+ were written"),
    "a flipped byte": (flip_a_byte, "has another content than was written"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_checkpoints_are_passed_over_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, fault: str
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    damage, expected = FAULTS[fault]
    damage(newer / name)
    assert newest_checkpoint(tmp_path) == older
    assert re.search(f"damaged checkpoint {newer}: {name} {expected}", capsys.readouterr().out)
    assert newer.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "garbage"])
def test_checkpoints_of_versions_without_a_manifest_are_looked_at_too(tmp_path: Path, name: str, fault: str) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    for folder in (older, newer):
        (folder / "manifest.json").unlink()
    assert newest_checkpoint(tmp_path) == newer
    FAULTS[fault][0](newer / name)
    assert newest_checkpoint(tmp_path) == older


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "cannot be read"),
        ("[]", "holds no JSON object"),
        ("{}", "KeyError"),
        ('{"files": 7}', "AttributeError"),
        ('{"files": {"model.safetensors": 7}}', "TypeError"),
        ("[" * 100_000, "is no valid JSON"),
    ],
)
def test_a_damaged_manifest_is_damage(tmp_path: Path, content: str, problem: str) -> None:
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_text(content)
    found = find_damage(folder)
    assert found is not None
    assert problem in found
    assert "\n" not in found


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", "", "..\\secret"])
def test_a_manifest_cannot_name_files_of_other_folders(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 1)
    (folder.parent / "secret").write_text("x")
    own = json.loads((folder / "manifest.json").read_text())["files"]
    other = {name: {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    (folder / "manifest.json").write_text(json.dumps({"files": other | own}))
    assert find_damage(folder) == f"manifest.json names {name!r}, which is no file of this folder"


def test_a_damaged_checkpoint_makes_room_for_the_good_one_of_its_step_and_stays(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for number in range(2):
        folder = save(tmp_path, 2)
        flip_a_byte(folder / "model.safetensors")
        damaged = (folder / "model.safetensors").read_bytes()
        assert save(tmp_path, 2) == newest_checkpoint(tmp_path)
        kept = folder.with_name(f"damaged-{folder.name}" + ("-2" if number else ""))
        assert (kept / "model.safetensors").read_bytes() == damaged
    assert len(list_checkpoints(tmp_path)) == 2


def test_a_whole_checkpoint_is_not_written_again(tmp_path: Path) -> None:
    before = (save(tmp_path, 1) / "state.json").stat().st_mtime_ns
    assert (save(tmp_path, 1, note="x") / "state.json").stat().st_mtime_ns == before
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_damaged_checkpoints_are_neither_counted_nor_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, 7):
        save(tmp_path, number)
    monkeypatch.setattr(checkpoint, "_known_whole", set())  # as in the process that goes on
    flip_a_byte(checkpoint_folder(tmp_path, 6) / "model.safetensors")
    truncate(checkpoint_folder(tmp_path, 5) / "optimizer.safetensors")
    flip_a_byte(checkpoint_folder(tmp_path, 2) / "state.json")
    prune_checkpoints(tmp_path, CheckpointConfig(keep=2))
    assert [int(folder.name[-2:]) for folder in list_checkpoints(tmp_path)] == [2, 3, 4, 5, 6]
    assert find_damage(checkpoint_folder(tmp_path, 3)) is None


def test_what_this_process_wrote_is_not_read_again_to_prune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        save(tmp_path, number)

    def fail(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(manifest, "hash_file", fail)
    prune_checkpoints(tmp_path, CheckpointConfig(keep=2))
    assert len(list_checkpoints(tmp_path)) == 2


def test_a_deletion_that_is_cut_short_leaves_no_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        save(tmp_path, number)

    def cut_short(folder: Path, ignore_errors: bool = False) -> None:
        (folder / "model.safetensors").unlink()
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", cut_short)
        prune_checkpoints(tmp_path, CheckpointConfig(keep=2))
    assert "step-00000000: cannot be deleted: Input/output error" in capsys.readouterr().out
    assert [find_damage(folder) for folder in list_checkpoints(tmp_path)] == [None, None]
    checkpoint.remove_unfinished(tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As safetensors itself reports it, which has the system's number in its text alone."""
    first = save(tmp_path, 1)

    def fail(*args: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", fail)
        with pytest.raises(OSError, match="step-00000002: cannot be saved: No space left on device"):
            save(tmp_path, 2)
    assert list((tmp_path / "checkpoints").iterdir()) == [first]
    assert save(tmp_path, 2) == newest_checkpoint(tmp_path)


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"model.safetensors: belongs to another model.*5 are unknown"):
        load_checkpoint(folder, model, torch.optim.AdamW(model.parameters()))


def test_the_newest_and_the_marked_ones_stay(tmp_path: Path) -> None:
    for number in range(10, 70, 10):
        save(tmp_path, number)
    (checkpoint_folder(tmp_path, 10) / "KEEP").touch()
    prune_checkpoints(tmp_path, CheckpointConfig(keep=2, keep_every_steps=30))
    assert [folder.name[-2:] for folder in list_checkpoints(tmp_path)] == ["10", "30", "50", "60"]
    assert all(find_damage(folder) is None for folder in list_checkpoints(tmp_path))


@pytest.mark.parametrize("name", ["every_steps", "keep", "keep_every_steps"])
def test_settings_that_cannot_work_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        CheckpointConfig(**{name: 0})
