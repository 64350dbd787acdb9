"""A trace of some steps: what it says adds up, and nothing that is learned follows from it."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssl_vit.training.config import parse_run
from ssl_vit.training.observe.metrics import MetricLog
from ssl_vit.training.observe.profiling import (
    OTHER,
    PARTS,
    SUMMARY_FILE,
    TRACE_FILE,
    WARMUP,
    Kernel,
    StepTrace,
    busy,
    compare,
    name_kernels,
)
from tests.conftest import OBJECTIVES, last_weights, losses


def shares(lines: list[str]) -> dict[str, float]:
    """The share of each part in a summary's lines, in percent."""
    found = (re.fullmatch(r"  (\D+?) +([\d.]+) ms +([\d.]+)%", line) for line in lines)
    return {match[1]: float(match[3]) for match in found if match}


@pytest.mark.parametrize("objective", ["mae", "dino"])
def test_a_traced_run_learns_the_same_and_leaves_trace_and_summary(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    plain = ["--batch.per_device=4", "--checkpoint.every_steps=4"]
    assert start(*plain, name="plain", objective=objective, steps=8) == 0
    assert "profile of" not in capsys.readouterr().out
    assert start(*plain, "--profile=2", name="traced", objective=objective, steps=8) == 0
    out = capsys.readouterr().out
    assert losses(tmp_path / "plain") == losses(tmp_path / "traced")
    weights = last_weights(tmp_path / "traced")
    assert all(torch.equal(value, weights[name]) for name, value in last_weights(tmp_path / "plain").items())

    assert not (tmp_path / "plain" / TRACE_FILE).exists()
    lines = (tmp_path / "traced" / SUMMARY_FILE).read_text().splitlines()
    assert "\n".join(lines) in out
    assert len(lines) <= 10
    assert re.fullmatch(r"profile of 2 steps: [\d.]+ ms a step", lines[0])
    assert re.match(r"while traced: [\d.]+ ms a step", lines[-2])
    found = shares(lines)
    assert list(found) == [*PARTS, OTHER]
    assert sum(found.values()) == pytest.approx(100, abs=0.5)  # each is rounded
    assert all(share > 0 for name, share in found.items() if name != "after step" or objective == "dino")

    with gzip.open(tmp_path / "traced" / TRACE_FILE, "rt") as file:
        events = json.load(file)["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    # Two steps of two micro-batches, the second of which is saved.
    assert {name: ranges.count(name) for name in PARTS} == {
        "data wait": 4,
        "forward": 4,
        "backward": 4,
        "optimizer": 2,
        "after step": 2,
        "checkpoint": 1,
    }


def test_a_run_that_ends_early_is_summed_up_with_the_steps_it_has(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--profile=99", name="short", steps=WARMUP + 1) == 0
    assert (tmp_path / "short" / SUMMARY_FILE).read_text().startswith("profile of 1 steps")
    assert "too few steps to trace any" in capsys.readouterr().out
    assert start("--profile=1", name="none", steps=WARMUP) == 0
    assert "too few steps to trace any" in capsys.readouterr().out
    assert not (tmp_path / "short" / TRACE_FILE).exists()
    assert not (tmp_path / "none" / SUMMARY_FILE).exists()


def test_a_run_goes_on_with_a_trace_that_it_began_without(start: Callable[..., int], tmp_path: Path) -> None:
    assert start("--max_hours=1e-9", steps=7) == 75
    assert start("--profile=1", steps=7) == 0
    assert (tmp_path / "run" / TRACE_FILE).exists()


def test_a_disk_that_is_full_for_the_trace_does_not_end_the_run(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssl_vit.training.observe.profiling.replace_text", full)
    assert start("--profile=1") == 0
    assert f"{TRACE_FILE} left out: OSError: [Errno 28] No space left on device" in capsys.readouterr().out
    assert len(losses(tmp_path / "run")) == 6


def test_a_gpu_is_busy_while_any_kernel_runs() -> None:
    kernels = [Kernel("b", 50, 20), Kernel("a", 0, 30), Kernel("a", 10, 30), Kernel("c", 55, 5)]
    assert busy(kernels) == 40 + 20
    assert name_kernels(kernels, 100e-6) == "GPU busy 60.0% of the traced time; most in a 60.0%, b 20.0%, c 5.0%"
    long = [Kernel("void at::native::elementwise<4, float>(int, float)", 0, 1)]
    assert "most in at::native::elementwise 0.0%" in name_kernels(long, 100.0)


class Log(MetricLog):
    """Stands in for a run's log."""

    quiet = False

    def __init__(self) -> None:
        self.said: list[str] = []

    def report(self, text: str) -> None:
        self.said += text.splitlines()

    def pause(self) -> float:
        return 0.0

    def go_on(self, paused: float) -> None: ...


def test_shares_are_those_of_steps_that_nobody_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing makes the forward pass ten times as long here, and the optimizer no longer."""
    clock = 0.0
    monkeypatch.setattr("ssl_vit.training.observe.profiling.time.perf_counter", lambda: clock)
    log = Log()
    trace = StepTrace(2, tmp_path, torch.device("cpu"), log)
    for _ in range(WARMUP + 2 + 1 + 2 + 3):
        trace.next_step()
        with trace.part("forward"):
            clock += 0.3 if trace._number >= 2 else 0.03
        with trace.part("optimizer"):
            clock += 0.01
    trace.close()
    assert log.said[0] == "profile of 2 steps: 40.0 ms a step"
    assert shares(log.said)["forward"] == 75.0
    assert log.said[-2].startswith("while traced: 310.0 ms a step, 7.8 times as long: trust the shares above")


@pytest.mark.parametrize(("traced", "warns"), [(60.0, False), (79.0, False), (81.0, True), (1519.0, True)])
def test_a_trace_that_takes_a_third_longer_is_told(traced: float, warns: bool) -> None:
    assert ("times as long" in compare(60.0, traced)) is warns


@pytest.mark.parametrize("where", ["profile", "replace_text"])
def test_a_profiler_that_fails_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no profiler here")

    monkeypatch.setattr(f"ssl_vit.training.observe.profiling.{where}", broken)
    log = Log()
    trace = StepTrace(1, tmp_path, torch.device("cpu"), log)
    for _ in range(WARMUP + 5):
        trace.next_step()
        with trace.part("forward"):
            pass
    trace.close()
    assert any("left out: RuntimeError: no profiler here" in line for line in log.said)
    assert any(line.startswith("profile of 1 steps") for line in log.said)


def test_fewer_than_no_steps_are_refused() -> None:
    defaults, small = OBJECTIVES["mae"]
    with pytest.raises(ValueError, match=r"profile=-1: must be at least 0"):
        parse_run(defaults, [*small, "--data.source=x", "--steps=1", "--profile=-1"])
