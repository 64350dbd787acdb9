"""What recorded blocks do without a GPU: when they are recorded, and when they run as they are written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_vit import cuda_graphs
from ssl_vit.cuda_graphs import BlockGraphs, resolve_cuda_graphs
from ssl_vit.models.blocks import run_blocks, run_in_turn, runs_blocks
from tests.conftest import losses

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class FakeRecording:
    """Counts what is replayed, where a GPU would replay it."""

    made: list["FakeRecording"]

    def __init__(self, blocks: nn.Module, tokens: Tensor, packing: dict[str, Any]) -> None:
        self.blocks, self.packing, self.replays, self.awaits_backward, self.stale = blocks, packing, 0, False, False
        self.made.append(self)

    def is_stale(self) -> bool:
        return self.stale

    def replay(self, tokens: Tensor) -> Tensor:
        self.replays += 1
        return run_in_turn(self.blocks, tokens, self.packing)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeRecording]:
    FakeRecording.made = []
    monkeypatch.setattr(cuda_graphs, "Recording", FakeRecording)
    return FakeRecording.made


@pytest.fixture
def blocks() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


@pytest.mark.parametrize(
    ("setting", "device", "processes", "checkpointing", "wanted"),
    [
        ("auto", GPU, 1, False, True),
        ("auto", CPU, 1, False, False),
        ("auto", GPU, 2, False, False),
        ("auto", GPU, 1, True, False),
        (True, GPU, 1, False, True),
        (False, GPU, 1, False, False),
    ],
)
def test_auto_records_runs_of_one_process_on_a_gpu(
    setting: bool | str, device: torch.device, processes: int, checkpointing: bool, wanted: bool
) -> None:
    assert resolve_cuda_graphs(setting, device, processes, checkpointing) is wanted  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ((CPU, 1, False), "needs a GPU"),
        ((GPU, 2, False), "one process only"),
        ((GPU, 1, True), "not with encoder.grad_checkpointing"),
    ],
)
def test_what_cannot_be_recorded_is_refused(place: tuple[torch.device, int, bool], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^cuda_graphs=True: {reason}.*; use auto or false$"):
        resolve_cuda_graphs(True, *place)


def test_each_size_and_mode_is_recorded_once(made: list[FakeRecording], blocks: nn.ModuleList) -> None:
    graphs, small, large = BlockGraphs(enabled=True), torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    for _ in range(3):
        with graphs.active():
            assert torch.equal(run_blocks(blocks, small, False), run_in_turn(blocks, small, {}))
            run_blocks(blocks, large, False)
            with torch.no_grad():
                run_blocks(blocks, small, False)
    assert [recording.replays for recording in made] == [3, 3, 3]
    run_blocks(blocks, small, False)  # outside, as pictures and evaluations run them
    assert [recording.replays for recording in made] == [3, 3, 3]


def test_blocks_run_as_written_between_a_forward_pass_and_its_backward_pass(
    made: list[FakeRecording], blocks: nn.ModuleList
) -> None:
    graphs, tokens = BlockGraphs(enabled=True), torch.randn(2, 3, 4)
    with graphs.active():
        run_blocks(blocks, tokens, False)
        made[0].awaits_backward = True
        assert torch.equal(run_blocks(blocks, tokens, False), run_in_turn(blocks, tokens, {}))
    assert made[0].replays == 1
    assert len(made) == 1


def test_parameters_that_have_moved_are_recorded_anew(made: list[FakeRecording], blocks: nn.ModuleList) -> None:
    graphs, tokens = BlockGraphs(enabled=True), torch.randn(2, 3, 4)
    with graphs.active():
        run_blocks(blocks, tokens, False)
        made[0].stale = True
        run_blocks(blocks, tokens, False)
    assert [recording.replays for recording in made] == [1, 1]


def test_sizes_that_keep_changing_are_not_all_recorded(made: list[FakeRecording], blocks: nn.ModuleList) -> None:
    graphs = BlockGraphs(enabled=True)
    with graphs.active():
        for length in range(1, 20):
            assert run_blocks(blocks, torch.randn(2, length, 4), False).shape == (2, length, 4)
    assert len(made) == cuda_graphs._MOST
    graphs.clear()
    with graphs.active():
        run_blocks(blocks, torch.randn(2, 30, 4), False)
    assert len(made) == cuda_graphs._MOST + 1


def test_a_recording_that_fails_is_told_once_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, blocks: nn.ModuleList
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(cuda_graphs, "Recording", fail)
    tokens = torch.randn(2, 3, 4)
    told = r"^cuda_graphs=auto: blocks cannot be recorded.*\(operation not permitted when stream is capturing\)$"
    with BlockGraphs(enabled=True).active():
        with pytest.warns(UserWarning, match=told):
            run_blocks(blocks, tokens, False)
        # Again would be an error here, as every warning is.
        assert torch.equal(run_blocks(blocks, tokens, False), run_in_turn(blocks, tokens, {}))
    with BlockGraphs(enabled=True, must_work=True).active(), pytest.raises(RuntimeError, match="not permitted"):
        run_blocks(blocks, tokens, False)


def test_nothing_is_recorded_of_no_blocks_with_checkpointing_or_where_it_is_off(
    made: list[FakeRecording], blocks: nn.ModuleList
) -> None:
    tokens = torch.randn(2, 3, 4, requires_grad=True)
    with BlockGraphs(enabled=True).active():
        run_blocks(nn.ModuleList(), tokens, False)
        run_blocks(blocks, tokens, True).sum().backward()
    with BlockGraphs(enabled=False).active():
        run_blocks(blocks, tokens, False)
    assert not made


def test_the_one_who_runs_blocks_is_put_back_after_an_error(blocks: nn.ModuleList) -> None:
    tokens = torch.randn(2, 3, 4)
    with pytest.raises(ZeroDivisionError), runs_blocks(lambda blocks, tokens, packing: tokens * (1 // 0)):
        run_blocks(blocks, tokens, False)
    assert torch.equal(run_blocks(blocks, tokens, False), run_in_turn(blocks, tokens, {}))


def test_a_run_replays_its_training_steps_and_nothing_else(
    start: Callable[..., int], tmp_path: Path, made: list[FakeRecording], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoder and decoder in two micro-batches of each step; pictures and the evaluation in between run as written."""
    flags = ("--batch.per_device=4", "--evaluation.every_steps=2", "--evaluation.pictures_every_steps=1")
    start(*flags, steps=4, labels=True, name="plain")
    monkeypatch.setattr("ssl_vit.run.resolve_cuda_graphs", lambda *given: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    start(*flags, steps=4, labels=True)
    assert [recording.replays for recording in made] == [4, 4, 4, 4]  # cleared by the evaluation after step 2
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
