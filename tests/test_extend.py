"""Runs that are lengthened: what their schedules do, and that it follows from what is stored."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from ssl_vit.core.schedules import progress_at
from ssl_vit.export.card import write_card
from ssl_vit.runs.record import read_run
from ssl_vit.runs.trained import open_trained
from ssl_vit.training.config import parse_run
from ssl_vit.training.loop import set_up, train
from ssl_vit.training.signals import StopSignal
from tests.conftest import OBJECTIVES, last_weights, losses
from tests.data.shards import write_parquet

Start, Patch, Capture = Callable[..., int], pytest.MonkeyPatch, pytest.CaptureFixture[str]


def test_progress_is_what_it_was_without_a_lengthening() -> None:
    assert [progress_at(step, 7) for step in range(8)] == [step / 7 for step in range(8)]


@pytest.mark.parametrize(
    ("extended", "num_steps", "wanted"),
    [
        ([[4, 4]], 6, [0, 0.25, 0.5, 0.75, 0, 0.5, 1]),  # was finished: anew
        ([[2, 4]], 6, [0, 0.25, 0.5, 0.625, 0.75, 0.875, 1]),  # was under way: stretched
        ([[2, 4], [4, 6]], 8, [0, 0.25, 0.5, 0.625, 0.75, 0.8125, 0.875, 0.9375, 1]),
        ([[2, 4], [6, 6]], 8, [0, 0.25, 0.5, 0.625, 0.75, 0.875, 0, 0.5, 1]),
        ([[2, 2], [3, 4]], 5, [0, 0.5, 0, 0.5, 0.75, 1]),
    ],
)
def test_progress_of_a_lengthened_run(extended: list, num_steps: int, wanted: list[float]) -> None:
    assert [progress_at(step, num_steps, extended) for step in range(num_steps + 1)] == wanted


def stop_at(monkeypatch: Patch, step: int) -> None:
    """Let a signal come in a run's step, counted from its start."""
    count = 0

    def agreed(_: StopSignal) -> int:
        nonlocal count
        count += 1
        return 15 if count == step else 0

    monkeypatch.setattr(StopSignal, "agreed", agreed)


def values(run: Path, name: str) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record[name] for record in records if name in record]


@pytest.mark.parametrize(
    ("objective", "at", "streamed"),
    [("mae", 4, False), ("mae", 2, True), pytest.param("mae", 4, True, marks=pytest.mark.slow), ("dino", 3, False)],
)
def test_a_lengthened_run_is_killed_goes_on_and_is_repeated_by_its_config(
    start: Start, tmp_path: Path, monkeypatch: Patch, capsys: Capture, objective: str, at: int, streamed: bool
) -> None:
    """Finished after 4 steps, or stopped on the way to them, and lengthened to 7: bit for bit the same each time."""
    whole, killed, source = tmp_path / "whole", tmp_path / "killed", ()
    if streamed:
        shards = write_parquet(tmp_path / "shards", [9, 1, 5, 5])
        source = (f"--data.source={shards}", "--data.streaming=true", "--data.shuffle_buffer=8", "--data.num_readers=2")
    for run in (whole, killed):
        with monkeypatch.context() as patched:
            stop_at(patched, at if at < 4 else 0)
            assert start(*source, name=run.name, steps=4, objective=objective) == (143 if at < 4 else 0)
    with pytest.raises(ValueError, match=r"steps 4 -> 7.*--extend true lengthens it"):
        start(*source, name="whole", steps=7, objective=objective)
    capsys.readouterr()
    assert start(*source, "--extend=true", name="whole", steps=7, objective=objective) == 0
    text = capsys.readouterr().out
    assert f"lengthened at step {at} of 4: schedules" in text
    assert ("begin anew" in text) is (at == 4)
    assert json.loads((whole / "results.json").read_text())["step"] == 7
    sessions = json.loads((whole / "provenance.json").read_text())["sessions"]
    assert [(session["step"], session["num_steps"]) for session in sessions] == [(0, 4), (at, 7)]
    wanted = [progress_at(step, 7, [[at, 4]]) for step in range(7)]
    assert values(whole, "progress") == wanted
    assert yaml.safe_load((whole / "config.yaml").read_text())["extended"] == [[at, 4]]

    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        assert start(*source, "--extend=true", name="killed", steps=7, objective=objective) == 143
    assert start(*source, "--extend=true", name="killed", steps=7, objective=objective) == 0  # the same command
    AcceleratorState._reset_state()
    again = ["--config", str(whole / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert train(set_up(parse_run(OBJECTIVES[objective][0], again))) == 0
    for run in (killed, tmp_path / "again"):
        assert losses(run) == losses(whole)
        assert all(torch.equal(value, last_weights(run)[name]) for name, value in last_weights(whole).items())


@pytest.mark.parametrize(
    ("length", "longer"),
    [(("--steps=3",), ("--steps=7",)), (("--steps=null", "--epochs=.6"), ("--steps=null", "--epochs=1.4"))],
)
@pytest.mark.usefixtures("quick_scores")
def test_a_lengthened_run_has_no_scores_until_its_new_end(
    start: Start, tmp_path: Path, monkeypatch: Patch, length: tuple[str, ...], longer: tuple[str, ...]
) -> None:
    def card(path: Path) -> str:
        trained = open_trained(path)
        return write_card(
            trained, library="timm", loading_code="", difference=0.0, proved_on="images", license="unknown"
        )

    run = tmp_path / "run"
    assert start(*length, labels=True) == 0
    assert read_run(run).results is not None
    assert read_run(run).scores
    assert "| results.json |" in card(run)
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        assert start("--extend=true", *longer, labels=True) == 143
    found = read_run(run)
    assert (found.results, found.scores) == (None, [])
    assert open_trained(run).provenance["steps"] == 5
    assert "| results.json |" not in card(run)
    assert "Left out, since of other weights: results.json." in card(run)
    assert "| results.json |" in card(run / "checkpoints" / "step-00000003")


def test_a_run_lengthened_again_before_it_took_a_step_has_a_new_end_alone(
    start: Start, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    start(steps=2)
    with monkeypatch.context() as patched:
        patched.setattr("ssl_vit.training.setup.build_optimizer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            start("--extend=true", steps=3)
    capsys.readouterr()
    assert start("--extend=true", steps=4) == 0
    assert "lengthened at step 2 of 2" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["extended"] == [[2, 2]]
    assert start(steps=4) == 0  # without the flag: it is this long now
    assert "This run is finished" in capsys.readouterr().out


def test_what_cannot_be_lengthened_is_refused(start: Start, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"extend=True: output_dir=.* holds no run to lengthen"):
        start("--extend=true")
    start(steps=2)
    with pytest.raises(ValueError, match="extend=True: 1 steps are fewer than the 2"):
        start("--extend=true", steps=1)
    with pytest.raises(ValueError, match="seed 0 -> 1"):
        start("--extend=true", "--seed=1", steps=3)
    with pytest.raises(ValueError, match="leave one of them out"):
        start("--extend=true", "--fresh", steps=3)
    with pytest.raises(ValueError, match=r"extended=.*: is written by --extend"):
        start("--extended=[[5,3]]", steps=6, name="other")
    with pytest.raises(ValueError, match=r"extend=True: steps=2 wins over epochs=9\.0; give more steps"):
        start("--extend=true", "--epochs=9", steps=2)
    with pytest.raises(ValueError, match=r"lengthened at step 3, and this one has 3; give it more"):
        start("--extended=[[3,3]]", steps=3, name="other")  # as in the config.yaml of a lengthened run


def test_a_run_of_epochs_is_lengthened_by_epochs_and_keeps_what_auto_became(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start("--steps=null", "--epochs=0.4", objective="dino")
    before = yaml.safe_load((run / "config.yaml").read_text())
    assert start("--extend=true", "--steps=null", "--epochs=1", objective="dino") == 0
    after = yaml.safe_load((run / "config.yaml").read_text())
    assert (before["objective"], before["optim"]) == (after["objective"], after["optim"])
    assert (after["epochs"], after["extended"]) == (1.0, [[2, 2]])
    assert len(losses(run)) == 5


def test_images_that_come_or_go_change_no_length(
    start: Start, photo_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    images = tmp_path / "images"
    shutil.copytree(photo_folder, images)
    flags = ("--steps=null", "--epochs=0.8", f"--data.source={images}")
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        assert start(*flags) == 143
    first = sorted(images.rglob("*.png"))[:20]
    for path in first:
        path.with_name(f"again_{path.name}").write_bytes(path.read_bytes())
    capsys.readouterr()
    assert start(*flags) == 0
    assert "images came or went: 0.8 epochs are 6 steps now, and the run keeps its own" in capsys.readouterr().out
    assert len(losses(tmp_path / "run")) == 4
    assert start("--extend=true", *flags) == 0
    assert len(losses(tmp_path / "run")) == 6
    for path in first:
        path.with_name(f"again_{path.name}").unlink()
    with pytest.raises(ValueError, match="are 4 steps of today's images, fewer than the 6"):
        start("--extend=true", *flags)
