"""What only a GPU can show."""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_vit.models.blocks import Block, run_blocks
from ssl_vit.models.config import EncoderConfig
from ssl_vit.runs.checkpoint import list_checkpoints
from ssl_vit.training.config import parse_run
from ssl_vit.training.device import cuda_graphs
from ssl_vit.training.device.cuda_graphs import BlockGraphs
from ssl_vit.training.step import prepare_step
from tests.compiled import TINY
from tests.conftest import OBJECTIVES, RECORDED, ROOT, losses
from tests.training.device.test_cuda_graphs import check_two_passes
from tests.training.test_faults import EVERY_STEP, break_steps, same, state_at

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(autouse=True)
def _records_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `auto` will be once these tests have passed."""
    monkeypatch.setattr(cuda_graphs, "_PROVEN", True)


DROPS = "--encoder.drop_path_rate=0.2"


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(("precision", "recorded"), [("bf16", "true"), ("bf16", "false"), ("no", "false")])
@pytest.mark.parametrize("objective", RECORDED)
def test_a_step_never_waits_for_the_device(objective: str, precision: str, recorded: str) -> None:
    """From the collated batch to the teacher's average: the host only ever hands out work."""
    defaults, small = OBJECTIVES[objective]
    flags = [f"--precision={precision}", f"--cuda_graphs={recorded}", "--steps=10"]
    config, _ = parse_run(defaults, [*small, *flags]).resolve(40)
    step = prepare_step(config, config.build_objective().cuda(), 8, torch.device("cuda"))
    for _ in range(2):  # the first one makes the optimizer's state
        step.forward_backward()
        step.update()
    try:
        torch.cuda.set_sync_debug_mode("error")
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


@pytest.mark.parametrize(("precision", "rounding"), [("no", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("objective", RECORDED)
def test_recorded_blocks_have_the_gradients_of_blocks_as_written(
    objective: str, precision: str, rounding: float
) -> None:
    """Summed over two micro-batches; attention's backward pass does not add up in the same order each time."""
    defaults, small = OBJECTIVES[objective]
    config, _ = parse_run(defaults, [*small, DROPS, f"--precision={precision}", "--steps=10"]).resolve(40)
    found = []
    for recorded in (False, True):
        torch.manual_seed(0)
        built = config.build_objective().cuda()
        step = prepare_step(dataclasses.replace(config, cuda_graphs=recorded), built, 8, torch.device("cuda"))
        for _ in range(3):
            built.zero_grad()
            for micro in range(2):
                torch.manual_seed(micro)
                step.forward_backward()
        found.append({name: value.grad for name, value in built.named_parameters() if value.grad is not None})
    plain, replayed = found
    assert plain.keys() == replayed.keys()
    noise = 1e-6 * max(gradient.norm().item() for gradient in plain.values())
    for name, gradient in plain.items():
        assert (replayed[name] - gradient).norm() <= rounding * gradient.norm() + noise, name


@pytest.mark.parametrize("objective", RECORDED)
def test_a_recorded_run_learns_and_goes_on_as_one_that_is_not(
    start: Callable[..., int], tmp_path: Path, objective: str
) -> None:
    flags = (DROPS, "--precision=no", "--batch.per_device=4", "--evaluation.every_steps=2", *EVERY_STEP)
    for recorded in ("true", "false"):
        start(*flags, f"--cuda_graphs={recorded}", name=recorded, steps=5, labels=True, objective=objective)
    shutil.copytree(tmp_path / "true", tmp_path / "again")
    for checkpoint in list_checkpoints(tmp_path / "again")[3:]:
        shutil.rmtree(checkpoint)
    start(*flags, "--cuda_graphs=true", name="again", steps=5, labels=True, objective=objective)
    plain = pytest.approx(losses(tmp_path / "false"), rel=1e-3)
    assert losses(tmp_path / "true") == plain
    assert losses(tmp_path / "again") == plain


def test_two_passes_before_the_backward_pass_have_their_own_gradients() -> None:
    blocks = EncoderConfig(image_size=32, **TINY).build().vit.blocks.cuda().train()
    first, second = (torch.randn(2, 16, 32, device="cuda") for _ in range(2))
    check_two_passes(blocks, first, second)


def test_what_is_cleared_gives_its_memory_back() -> None:
    """Also while the loss of the last step is held, as the training loop holds it."""
    blocks = EncoderConfig(image_size=32, **TINY).build().vit.blocks.cuda().train()
    graphs = BlockGraphs(enabled=True, must_work=True)
    with graphs.active():
        loss = run_blocks(blocks, torch.randn(4096, 16, 32, device="cuda"), False).square().mean()
    loss.backward()
    blocks.zero_grad()
    before = torch.cuda.memory_reserved()
    graphs.clear()
    assert torch.cuda.memory_reserved() < before - 100 * 2**20
    assert loss.isfinite()


def test_blocks_that_cannot_be_recorded_run_as_written(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that reads a number on the host; a run goes on from the failed recording without a trace of it."""
    forward = Block.forward

    def reads(self: Block, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return forward(self, x * (1.0 if x.sum().item() else 2.0), *args, **kwargs)

    start(DROPS, "--cuda_graphs=false", name="plain", steps=3)
    monkeypatch.setattr(Block, "forward", reads)
    with pytest.warns(UserWarning, match="^cuda_graphs=auto: blocks cannot be recorded"):
        start(DROPS, steps=3)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
