"""Runs from trained weights: scored before their first step, told when they fall below it, and ended with the best."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts.pretrain_mae import DEFAULTS
from ssl_vit.evaluation.scores import Score
from ssl_vit.export.run import export_run
from ssl_vit.models.encoder import Encoder
from ssl_vit.runs.checkpoint import list_checkpoints
from ssl_vit.runs.trained import open_trained
from ssl_vit.training import ending
from ssl_vit.training.config import parse_run
from tests.interrupted import killed_after

EVERY = ("--evaluation.every_steps=2", "--checkpoint.every_steps=100", "--checkpoint.keep=1")


def scores_of(run: Path, name: str = "eval_knn") -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Scores that are given: of the start 80 of 100 images, then as many as the list says at each evaluation.

    Whether an encoder is the start's is told by its weights; those of other steps follow in turn.
    """
    right: list[int] = []
    known: dict[float, int] = {}

    def evaluate(encoder: Encoder, *_: object) -> dict[str, Score]:
        key = sum(parameter.double().sum().item() for parameter in encoder.parameters())
        return given(known.setdefault(key, right[len(known)]) if key not in known else known[key])

    def given(count: int) -> dict[str, Score]:
        labels = torch.arange(100).numpy() % 2
        predictions = labels.copy()
        predictions[count:] = 1 - labels[count:]
        return {name: Score.of(labels, predictions) for name in ("knn", "linear")}

    monkeypatch.setattr(ending, "_evaluate", evaluate)
    monkeypatch.setattr(ending, "evaluate_pixels", lambda *_, **__: given(50))  # of the same images
    return right


@pytest.fixture
def first(start: Callable[..., int], tmp_path: Path) -> Path:
    """Weights to start from."""
    assert start(name="first", steps=2) == 0
    return tmp_path / "first"


def test_the_best_step_is_exported_and_the_last_goes_on(
    start, first: Path, scripted: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    scripted += [80, 78, 90, 60, 61]  # at steps 0, 2, 4, 6 and 7, the last
    flags = (f"--encoder.pretrained={first}", *EVERY, "--checkpoint.keep_best=knn")
    assert start(*flags, steps=7, labels=True) == 0
    said = capsys.readouterr().out
    assert scores_of(run) == {0: 0.8, 2: 0.78, 4: 0.9, 6: 0.6, 7: 0.61}
    assert "best       step 4, knn 90.0 %: its weights are exported and scored, not those of step 7" in said
    assert said.count("WARNING: at step 6 k-NN is 60.0 %, 20.0 points below the weights that the run started from") == 1
    assert "at step 7 k-NN" not in said
    assert [folder.name for folder in list_checkpoints(run)] == ["step-00000004", "step-00000007"]

    best = load_file(run / "checkpoints/step-00000004/model.safetensors")
    exported = load_file(run / "backbone.safetensors")
    assert all(torch.equal(value, best[f"encoder.vit.{name}"]) for name, value in exported.items())
    known = json.loads((run / "config.json").read_text())["ssl_vit"]
    assert known["best"] == {"by": "knn", "value": 0.9, "step": 4, "of_steps": 7}
    assert known["steps"] == 4
    results = json.loads((run / "results.json").read_text())
    assert results["step"] == 7
    assert results["best"] == {"by": "knn", "value": 0.9, "step": 4}
    assert results["scores"]["pretrained"]["knn"]["accuracy"] == 0.8
    assert results["scores"]["trained"]["knn"]["accuracy"] == 0.9
    assert open_trained(run, "best").provenance["steps"] == 4
    for weights in ("best", None):
        trained = open_trained(run, weights).provenance
        assert (trained["steps"], trained["best"]) == (4, known["best"])
    assert open_trained(run / "checkpoints/step-00000007").provenance["steps"] == 7
    before = {name: (run / name).read_bytes() for name in ("backbone.safetensors", "config.json")}
    export_run(run)
    assert before == {name: (run / name).read_bytes() for name in before}

    scripted += [95]
    assert start(*flags, "--extend=true", steps=9, labels=True) == 0  # from the last weights, not from the best
    assert "step-00000007, step 7 of 9" in capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert "best" not in results  # they are the last
    assert results["scores"]["trained"]["knn"]["accuracy"] == 0.95
    assert open_trained(run).provenance["steps"] == 9


@pytest.mark.parametrize("done", [1, 5])
def test_the_best_survives_a_kill(start, first: Path, scripted: list[int], tmp_path: Path, done: int) -> None:
    scripted += [80, 90, 60, 61]  # at steps 0, 2, 4 and 6
    flags = (f"--encoder.pretrained={first}", *EVERY, "--checkpoint.keep_best=linear", "--data.num_workers=0")
    with killed_after(done):
        start(*flags, steps=6, labels=True)
    assert start(*flags, steps=6, labels=True) == 0
    run = tmp_path / "run"
    assert scores_of(run) == {0: 0.8, 2: 0.9, 4: 0.6, 6: 0.61}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 6 + 4  # nothing twice
    assert json.loads((run / "results.json").read_text())["best"] == {"by": "linear", "value": 0.9, "step": 2}


def test_a_step_that_was_killed_before_its_scores_is_scored(
    start, first: Path, scripted: list[int], tmp_path: Path
) -> None:
    """Between its checkpoint and its evaluation."""
    run = tmp_path / "run"
    scripted += [80, 90, 60]
    flags = (f"--encoder.pretrained={first}", "--evaluation.every_steps=2", "--checkpoint.every_steps=2")
    with killed_after(2):
        start(*flags, steps=4, labels=True)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert "eval_knn" in lines[-1]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines[:-1]))
    assert start(*flags, steps=4, labels=True) == 0
    assert scores_of(run) == {0: 0.8, 2: 0.9}


def test_without_labels_the_log_decides(start, first: Path, tmp_path: Path) -> None:
    flags = (f"--encoder.pretrained={first}", "--checkpoint.keep_best=rankme", "--checkpoint.every_steps=1")
    assert start(*flags, "--checkpoint.keep=2", steps=5, objective="dino") == 0
    run = tmp_path / "run"
    values = scores_of(run, "rankme")
    best = max(values, key=lambda step: (values[step], -step))
    kept = {int(folder.name[-8:]) for folder in list_checkpoints(run)}
    assert kept == {best, 4, 5}
    known = json.loads((run / "config.json").read_text())["ssl_vit"]
    assert known["steps"] == best
    exported = load_file(run / "backbone.safetensors")
    tensors = load_file(run / f"checkpoints/step-{best:08d}/model.safetensors")
    assert all(torch.equal(value, tensors[f"teacher_encoder.vit.{name}"]) for name, value in exported.items())


def test_a_run_from_fresh_weights_has_no_start_to_be_scored(start, scripted: list[int], tmp_path: Path) -> None:
    scripted += [70, 60, 60, 60, 60]
    assert start(*EVERY, steps=3, labels=True) == 0
    assert scores_of(tmp_path / "run") == {2: 0.7}


def test_what_cannot_be_kept_is_refused(start) -> None:
    with pytest.raises(ValueError, match=r"^checkpoint.keep_best='knn': needs scores during training; set evaluation"):
        parse_run(DEFAULTS, ["--checkpoint.keep_best=knn"])
    with pytest.raises(ValueError, match=r"^checkpoint.keep_best='knn': there are no labelled images"):
        start("--checkpoint.keep_best=knn", "--evaluation.every_steps=1")
    with pytest.raises(ValueError, match=r"^checkpoint.keep_best='rankme': MAE logs none"):
        start("--checkpoint.keep_best=rankme")
