import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from ssl_vit.runs.folder import write_heartbeat
from ssl_vit.training import ending
from ssl_vit.training.signals import EXIT_STOPPED, OUT_OF_TIME
from tests.conftest import last_weights


def read(run: Path) -> dict:
    return json.loads((run / "heartbeat.json").read_text())


def test_a_heartbeat_says_what_the_run_does_and_when(tmp_path: Path) -> None:
    write_heartbeat(tmp_path, "training", 3, 10, 12.5)
    write_heartbeat(tmp_path, "finished", 10, 10)
    values = read(tmp_path)
    assert (values["state"], values["step"], values["num_steps"], values["images_per_second"]) == (
        "finished",
        10,
        10,
        None,
    )
    assert abs((datetime.now(timezone.utc) - datetime.fromisoformat(values["time"])).total_seconds()) < 60
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]


def test_a_heartbeat_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    write_heartbeat(tmp_path / "nowhere", "training", 3, 10)
    assert list(tmp_path.iterdir()) == []


def test_a_run_tells_all_that_it_does(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        "ssl_vit.training.setup.write_heartbeat", lambda folder, state, step, *rest: seen.append((state, step))
    )
    for name in ("evaluate_in_training", "finish"):  # which take longer than all the rest
        monkeypatch.setattr(ending, name, lambda *_: None)
    start("--evaluation.every_steps=2", "--log_every=3", labels=True, steps=3)
    assert seen == [
        ("starting", 0),
        ("training", 0),
        ("evaluating", 2),
        ("training", 3),
        ("finishing", 3),
        ("finished", 3),
    ]


def test_a_run_out_of_time_saves_and_goes_on_later(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(steps=3, name="whole")
    run = tmp_path / "run"
    for step in (1, 2, 3):
        assert start("--max_hours=1e-9", steps=3) == EXIT_STOPPED[OUT_OF_TIME] == 75
        assert f"Stopped after 1e-09 hours at step {step} of 3 and saved" in capsys.readouterr().out
        assert (read(run)["state"], read(run)["step"]) == ("stopped", step)
    assert start("--max_hours=1", steps=3) == 0
    assert read(run)["state"] == "finished"
    assert all(torch.equal(value, last_weights(run)[name]) for name, value in last_weights(tmp_path / "whole").items())
