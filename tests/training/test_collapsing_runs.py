"""What a run does when its features collapse."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ssl_vit.export.card import write_card
from ssl_vit.export.run import export_run
from ssl_vit.objectives.mae import MAE
from ssl_vit.runs.best import Best
from ssl_vit.runs.checkpoint import list_checkpoints
from ssl_vit.runs.trained import open_trained
from tests.conftest import losses

pytestmark = pytest.mark.usefixtures("_fresh_state")


COLLAPSING = ("--objective.centering=none", "--objective.ema_momentum=0", "--objective.ema_momentum_end=0")


def test_collapse_is_warned_of_once_and_stops_the_run_where_asked(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*COLLAPSING, "--objective.freeze_last_layer=0")
    assert start(*flags, steps=60, objective="dino", name="warned") == 0
    assert capsys.readouterr().out.count("WARNING: collapse") == 1
    assert start(*flags, "--on_collapse=stop", steps=60, objective="dino") == 3
    text = capsys.readouterr().out
    assert "WARNING: collapse at step" in text
    assert ". objective.ema_momentum 0 makes" in text
    assert "(--on_collapse stop), saved" in text
    assert len(list_checkpoints(tmp_path / "run")) == 1


def test_a_run_that_stopped_at_a_collapse_goes_on_only_where_told_and_says_so_to_the_end(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MAE, "diagnose", lambda self, values, run: "All alike." if values["step"] < 5 else None)
    run = tmp_path / "run"
    assert start("--on_collapse=stop", steps=9) == 3
    assert json.loads((run / "heartbeat.json").read_text())["step"] == 4
    for flags in ((), ("--extend=true",)):
        assert start("--on_collapse=stop", *flags, steps=9 + len(flags)) == 3
        text = capsys.readouterr().out
        assert "This run stopped since it collapsed at step 4. All alike." in text
        assert "--on_collapse warn goes on" in text
        assert json.loads((run / "heartbeat.json").read_text())["state"] == "stopped"
    assert len(losses(run)) == 4
    assert start("--on_collapse=warn", steps=10) == 0
    assert "WARNING: the features of this backbone collapsed at step 4. All alike." in capsys.readouterr().out
    assert json.loads((run / "results.json").read_text())["collapse"] == "step 4. All alike."
    assert json.loads((run / "config.json").read_text())["ssl_vit"]["collapse"] == "step 4. All alike."
    export_run(run)
    trained = open_trained(run)
    assert trained.provenance["collapse"] == "step 4. All alike."
    told = {"library": "timm", "loading_code": "", "difference": 0.0, "proved_on": "x", "license": "mit"}
    assert "| warning | its features collapsed at step 4. All alike. |" in write_card(trained, **told)
    assert start("--on_collapse=stop", steps=10) == 0  # is finished, warning and all


def test_a_collapse_that_is_over_is_not_told_at_the_end(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MAE, "diagnose", lambda self, values, run: "All alike." if values["step"] < 5 else None)
    assert start(steps=15) == 0
    text = capsys.readouterr().out
    assert text.count("collapse at step 4. All alike.") == 1
    assert "no sign of collapse in the last 10 log intervals" in text
    assert "collapse" not in json.loads((tmp_path / "run" / "results.json").read_text())


def test_a_collapse_after_the_best_step_is_not_that_of_what_is_exported(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MAE, "diagnose", lambda self, values, run: "All alike." if values["step"] > 2 else None)
    monkeypatch.setattr(
        "ssl_vit.training.loop.best_checkpoint", lambda run, _: Best(list_checkpoints(run)[0], "loss", 0)
    )
    assert start("--checkpoint.keep_best=loss", "--checkpoint.every_steps=1", "--checkpoint.keep=9", steps=9) == 0
    assert "collapse at step 5. All alike." in (text := capsys.readouterr().out)
    assert "features of this backbone collapsed" not in text
    assert "collapse" not in json.loads((tmp_path / "run" / "results.json").read_text())


@pytest.mark.slow
def test_a_healthy_run_is_not_warned_of(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--optim.base_lr=0.0032", "--objective.color_jitter_prob=0", "--objective.blur_prob=[0,0,0]")
    assert start("--on_collapse=stop", *flags, steps=60, objective="dino") == 0
    assert "WARNING" not in capsys.readouterr().out
