import json
from pathlib import Path

import pytest
import torch

from ssl_vit.metrics import CollapseAlarm, MetricLog, forget_after


def run(path: Path, losses: list[float], start_step: int = 0) -> None:
    log = MetricLog(
        path, start_step=start_step, num_steps=start_step + len(losses), batch_size=8, log_every=2, is_writer=True
    )
    for loss in losses:
        log.add_data_wait(0.0)
        log.add_step({"loss": torch.tensor(loss)})
        if log.is_due():
            log.write_interval({"lr": 0.1}, progress=0.5)
    log.close()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_means_between_log_steps_and_the_last_step_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "metrics.jsonl", [1.0, 3.0, 5.0, 7.0, 9.0])
    records = read(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == [(2, 2.0), (4, 6.0), (5, 9.0)]
    assert all(record["images_per_second"] > 0 and record["data_wait"] == 0 for record in records)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "step 2/5  loss 2.0000  lr 1.00e-01" in lines[0]
    assert "left" in lines[0]


def test_steps_that_were_not_taken_are_left_out_of_the_averages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.jsonl"
    log = MetricLog(path, start_step=0, num_steps=4, batch_size=8, log_every=2, is_writer=True)
    for loss, taken in ((1.0, True), (float("nan"), False), (float("inf"), False), (2.0, False)):
        log.add_step({"loss": torch.tensor(loss)}, taken)
        if log.is_due():
            log.write_interval({"lr": 0.1}, progress=0.5)
    log.close()
    first, second = read(path)
    assert (first["step"], first["loss"]) == (2, 1.0)
    assert second["step"] == 4
    assert "loss" not in second
    assert "loss none (all steps skipped)" in capsys.readouterr().out


def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "m.jsonl", start_step=0, num_steps=1, batch_size=4, log_every=1, is_writer=True)
    log.write({"step": 1, "grad_norm": float("inf")})
    assert read(tmp_path / "m.jsonl") == [{"step": 1, "grad_norm": None}]


def test_the_alarm_is_raised_once_until_all_has_been_well_for_a_while() -> None:
    alarm = CollapseAlarm(patience=2, calm=3)
    signs = ["x", None, "x", "x", "x", None, "x", "x", None, None, None, "x", "x", "x"]
    assert [place for place, sign in enumerate(signs) if alarm.raised(sign)] == [3, 12]


def test_steps_that_are_done_again_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"step": 8, "los')
    forget_after(path, 4)
    assert [record["step"] for record in read(path)] == [2, 4]


def test_a_resumed_log_reads_as_if_never_interrupted(tmp_path: Path) -> None:
    run(tmp_path / "a.jsonl", [1.0] * 8)
    run(tmp_path / "b.jsonl", [1.0] * 6)
    run(tmp_path / "b.jsonl", [1.0] * 4, start_step=4)
    assert [r["step"] for r in read(tmp_path / "a.jsonl")] == [r["step"] for r in read(tmp_path / "b.jsonl")]
