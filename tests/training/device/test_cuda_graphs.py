"""What recorded blocks do without a GPU: when they are recorded, and when they run as they are written."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_vit.models.blocks import run_blocks, run_in_turn, runs_blocks
from ssl_vit.training.config import parse_run
from ssl_vit.training.device import cuda_graphs
from ssl_vit.training.device.cuda_graphs import BlockGraphs, resolve_cuda_graphs
from ssl_vit.training.step import prepare_step
from tests.conftest import OBJECTIVES
from tests.reruns import Rerun

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class FakePass:
    """Counts what is replayed, where a GPU would replay it."""

    made: list["FakePass"]

    def __init__(self, blocks: nn.Module, tokens: Tensor, pack_kwargs: dict[str, Any]) -> None:
        self.blocks, self.pack_kwargs = blocks, pack_kwargs
        self.replays, self.awaits, self.stale = 0, False, False
        self.made.append(self)

    def awaits_backward(self) -> bool:
        return self.awaits

    def is_stale(self) -> bool:
        return self.stale

    def replay(self, tokens: Tensor) -> Tensor:
        self.replays += 1
        return run_in_turn(self.blocks, tokens, self.pack_kwargs)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakePass]:
    FakePass.made = []
    monkeypatch.setattr(cuda_graphs, "GraphedPass", FakePass)
    return FakePass.made


@pytest.fixture
def blocks() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


@pytest.mark.parametrize(
    ("setting", "device", "runs", "wanted"),
    [
        ("auto", GPU, {}, True),
        ("auto", CPU, {}, False),
        ("auto", GPU, {"num_processes": 2}, False),
        ("auto", GPU, {"num_micro": 2}, False),
        ("auto", GPU, {"fills_memory": True}, False),
        ("auto", GPU, {"grad_checkpointing": True}, False),
        ("auto", GPU, {"is_sharded": True}, False),
        (True, GPU, {"num_micro": 2}, True),
        (False, GPU, {}, False),
        (False, CPU, {"num_processes": 2}, False),
    ],
)
def test_auto_records_runs_of_one_process_on_a_gpu_once_that_is_proven(
    setting: bool | str, device: torch.device, runs: dict[str, Any], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting == "auto":
        assert not resolve_cuda_graphs("auto", device, **runs)
        monkeypatch.setattr(cuda_graphs, "_PROVEN", True)
    assert resolve_cuda_graphs(setting, device, **runs) is wanted  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("device", "runs", "reason"),
    [
        (CPU, {}, "needs a GPU"),
        (GPU, {"num_processes": 2}, "one process only"),
        (GPU, {"is_sharded": True}, "not with FSDP"),
        (GPU, {"grad_checkpointing": True}, "not with encoder.grad_checkpointing"),
        (GPU, {"has_plain_blocks": False}, "records lists of plain transformer blocks, which this encoder.arch has"),
    ],
)
def test_what_cannot_be_recorded_is_refused(device: torch.device, runs: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^cuda_graphs=True: {reason}.*; use false$"):
        resolve_cuda_graphs(True, device, **runs)


def test_each_size_and_mode_is_recorded_once(made: list[FakePass], blocks: nn.ModuleList) -> None:
    graphs, small, large = BlockGraphs(enabled=True), torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    for _ in range(3):
        with graphs.active():
            assert torch.equal(run_blocks(blocks, small, False), run_in_turn(blocks, small, {}))
            run_blocks(blocks, large, False)
            with torch.no_grad():
                run_blocks(blocks, small, False)
    assert [recording.replays for recording in made] == [3, 3, 3]
    run_blocks(blocks, small, False)  # outside, as figures and evaluations run them
    assert [recording.replays for recording in made] == [3, 3, 3]


def test_blocks_run_as_written_between_a_forward_pass_and_its_backward_pass(
    made: list[FakePass], blocks: nn.ModuleList
) -> None:
    graphs, tokens = BlockGraphs(enabled=True), torch.randn(2, 3, 4)
    with graphs.active():
        run_blocks(blocks, tokens, False)
        made[0].awaits = True
        assert torch.equal(run_blocks(blocks, tokens, False), run_in_turn(blocks, tokens, {}))
    assert made[0].replays == 1
    assert len(made) == 1


def test_parameters_that_have_moved_are_recorded_anew(made: list[FakePass], blocks: nn.ModuleList) -> None:
    graphs, tokens = BlockGraphs(enabled=True), torch.randn(2, 3, 4)
    with graphs.active():
        run_blocks(blocks, tokens, False)
        made[0].stale = True
        run_blocks(blocks, tokens, False)
    assert [recording.replays for recording in made] == [1, 1]


def test_sizes_that_keep_changing_are_not_all_recorded(made: list[FakePass], blocks: nn.ModuleList) -> None:
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

    monkeypatch.setattr(cuda_graphs, "GraphedPass", fail)
    tokens = torch.randn(2, 3, 4)
    told = r"^cuda_graphs=auto: blocks cannot be recorded.*\(operation not permitted when stream is capturing\)$"
    with BlockGraphs(enabled=True).active():
        with pytest.warns(UserWarning, match=told):
            run_blocks(blocks, tokens, False)
        # Again would be an error here, as every warning is.
        for again in (tokens, torch.randn(2, 5, 4)):
            assert torch.equal(run_blocks(blocks, again, False), run_in_turn(blocks, again, {}))
    with BlockGraphs(enabled=True, must_work=True).active(), pytest.raises(RuntimeError, match="not permitted"):
        run_blocks(blocks, tokens, False)


def test_nothing_is_recorded_of_no_blocks_with_checkpointing_or_where_it_is_off(
    made: list[FakePass], blocks: nn.ModuleList
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
    with pytest.raises(ZeroDivisionError), runs_blocks(lambda blocks, tokens, pack_kwargs: tokens * (1 // 0)):
        run_blocks(blocks, tokens, False)
    assert torch.equal(run_blocks(blocks, tokens, False), run_in_turn(blocks, tokens, {}))


def check_two_passes(blocks: nn.Module, first: Tensor, second: Tensor) -> None:
    """Two passes of one size before the backward pass, as of an objective that encodes two views in turn."""
    found = []
    for enabled in (False, True):
        graphs = BlockGraphs(enabled, must_work=True)
        for _ in range(3):
            blocks.zero_grad()
            with graphs.active():
                outs = [run_blocks(blocks, tokens, False) for tokens in (first, second)]
            (outs[0].square().mean() + outs[1].mean()).backward()
        found.append([parameter.grad for parameter in blocks.parameters()])
    for plain, replayed in zip(*found, strict=True):
        torch.testing.assert_close(replayed, plain)


def test_two_passes_before_the_backward_pass_have_their_own_gradients(
    reruns: list[Rerun], blocks: nn.ModuleList
) -> None:
    check_two_passes(blocks, torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    assert [graph.replays for graph in reruns] == [3, 3]


def test_what_was_replayed_outlives_the_next_replay(reruns: list[Rerun], blocks: nn.ModuleList) -> None:
    graphs, kept, wanted = BlockGraphs(enabled=True), [], []
    for _ in range(3):
        tokens = torch.randn(2, 3, 4, requires_grad=True)
        with graphs.active():
            out = run_blocks(blocks, tokens, False)
        out.sum().backward()
        kept += [out, tokens.grad]
        twin = tokens.detach().requires_grad_()
        plain = run_in_turn(blocks, twin, {})
        wanted += [plain, *torch.autograd.grad(plain.sum(), twin)]
    assert len(reruns) == 2
    assert all(torch.equal(one, other) for one, other in zip(kept, wanted, strict=True))


def test_a_second_backward_pass_is_refused(reruns: list[Rerun], blocks: nn.ModuleList) -> None:
    with BlockGraphs(enabled=True).active():
        out = run_blocks(blocks, torch.randn(2, 3, 4), False).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only; set cuda_graphs=false"):
        out.backward()


def test_a_loss_that_is_still_held_does_not_hold_the_memory_of_its_step(
    reruns: list[Rerun], blocks: nn.ModuleList
) -> None:
    graphs = BlockGraphs(enabled=True)
    with graphs.active():
        loss = run_blocks(blocks, torch.randn(2, 3, 4), False).sum()
    loss.backward()
    [recording] = [weakref.ref(recording) for recording in graphs._recordings.values()]
    graphs.clear()
    reruns.clear()
    gc.collect()  # the stand-in's work holds its recording
    assert recording() is None
    assert loss.grad_fn is not None


def test_a_pass_that_is_given_up_makes_way(reruns: list[Rerun], blocks: nn.ModuleList) -> None:
    graphs, tokens = BlockGraphs(enabled=True), torch.randn(2, 3, 4)
    with graphs.active():
        first = run_blocks(blocks, tokens, False)
        run_blocks(blocks, tokens, False)  # as written, beside the first
        assert reruns[0].replays == 1
        del first
        run_blocks(blocks, tokens, False)
    assert reruns[0].replays == 2


def test_frozen_blocks_replay_without_gradients_of_their_own(reruns: list[Rerun], blocks: nn.ModuleList) -> None:
    blocks[0].requires_grad_(False)
    graphs = BlockGraphs(enabled=True, must_work=True)
    for tokens in (torch.randn(2, 3, 4), torch.randn(2, 3, 4, requires_grad=True)):
        blocks.zero_grad()
        with graphs.active():
            run_blocks(blocks, tokens, False).sum().backward()
        assert [parameter.grad is not None for parameter in blocks.parameters()] == [False, False, True, True]
    blocks.requires_grad_(False)
    with BlockGraphs(enabled=True, must_work=True).active():
        assert not run_blocks(blocks, torch.randn(2, 3, 4), False).requires_grad
    assert len(reruns) == 5


def test_parameters_moved_elsewhere_are_learned_where_they_are(reruns: list[Rerun], blocks: nn.ModuleList) -> None:
    graphs, tokens = BlockGraphs(enabled=True), torch.randn(2, 3, 4)
    for _ in range(2):
        with graphs.active():
            assert torch.equal(run_blocks(blocks, tokens, False), run_in_turn(blocks, tokens, {}))
        for parameter in blocks.parameters():
            parameter.data = parameter.data + 1  # as moving a module to another device and back does
    assert len(reruns) == 4


def test_a_recording_that_replays_something_else_is_not_used(
    reruns: list[Rerun], blocks: nn.ModuleList, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = Rerun.replay

    def replays_wrongly(self: Rerun) -> None:
        replay(self)
        if len(self.result) > 1:  # gradients
            tensor = self.result[-1]
            assert tensor is not None
            tensor.mul_(1.2)

    monkeypatch.setattr(Rerun, "replay", replays_wrongly)
    tokens = torch.randn(2, 3, 4)
    with (
        BlockGraphs(enabled=True).active(),
        pytest.warns(
            UserWarning, match=r"run as they are written \(what is replayed differs: the gradient of \S+ by \d+\.\d%"
        ),
    ):
        out = run_blocks(blocks, tokens, False)
    assert torch.equal(out, run_in_turn(blocks, tokens, {}))


def test_tensors_that_are_not_numbers_are_no_proof() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    cuda_graphs._compare(["one", "other"], [good, None], [good * 1.001, None])
    with pytest.raises(RuntimeError, match="the output by nan"):
        cuda_graphs._compare(["the output"], [bad], [good])


def test_a_small_gradient_is_proven_beside_a_large_one() -> None:
    large, small = torch.ones(3), torch.full((3,), 1e-5)
    cuda_graphs._compare(["large", "small"], [large, small], [large, small * 1.01])
    with pytest.raises(RuntimeError, match=r"small by 100\.0%"):
        cuda_graphs._compare(["large", "small"], [large, torch.zeros(3)], [large, small])
    cuda_graphs._compare(["large", "noise"], [large, torch.zeros(3)], [large, small / 1e4])


def test_gradients_that_are_one_tensor_are_not_recorded(reruns: list[Rerun]) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

        def forward(self, tokens: Tensor) -> Tensor:
            return tokens + (self.one + self.other)

    with BlockGraphs(enabled=True).active(), pytest.warns(UserWarning, match="two parameters have one gradient"):
        run_blocks(nn.ModuleList([Sum()]), torch.randn(2, 3, 4), False)


def test_recordings_that_live_have_slots_of_their_own(reruns: list[Rerun], blocks: nn.ModuleList) -> None:
    several = [BlockGraphs(enabled=True, must_work=True) for _ in range(2)]
    for graphs in several:
        with graphs.active():
            run_blocks(blocks, torch.randn(2, 3, 4), False)
            run_blocks(blocks, torch.randn(2, 5, 4), False)
    slots = {recording.slot for graphs in several for recording in graphs._recordings.values()}
    assert len(slots) == 4


def test_what_awaits_its_backward_pass_is_not_ended_before_the_next_step(
    reruns: list[Rerun], blocks: nn.ModuleList
) -> None:
    graphs, tokens = BlockGraphs(enabled=True), torch.randn(2, 3, 4)
    with graphs.active():
        loss = run_blocks(blocks, tokens, False).sum()
    [recording] = [weakref.ref(recording) for recording in graphs._recordings.values()]
    graphs.clear()
    loss.backward()
    reruns.clear()
    gc.collect()
    assert recording() is not None
    with graphs.active():
        gc.collect()
        assert recording() is None


def test_a_step_made_for_a_benchmark_records_nothing_on_a_cpu(made: list[FakePass]) -> None:
    config, _ = parse_run(OBJECTIVES["mae"][0], [*OBJECTIVES["mae"][1], "--cuda_graphs=true", "--steps=9"]).resolve(40)
    prepare_step(config, config.build_objective(), 2, CPU).forward_backward()
    assert not made
