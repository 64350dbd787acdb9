"""What a run makes beside its weights fails in every way, and the run ends well."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ssl_vit.objectives.mae import MAE
from ssl_vit.training import ending, faults
from ssl_vit.training.faults import by_product
from tests.conftest import last_weights

Start, Patch, Capture = Callable[..., int], pytest.MonkeyPatch, pytest.CaptureFixture[str]


def fails(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


ERRORS = [ImportError("no backend"), MemoryError(), OSError(28, "No space left on device"), AttributeError("font")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_fails_is_left_out_in_one_line(error: Exception) -> None:
    said: list[str] = []
    with by_product("figure", said.append):
        raise error
    assert len(said) == 1
    assert said[0].startswith(f"WARNING: figure left out: {type(error).__name__}")


def test_one_of_several_processes_does_not_go_on_without_the_others(monkeypatch: Patch) -> None:
    monkeypatch.setattr(faults, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="mine"), by_product("scores", shared=True):
        raise ValueError("mine")
    with by_product("figure"):
        raise ValueError("of the main process alone")
    with pytest.raises(KeyboardInterrupt), by_product("figure"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("broken", "left_out", "scored"),
    [
        ((MAE, "preview"), "figure", {"raw pixels", "untrained", "trained"}),
        ((ending, "evaluate_pixels"), "scores of raw pixels", {"untrained", "trained"}),
        ((ending, "evaluate_encoder"), "scores", None),
    ],
    ids=["figure", "baseline", "scores"],
)
def test_a_run_ends_without_what_fails_at_its_end(
    start: Start, tmp_path: Path, monkeypatch: Patch, capsys: Capture, broken: tuple, left_out: str, scored: set | None
) -> None:
    monkeypatch.setattr(*broken, fails(RuntimeError("out of memory")))
    assert start("--evaluation.every_steps=1", "--evaluation.pictures_every_steps=1", steps=2, labels=True) == 0
    text = capsys.readouterr().out
    assert f"WARNING: {left_out}" in text
    assert "RuntimeError: out of memory" in text
    run = tmp_path / "run"
    found = json.loads((run / "results.json").read_text())
    assert (found["scores"] if scored is None else set(found["scores"])) == scored
    assert (run / "backbone.safetensors").exists()
    assert json.loads((run / "heartbeat.json").read_text())["state"] == "finished"


def test_what_fails_in_training_changes_no_weight(start: Start, tmp_path: Path, monkeypatch: Patch) -> None:
    flags = ("--evaluation.every_steps=1", "--evaluation.pictures_every_steps=1", "--encoder.drop_path_rate=0.2")
    start(*flags, name="whole", steps=3, labels=True)
    monkeypatch.setattr(ending, "evaluate_encoder", fails(RuntimeError("out of memory")))
    monkeypatch.setattr(MAE, "preview", fails(ImportError("matplotlib")))
    assert start(*flags, steps=3, labels=True) == 0
    weights = last_weights(tmp_path / "run")
    assert all((value == weights[name]).all() for name, value in last_weights(tmp_path / "whole").items())


def test_scores_that_were_asked_for_are_no_by_product(start: Start, photo_folder: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(ending, "_readable", fails(ValueError("cannot be scored")))
    with pytest.raises(ValueError, match="cannot be scored"):
        start(f"--evaluation.source={photo_folder}", steps=1, labels=True)


@pytest.mark.parametrize("broken", ["start", "log", "log_images", "finish"])
def test_a_tracker_that_fails_is_done_without(
    start: Start, tmp_path: Path, monkeypatch: Patch, capsys: Capture, broken: str
) -> None:
    from accelerate.tracking import TensorBoardTracker

    monkeypatch.setattr(TensorBoardTracker, broken, fails(ConnectionError("no server")))
    assert start("--tracking=tensorboard", "--evaluation.pictures_every_steps=1", steps=2) == 0
    assert capsys.readouterr().out.count("left out: ConnectionError: no server") == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
