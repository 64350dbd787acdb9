"""Runs that are killed, and runs of two processes, through real processes and the real script."""

import json
import random
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, SMALL_DINO, SMALL_DINOV2, SMALL_RUN
from tests.processes import Launch, finish, kill_at

STEPS = 12
SMALL = {"mae": SMALL_RUN, "dino": SMALL_DINO, "dinov2": SMALL_DINOV2}
# The last layer waits for half of the run, so that runs are killed before and after it has moments.
FREEZE = "--objective.freeze_last_layer=0.5"


def command(photo_folder: Path, run: Path, *flags: str, objective: str = "mae") -> list[str]:
    settings = [f"--data.source={photo_folder}", f"--output_dir={run}", f"--steps={STEPS}"]
    script = str(ROOT / "scripts" / f"pretrain_{objective}.py")
    return [script, *SMALL[objective], *settings, "--data.label_column=none", *flags]


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{STEPS:08d}"
    tensors = load_file(folder / "model.safetensors")
    return tensors | {f"optimizer {name}": value for name, value in load_file(folder / "optimizer.safetensors").items()}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nobody disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    finish(command(photo_folder, run))
    return run


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(
    photo_folder: Path, whole: Path, tmp_path: Path, num_workers: int
) -> None:
    run, step = tmp_path / "run", random.randrange(4, STEPS - 1)
    print(f"killed after step {step}")
    words = command(photo_folder, run, f"--data.num_workers={num_workers}", "--checkpoint.every_steps=3")
    kill_at(words, step)
    assert re.search(r"Going on from .*step-0000000[369]", finish(words))
    expected, found = weights(whole), weights(run)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert losses(run) == losses(whole)
    assert (run / "backbone.safetensors").read_bytes() == (whole / "backbone.safetensors").read_bytes()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not bit for bit the same."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize(
    ("objective", "steps"), [("dino", [4, 8]), pytest.param("dinov2", [8], marks=pytest.mark.slow)]
)
def test_teacher_centre_and_frozen_layers_survive_being_killed(
    photo_folder: Path, tmp_path: Path, objective: str, steps: list[int]
) -> None:
    """In the middle of an epoch (5 steps), before and after the last layer has moments."""
    flags = (FREEZE, "--checkpoint.every_steps=3")
    undisturbed = tmp_path / "whole"
    finish(command(photo_folder, undisturbed, *flags, objective=objective))
    run = tmp_path / "run"
    words = command(photo_folder, run, *flags, objective=objective)
    for step in steps:
        kill_at(words, step)
    finish(words)
    assert same(weights(undisturbed), weights(run)) == []
    assert losses(run) == losses(undisturbed)
    assert "center" in weights(run)


def test_a_frozen_backbone_thaws_the_same_after_kills(photo_folder: Path, whole: Path, tmp_path: Path) -> None:
    """Before, on and after the boundary; the backbone and its teacher keep their weights until then."""
    start = load_file(whole / "backbone.safetensors")
    flags = (
        f"--encoder.pretrained={whole}",
        "--optim.freeze_backbone_until=0.5",
        "--optim.unfreeze_ramp=0.25",
        "--objective.anchor=gram",
        "--checkpoint.every_steps=3",
        "--checkpoint.keep=4",
    )
    undisturbed, run = tmp_path / "whole", tmp_path / "run"
    finish(command(photo_folder, undisturbed, *flags, objective="dino"))
    frozen, thawed = (load_file(undisturbed / f"checkpoints/step-{step:08d}/model.safetensors") for step in (6, 12))
    for prefix in ("encoder.vit.", "teacher_encoder.vit."):
        names = [name for name in start if not name.startswith("patch_embed.")]
        assert all(torch.equal(frozen[prefix + name], start[name]) for name in names)
        assert not torch.equal(thawed[f"{prefix}blocks.0.attn.qkv.weight"], start["blocks.0.attn.qkv.weight"])
    words = command(photo_folder, run, *flags, objective="dino")
    for step in (5, 7, 10):
        kill_at(words, step)
    finish(words)
    assert same(weights(undisturbed), weights(run)) == []
    assert losses(run) == losses(undisturbed)


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM, signal.SIGUSR1]
)
def test_a_signal_to_the_whole_group_saves_although_workers_get_it_too(
    photo_folder: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    words = command(photo_folder, run, "--data.num_workers=2")
    with Launch(words) as launched:
        launched.wait_for("step 4/")
        launched.send(number, to_group=True)
        assert launched.join() == [128 + number]
        assert "Traceback" not in launched.errors()
        assert re.search(r"Stopped by a signal at step \d+ of 12 and saved", launched.printed())
    finish(words)
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(whole).items())


@pytest.mark.parametrize("objective", ["mae", pytest.param("dino", marks=pytest.mark.slow), "dinov2"])
def test_two_processes_learn_what_one_learns(photo_folder: Path, tmp_path: Path, objective: str) -> None:
    """Centre (DINO), Sinkhorn-Knopp and KoLeo (DINOv2) are over all processes."""
    flags = ["--encoder.drop_path_rate=0"]  # what is drawn on the device may depend on the process
    # Sinkhorn-Knopp and KoLeo are over a micro-batch, so DINOv2 has only one.
    micro = {"mae": 2, "dino": 2, "dinov2": 1}[objective]
    one, two = tmp_path / "one", tmp_path / "two"
    finish(command(photo_folder, one, *flags, objective=objective))
    cut = f"--batch.per_device={4 // micro}"
    text = finish(command(photo_folder, two, *flags, cut, objective=objective), num_processes=2)
    assert "2 processes on cpu" in text
    assert f"8 = 2 processes x {micro} micro-batch" in text
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    expected, found = weights(one), weights(two)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if not name.startswith("optimizer "):
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-4)


def test_two_processes_continue_from_weights_as_one_does(photo_folder: Path, whole: Path, tmp_path: Path) -> None:
    flags = [f"--encoder.pretrained={whole}", "--optim.freeze_backbone_until=0.25", "--objective.anchor=gram"]
    flags.append("--encoder.drop_path_rate=0")
    one, two = tmp_path / "one", tmp_path / "two"
    finish(command(photo_folder, one, *flags, objective="dino"))
    text = finish(command(photo_folder, two, *flags, "--batch.per_device=2", objective="dino"), num_processes=2)
    assert "8 = 2 processes x 2 micro-batch" in text
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    anchors = [json.loads(line)["loss_anchor"] for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert anchors[0] == pytest.approx(0, abs=1e-6)
    assert anchors[-1] > 1e-6


def test_two_processes_are_judged_as_one(photo_folder: Path, tmp_path: Path) -> None:
    """All processes encode, the main one scores, in the middle of training and at its end."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--encoder.drop_path_rate=0", "--data.label_column=null", "--evaluation.every_steps=6"]
    finish(command(photo_folder, one, *flags))
    text = finish(command(photo_folder, two, *flags, "--evaluation.batch_size=7"), num_processes=2)
    assert "2 processes on cpu" in text
    assert text.count("accuracy, %") == text.count("step 6  knn") == 1
    scores = [json.loads((run / "results.json").read_text())["scores"] for run in (one, two)]
    assert scores[0]["raw pixels"] == scores[1]["raw pixels"]
    for name in ("untrained", "trained"):
        assert scores[0][name]["knn"]["accuracy"] == pytest.approx(scores[1][name]["knn"]["accuracy"], abs=0.051)
