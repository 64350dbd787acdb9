"""Steps that are skipped, and runs that go back: in one process and in two."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from ssl_vit.data.sampler import StepSampler
from ssl_vit.objectives.dino import DINO
from ssl_vit.objectives.dinov2 import DINOv2
from ssl_vit.objectives.mae import MAE
from ssl_vit.runs.checkpoint import checkpoint_folder, list_checkpoints
from ssl_vit.training.faults import Faults, SpikeWatch, spike_threshold
from ssl_vit.training.muon import Muon
from ssl_vit.training.step import poison_nonfinite, take_step
from tests.conftest import last_weights, losses

KINDS = {"mae": MAE, "dino": DINO, "dinov2": DINOv2, "simdino": DINO}
EVERY_STEP = ("--checkpoint.every_steps=1", "--checkpoint.keep=99")


def state_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything that is learned: parameters, buffers, moments."""
    folder = checkpoint_folder(run, step)
    moments = load_file(folder / "optimizer.safetensors")
    return load_file(folder / "model.safetensors") | {f"optimizer {name}": value for name, value in moments.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def break_steps(
    monkeypatch: pytest.MonkeyPatch, objective: str, steps: set[int], num_steps: int, factor: float = float("nan")
) -> None:
    """Multiply the input of some steps by a factor."""
    kind = KINDS[objective]
    forward = kind.forward

    def broken(self: torch.nn.Module, batch: dict, progress: float) -> dict[str, torch.Tensor]:
        if round(progress * num_steps) in steps:
            batch = {name: value * factor if value.is_floating_point() else value for name, value in batch.items()}
        return forward(self, batch, progress)

    monkeypatch.setattr(kind, "forward", broken)


@pytest.mark.parametrize("objective", ["mae", "dino", "dinov2", "simdino"])
def test_a_step_that_is_not_finite_changes_nothing(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    """No weight, moment, teacher or centre; DINO's last layer learns from the start, so that it has moments."""
    freeze = () if objective == "mae" else ("--objective.freeze_last_layer=0", "--objective.centering=center")
    break_steps(monkeypatch, objective, {2}, num_steps=4)
    start(*EVERY_STEP, *freeze, "--optim.clip_grad=1", steps=4, objective=objective)
    run = tmp_path / "run"
    assert same(state_at(run, 2), state_at(run, 3))
    assert not same(state_at(run, 3), state_at(run, 4))
    assert all(value.isfinite().all() for value in state_at(run, 4).values())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1]
    assert ["loss" in record for record in records] == [True, True, False, True]


def test_the_first_step_may_be_skipped(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_steps(monkeypatch, "mae", {0}, num_steps=3)
    start(*EVERY_STEP, steps=3)
    start("--checkpoint.every_steps=9", steps=3, name="unsaved")
    assert len(losses(tmp_path / "run")) == 2
    assert same(state_at(tmp_path / "run", 3), state_at(tmp_path / "unsaved", 3))


def test_an_infinite_loss_with_finite_gradients_spoils_them() -> None:
    values = torch.full((3,), 1e20, requires_grad=True)
    loss = values.square().mean()
    (grad,) = torch.autograd.grad(loss, values, retain_graph=True)
    assert loss.isinf()
    assert grad.isfinite().all()
    (grad,) = torch.autograd.grad(poison_nonfinite(loss), values)
    assert grad.isnan().all()


def test_a_finite_loss_keeps_every_bit() -> None:
    values = torch.randn(100, requires_grad=True)
    loss = values.square().mean()
    (expected,) = torch.autograd.grad(loss / 3, values, retain_graph=True)
    (found,) = torch.autograd.grad(poison_nonfinite(loss) / 3, values)
    assert torch.equal(poison_nonfinite(loss), loss)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("use_muon", [False, True])
@pytest.mark.usefixtures("_fresh_state")
def test_with_fp16_the_scaler_skips_and_lowers_its_scale(use_muon: bool) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight = torch.nn.Parameter(torch.ones(2, 2))
    inner = Muon([{"params": [weight], "use_muon": use_muon}], dtype=torch.float32, lr=0.1, fused=False)
    optimizer = AcceleratedOptimizer(inner, scaler=accelerator.scaler)
    accelerator._optimizers.append(optimizer)
    for factor, taken in ((float("inf"), False), (1.0, True)):
        before = weight.detach().clone()
        accelerator.backward(poison_nonfinite((weight * factor).sum()))
        accelerator.scaler.unscale_(inner)
        assert weight.grad is not None
        assert take_step(accelerator, optimizer, weight.grad.norm()).item() is taken
        assert torch.equal(weight, before) is not taken
        assert accelerator.scaler.get_scale() == 512
        optimizer.zero_grad()


def test_too_many_in_a_row_stop_the_run_and_name_their_samples(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--max_skipped_steps=3", "--checkpoint.every_steps=2", "--batch.per_device=4")
    run = tmp_path / "run"
    with monkeypatch.context() as broken:
        break_steps(broken, "mae", {1, 3, 4, 5, 6}, num_steps=9)
        with pytest.raises(FloatingPointError, match=r"steps 3 to 5 were skipped.*skipped_steps.json lists.*base_lr"):
            start(*flags, steps=9)
    assert json.loads((run / "heartbeat.json").read_text())["state"] == "failed"
    entries = json.loads((run / "skipped_steps.json").read_text())
    sampler = StepSampler(num_samples=40, batch_size=8, num_steps=9, seed=0)
    for entry, step in zip(entries, (3, 4, 5), strict=True):
        (keys,) = sampler.of_step(step)
        assert (entry["step"], entry["process"], entry["loss"]) == (step, 0, "nan")
        assert [sample["row"] for sample in entry["samples"]] == [key.index for key in keys]
        assert [sample["position"] for sample in entry["samples"]] == [key.position for key in keys]
    assert list_checkpoints(run)[-1].name == "step-00000004"
    assert start(*flags, steps=9) == 0  # the images are good now
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["skipped_steps"] == 2  # steps 1 and 3; those after the checkpoint were done again
    assert all(value.isfinite().all() for value in last_weights(run).values())


def test_looking_for_spikes_changes_nothing_where_there_are_none(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_vit.training.faults.LEAST", 3)
    start(steps=4, name="without")
    start("--rewind_on_spike=1", steps=4)
    assert same(last_weights(tmp_path / "run"), last_weights(tmp_path / "without"))
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step-00000003", "step-00000004"]


def test_a_step_that_was_taken_starts_the_count_anew(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_steps(monkeypatch, "mae", {0, 1, 3, 4}, num_steps=6)
    assert start("--max_skipped_steps=3") == 0


def test_a_spike_is_far_above_the_recent_losses() -> None:
    faults = Faults()
    watch = SpikeWatch(faults)
    wave = [1 + 0.01 * (number % 5 - 2) for number in range(200)]
    assert not any(watch.sees_spike(torch.tensor(loss)) for loss in [*wave[:49], 9.0])  # too few to judge by
    assert not any(watch.sees_spike(torch.tensor(loss)) for loss in wave)
    assert spike_threshold(faults.recent_losses) == pytest.approx(1 + 10 * 1.4826 * 0.01, abs=1e-4)
    for loss, expected in ((1.14, False), (1.16, True), (0.1, False), (float("nan"), False), (float("inf"), False)):
        assert watch.sees_spike(torch.tensor(loss)) is expected
    assert len(faults.recent_losses) == 100
    assert 1.16 not in [round(loss, 4) for loss in faults.recent_losses]
    assert SpikeWatch(faults).sees_spike(torch.tensor(1.2))  # as after a resume
    assert spike_threshold([2.0] * 60) == pytest.approx(2.1)  # equal losses leave room for 5 %


def test_a_spike_takes_the_run_back_and_past_it(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ssl_vit.training.faults.LEAST", 5)
    flags = ("--rewind_on_spike=1", "--checkpoint.every_steps=4", "--checkpoint.keep=99", "--batch.size=4")
    break_steps(monkeypatch, "mae", {14, 17}, num_steps=20, factor=1e3)
    flags = (*flags, "--objective.norm_pix_loss=false")
    assert start(*flags, steps=20) == 0
    run = tmp_path / "run"
    assert "WARNING: the loss jumped in step 15. Back to " in capsys.readouterr().out
    weights, moved = state_at(run, 12), state_at(run, 15)
    assert same(weights, moved)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record for record in records if "rewound_to" in record] == [{"step": 15, "rewound_to": 12}]
    assert [record["step"] for record in records if "loss" in record] == [*range(1, 15), *range(16, 21)]
    assert records[-1]["step"] == 20  # the second jump is one too many to go back for

    # Killed after the jump and before it, a run ends with the same weights.
    for step in (15, 8):
        for folder in list_checkpoints(run):
            if int(folder.name[-8:]) > step:
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
        (run / "results.json").unlink()
        expected = load_file(run / "backbone.safetensors")
        assert start(*flags, steps=20) == 0
        assert same(load_file(run / "backbone.safetensors"), expected)


def test_a_spike_before_any_checkpoint_is_told_and_gone_past(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the disk was full when one was due."""
    monkeypatch.setattr("ssl_vit.training.faults.LEAST", 5)
    monkeypatch.setattr("ssl_vit.training.loop.newest_checkpoint", lambda _: None)
    break_steps(monkeypatch, "mae", {14}, num_steps=16, factor=1e3)
    assert start("--rewind_on_spike=1", "--batch.size=4", "--objective.norm_pix_loss=false", steps=16) == 0
    assert "WARNING: the loss jumped in step 15, and no checkpoint is there" in capsys.readouterr().out
