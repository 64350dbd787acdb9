import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import termios
from pathlib import Path

import pytest
import torch

from ssl_vit.training.observe.metrics import CollapseAlarm, MetricLog, forget_after
from tests.processes import SERVER, redirect_output


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
        log.add_step({"loss": torch.tensor(loss)}, torch.tensor(taken))
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


def progress(path: Path, start_step: int = 0, **settings: bool) -> None:
    log = MetricLog(path, start_step=start_step, num_steps=8, batch_size=4, log_every=1, is_writer=True, **settings)
    for value in (None, 0.25, None):
        log.add_step({"loss": torch.tensor(1.0)})
        log.write_interval({"lr": 0.1}, progress=0.5)
        if value is not None:
            log.write({"step": log.step, "eval_knn": value})
    log.close()


def test_the_last_knn_stands_in_the_line_also_after_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    progress(tmp_path / "m.jsonl")
    lines = capsys.readouterr().out.splitlines()
    assert ["k-NN" in line for line in lines] == [False, False, True]
    assert "k-NN 25.0%  " in lines[-1]
    assert lines[-1].endswith(" left")
    progress(tmp_path / "m.jsonl", start_step=3)
    assert "k-NN 25.0%" in capsys.readouterr().out.splitlines()[0]


def test_a_quiet_log_is_written_and_not_shown(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    progress(tmp_path / "m.jsonl", quiet=True)
    assert len(read(tmp_path / "m.jsonl")) == 4
    assert capfd.readouterr() == ("", "")


def test_the_bar_on_a_terminal_has_rate_time_left_and_no_colours(tmp_path: Path) -> None:
    """Through a real terminal, since only there is a bar drawn."""
    text = in_terminal(tmp_path / "m.jsonl")
    assert re.search(r"3/8 \[\d\d:\d\d<\d\d:\d\d,.*loss 1.0000, \d+ images/s, 0% waiting for data, k-NN 25.0%", text)
    assert not re.search(r"\x1b\[[0-9;]*m", text)


def _progress_at(terminal: str, path: Path) -> None:
    redirect_output(Path(terminal), Path(terminal))
    os.environ["NO_COLOR"] = "1"
    progress(path)


def in_terminal(path: Path) -> str:
    """Return what a log writes to a terminal 200 wide."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    process = SERVER.Process(target=_progress_at, args=(os.ttyname(slave), path))
    process.start()
    process.join(timeout=60)
    os.close(slave)
    text = b""
    with contextlib.suppress(OSError):  # what a closed terminal gives
        while part := os.read(master, 65536):
            text += part
    os.close(master)
    assert process.exitcode == 0, text
    return text.decode()
