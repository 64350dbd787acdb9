"""Muon: beside torch's, on the right weights, and through kills, skipped steps, freezing and accumulation."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssl_vit.models.vit import ViT
from ssl_vit.objectives.lejepa import LeJEPAConfig
from ssl_vit.objectives.mae import MAEConfig
from ssl_vit.training import muon
from ssl_vit.training.muon import Muon, orthogonal
from ssl_vit.training.optim import OptimConfig, build_optimizer, is_matrix_of_block, set_schedule
from tests.conftest import last_weights, losses
from tests.families import FAMILIES
from tests.interrupted import killed_after
from tests.test_resume import same
from tests.training.test_faults import break_steps, state_at

MUON = "--optim.optimizer=muon"


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32)])
def test_a_step_is_that_of_torch_scaled_to_the_size_of_adamw(shape: tuple[int, int]) -> None:
    theirs = pytest.importorskip("torch.optim._muon", reason="torch has Muon from 2.9 on").Muon
    own, other = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    ours = Muon([{"params": [own], "use_muon": True}], dtype=torch.bfloat16, lr=1e-2, weight_decay=0.1)
    reference = theirs([other], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        own.grad = torch.randn(shape, generator=generator)
        other.grad = own.grad.clone()
        ours.step()
        reference.step()
    torch.testing.assert_close(own, other, rtol=0, atol=1e-6)
    assert (own - 1).abs().max() > 1e-3


def test_matrices_are_stepped_in_parts_where_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for at_once in (2**26, 2 * 24 + 1, 1):
        monkeypatch.setattr(muon, "_AT_ONCE", at_once)
        weights = [torch.nn.Parameter(torch.ones(4, 6)) for _ in range(5)]
        optimizer = Muon([{"params": weights, "use_muon": True}], dtype=torch.float32, lr=1e-2)
        for number, weight in enumerate(weights):
            weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        optimizer.step()
        found.append(torch.stack([weight.detach() for weight in weights]))
    assert (found[0] != 1).all()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 24), (24, 48), (24, 6, 2, 2)])
def test_singular_values_end_around_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found, alike = orthogonal([1e3 * matrix, -matrix], dtype)
    torch.testing.assert_close(alike, -found, rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-3)
    assert found.shape == matrix.shape
    assert found.dtype == torch.float32
    values = torch.linalg.svdvals(found.flatten(1))
    assert 0.6 < values.min() <= values.max() < 1.3
    # The directions are those of the matrix itself.
    u, _, vh = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
    inner = torch.diagonal(u.T @ found.flatten(1) @ vh.T)
    assert inner.min() > 0.6
    assert torch.count_nonzero(orthogonal([torch.zeros(4, 3)], dtype)[0]) == 0


def test_matrices_of_blocks_are_muons_and_all_else_is_adamws(tiny_encoder: ViT) -> None:
    objective = MAEConfig(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2).build(tiny_encoder)
    optimizer = build_optimizer(objective, OptimConfig(optimizer="muon"))
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    found = {
        names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"] if group["use_muon"]
    }
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = [*(f"encoder.vit.blocks.{number}" for number in range(tiny_encoder.num_layers)), "decoder_blocks.0"]
    assert found == {f"{block}.{layer}.weight" for block in blocks for layer in layers}
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in objective.parameters() if parameter.requires_grad)


def test_of_a_convnext_it_takes_what_mixes_channels() -> None:
    objective = LeJEPAConfig(hidden_dim=32, projection_dim=8).build(FAMILIES["convnext"].build())
    optimizer = build_optimizer(objective, OptimConfig(optimizer="muon"))
    (muon,) = [group for group in optimizer.param_groups if group["use_muon"]]
    mixing = (".mlp.fc1.weight", ".mlp.fc2.weight")
    expected = {id(parameter) for name, parameter in objective.named_parameters() if name.endswith(mixing)}
    assert {id(parameter) for parameter in muon["params"]} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_matrices_in_each_block_and_no_table_of_positions_is_one(family: str) -> None:
    encoder = FAMILIES[family].build()
    found = [name for name, parameter in encoder.named_parameters() if is_matrix_of_block(name, parameter)]
    blocks = {match[0] for name, _ in encoder.named_parameters() if (match := re.match(r".*?blocks\.\d+\.", name))}
    assert blocks
    assert all(any(name.startswith(block) for name in found) for block in blocks)
    others = "conv_dw|norm|table|token|pos_embed|cpb_mlp|patch_embed|stem"
    assert not [name for name in found if re.search(others, name)]


def test_rate_decay_and_freezing_are_those_of_the_groups(tiny_encoder: ViT) -> None:
    objective = MAEConfig(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2).build(tiny_encoder)
    config = OptimConfig(optimizer="muon", layer_decay=0.5, warmup=0.0, freeze_backbone_until=0.5)
    optimizer = build_optimizer(objective, config)
    for parameter in objective.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_schedule(optimizer, config, 0.2, batch_size=256)
    before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    optimizer.step()
    moved = {name for name, parameter in objective.named_parameters() if not torch.equal(parameter, before[name])}
    assert not any(name.startswith("encoder.vit.blocks") for name in moved)
    assert "decoder_blocks.0.attn.qkv.weight" in moved
    rates = {
        group["lr_scale"] for group in optimizer.param_groups if group["use_muon"] and group["freeze_until"] == 0.5
    }
    assert rates == {0.5**distance for distance in range(1, tiny_encoder.num_layers + 1)}


def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(start: Callable[..., int], tmp_path: Path) -> None:
    """Also where the backbone is frozen when the run is killed, so that its matrices have no momentum yet."""
    start("--steps=2", name="first", steps=2)
    for number, extra in enumerate(
        [(), (f"--encoder.pretrained={tmp_path / 'first'}", "--optim.freeze_backbone_until=0.5")]
    ):
        flags = (MUON, "--checkpoint.every_steps=2", *extra)
        start(*flags, name=f"whole{number}")
        for _ in range(2):  # before the backbone thaws in step 4, and after
            with killed_after(2):
                start(*flags, name=f"run{number}")
        start(*flags, name=f"run{number}")
        whole, run = tmp_path / f"whole{number}", tmp_path / f"run{number}"
        assert same(state_at(whole, 6), state_at(run, 6)) == []
        assert losses(run) == losses(whole)
    momenta = [name for name in state_at(whole, 6) if name.endswith("momentum_buffer")]
    assert momenta
    assert all(name.removesuffix("momentum_buffer") + "exp_avg" not in state_at(whole, 6) for name in momenta)


def test_accumulation_is_one_big_batch(start: Callable[..., int], tmp_path: Path) -> None:
    flags = (MUON, "--encoder.drop_path_rate=0")
    start(*flags, name="whole")
    start(*flags, "--batch.per_device=2", name="parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    for name, value in last_weights(tmp_path / "whole").items():
        torch.testing.assert_close(last_weights(tmp_path / "parts")[name], value, rtol=1e-3, atol=2e-4)


def test_a_step_that_is_not_finite_changes_nothing(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_steps(monkeypatch, "mae", {2}, num_steps=4)
    start(MUON, "--checkpoint.every_steps=1", "--checkpoint.keep=99", "--optim.clip_grad=1", steps=4)
    run = tmp_path / "run"
    assert same(state_at(run, 2), state_at(run, 3)) == []
    assert same(state_at(run, 3), state_at(run, 4))
    assert all(value.isfinite().all() for value in state_at(run, 4).values())


def test_a_run_does_not_change_its_optimizer(start: Callable[..., int]) -> None:
    start(steps=2)
    with pytest.raises(ValueError, match=r"optim.optimizer 'adamw' -> 'muon'"):
        start(MUON, steps=2)


def test_muon_is_refused_where_no_matrix_of_a_block_is_trained(tiny_encoder: ViT) -> None:
    objective = LeJEPAConfig(hidden_dim=32, projection_dim=8).build(tiny_encoder.requires_grad_(False))
    with pytest.raises(ValueError, match=r"optim.optimizer='muon': no weight matrix of a block is trained.*use adamw"):
        build_optimizer(objective, OptimConfig(optimizer="muon"))
