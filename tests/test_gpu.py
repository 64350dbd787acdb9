"""What only a GPU can show."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssl_vit.benchmarks.step import prepare_step
from ssl_vit.config import parse_run
from tests.conftest import OBJECTIVES, ROOT, losses
from tests.test_faults import EVERY_STEP, break_steps, same, state_at

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_a_step_never_waits_for_the_device(objective: str, precision: str) -> None:
    """From the collated batch to the teacher's average: the host only ever hands out work."""
    defaults, small = OBJECTIVES[objective]
    config, _ = parse_run(defaults, [*small, f"--precision={precision}", "--steps=10"]).resolve(40)
    step = prepare_step(config, config.build_objective().cuda(), 8, torch.device("cuda"))
    for _ in range(2):  # the first one makes the optimizer's state
        step.forward_backward()
        step.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.forward_backward()
        step.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("objective", ["mae", "dino", "dinov2"])
def test_a_step_that_is_not_finite_changes_nothing(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    freeze = () if objective == "mae" else ("--objective.freeze_last_layer=0", "--objective.centering=center")
    break_steps(monkeypatch, objective, {2}, num_steps=4)
    start(*EVERY_STEP, *freeze, steps=4, objective=objective)
    run = tmp_path / "run"
    assert same(state_at(run, 2), state_at(run, 3))
    assert not same(state_at(run, 3), state_at(run, 4))
    assert all(value.isfinite().all() for value in state_at(run, 4).values())


def test_too_many_skipped_steps_in_a_row_stop_a_run(start: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two log lines, where nothing else makes the host look."""
    break_steps(monkeypatch, "mae", {3, 4, 5}, num_steps=20)
    with pytest.raises(FloatingPointError, match="steps 3 to 5 were skipped"):
        start("--max_skipped_steps=3", "--log_every=20", steps=20)


@pytest.mark.parametrize("kind", ["mae", "dino"])
def test_compiled_blocks_have_the_loss_and_gradients_of_eager_ones(kind: str) -> None:
    command = [sys.executable, "-m", "tests.compiled", kind, "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("objective", ["mae", "dino", "dinov2"])
def test_a_whole_run_in_bf16_with_accumulation(start: Callable[..., int], tmp_path: Path, objective: str) -> None:
    flags = ("--precision=auto", "--batch.per_device=4", "--evaluation.pictures_every_steps=2")
    assert start(*flags, steps=4, objective=objective, labels=True) == 0
    assert len(losses(tmp_path / "run")) == 4
    assert (tmp_path / "run" / "results.json").exists()
    assert (tmp_path / "run" / "backbone.safetensors").exists()


def test_tf32_is_used_where_it_is_asked_for(start: Callable[..., int]) -> None:
    for setting, precision in (("true", "high"), ("false", "highest")):
        start("--fresh", f"--tf32={setting}", steps=1)
        assert torch.get_float32_matmul_precision() == precision
