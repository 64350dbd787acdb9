import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_vit.checkpoint import (
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
    return save_checkpoint(run, number, model, optimizer, state, is_writer=True)


def test_a_loaded_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = build()
    step(model, optimizer, 3)
    folder = save_checkpoint(tmp_path, 3, model, optimizer, {"note": "x"}, is_writer=True)
    step(model, optimizer, 4)
    other, other_optimizer = build(seed=1)
    assert load_checkpoint(folder, other, other_optimizer) == {"step": 3, "note": "x"}
    step(other, other_optimizer, 4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert [group["weight_decay"] for group in other_optimizer.param_groups] == [0.01, 0.0]


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    assert sorted(path.name for path in folder.iterdir()) == [
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
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            save(tmp_path, 2)
    assert newest_checkpoint(tmp_path) == first
    assert list_checkpoints(tmp_path) == [first]
    assert save(tmp_path, 2) == newest_checkpoint(tmp_path)  # what was left does not disturb


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "garbage"])
def test_damaged_checkpoints_are_passed_over_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, fault: str
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    file = newer / name
    content = file.read_bytes()
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if fault == "truncated" else b"\xff" * 20)
    assert newest_checkpoint(tmp_path) == older
    assert f"damaged checkpoint {newer}" in capsys.readouterr().out
    assert newer.exists()


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
