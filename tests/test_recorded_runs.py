"""Whole runs whose blocks are recorded, against runs of blocks as written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_vit.runs.checkpoint import list_checkpoints
from tests.conftest import RECORDED, losses
from tests.reruns import FakeCapture, Rerun
from tests.training.test_faults import EVERY_STEP, same, state_at


@pytest.mark.usefixtures("quick_scores")
@pytest.mark.parametrize("objective", RECORDED)
def test_a_recorded_run_learns_what_blocks_as_written_learn(
    start: Callable[..., int],
    tmp_path: Path,
    reruns: list[Rerun],
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
) -> None:
    """Bit for bit: micro-batches, stochastic depth, figures, and an evaluation that clears what was recorded."""
    flags = ("--batch.per_device=4", "--evaluation.every_steps=2", "--evaluation.pictures_every_steps=1", *EVERY_STEP)
    flags = (*flags, "--encoder.drop_path_rate=0.2")
    start(*flags, steps=4, labels=True, name="plain", objective=objective)
    assert not reruns
    monkeypatch.setattr("ssl_vit.training.setup.resolve_cuda_graphs", lambda *given, **runs: True)
    start(*flags, steps=4, labels=True, objective=objective)
    # Encoder and decoder forward and backward, or teacher forward, student forward and backward; anew after step 2.
    assert [graph.replays for graph in reruns] == [4] * (8 if objective == "mae" else 6)
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    for step in (1, 2, 3, 4):
        assert same(state_at(tmp_path / "run", step), state_at(tmp_path / "plain", step)), step


def test_a_second_recording_that_fails_leaves_the_first_ones_backward_pass_alone(
    start: Callable[..., int], tmp_path: Path, reruns: list[Rerun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder is recorded and replayed; then the decoder, in the same forward pass, cannot be."""
    start(*EVERY_STEP, steps=3, name="plain")
    monkeypatch.setattr("ssl_vit.training.setup.resolve_cuda_graphs", lambda *given, **runs: True)
    capture = FakeCapture.__call__

    def twice(self: FakeCapture, work: Callable[[], Any], after: Rerun | None = None) -> tuple[Rerun, Any]:
        if len(reruns) == 2:
            raise torch.OutOfMemoryError
        return capture(self, work, after)

    monkeypatch.setattr(FakeCapture, "__call__", twice)
    with pytest.warns(UserWarning, match="blocks cannot be recorded"):
        start(*EVERY_STEP, steps=3)
    assert [graph.replays for graph in reruns] == [1, 1]
    assert all(same(state_at(tmp_path / "run", step), state_at(tmp_path / "plain", step)) for step in (1, 2, 3))


def test_a_recorded_run_that_goes_on_ends_with_the_same_weights(
    start: Callable[..., int], tmp_path: Path, reruns: list[Rerun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_vit.training.setup.resolve_cuda_graphs", lambda *given, **runs: True)
    flags = ("--encoder.drop_path_rate=0.2", *EVERY_STEP)
    start(*flags, steps=5, objective="dino")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for checkpoint in list_checkpoints(tmp_path / "again")[2:]:
        shutil.rmtree(checkpoint)
    start(*flags, name="again", steps=5, objective="dino")
    assert [graph.replays for graph in reruns] == [5] * 3 + [3] * 3
    assert same(state_at(tmp_path / "run", 5), state_at(tmp_path / "again", 5))
