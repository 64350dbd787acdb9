import re
from typing import Literal

import pytest
import torch

from scripts.pretrain_mae import DEFAULTS
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.vit import ViT
from ssl_vit.objectives.dino import DINO, DINOConfig
from ssl_vit.objectives.mae import MAE, MAEConfig
from ssl_vit.objectives.objective import Objective, ParamGroup, RunSize
from ssl_vit.training.config import parse_run
from ssl_vit.training.muon import Muon
from ssl_vit.training.optim import (
    OptimConfig,
    build_optimizer,
    clip_gradients,
    clip_groups,
    parameter_groups,
    set_schedule,
)


@pytest.fixture
def objective(tiny_encoder: ViT) -> MAE:
    return MAEConfig(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2).build(tiny_encoder)


def test_peak_rate_follows_the_global_batch() -> None:
    assert OptimConfig(base_lr=1.5e-4).peak_lr(4096) == pytest.approx(2.4e-3)
    assert OptimConfig(base_lr=4e-3, lr_scaling="sqrt").peak_lr(2048) == pytest.approx(5.657e-3, rel=1e-3)


def test_every_trainable_parameter_is_in_exactly_one_group(objective: MAE) -> None:
    optimizer = build_optimizer(objective, OptimConfig())
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in objective.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable)


def test_fp16_needs_the_optimizer_that_lets_others_know_of_skipped_steps(objective: MAE) -> None:
    assert not build_optimizer(objective, OptimConfig(), "fp16").defaults["fused"]
    assert build_optimizer(objective, OptimConfig(), "bf16").defaults["fused"]


def test_rate_and_decay_are_written_before_the_step(objective: MAE) -> None:
    config = OptimConfig(base_lr=1e-3, warmup=0.1, weight_decay=0.04, weight_decay_end=0.4)
    optimizer = build_optimizer(objective, config)
    assert set_schedule(optimizer, config, 0.05, batch_size=256) == pytest.approx(
        {"lr": 5e-4, "weight_decay": 0.0422}, rel=1e-2
    )
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 5e-4])
    assert optimizer.param_groups[0]["weight_decay"] > 0.04
    assert optimizer.param_groups[1]["weight_decay"] == 0


class _Frozen(Objective):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)

    def param_groups(self) -> list[ParamGroup]:
        return [
            ParamGroup([("body.weight", self.body.weight)], lr_scale=0.5),
            ParamGroup([("head.weight", self.head.weight)], freeze_until=0.5),
        ]


def test_frozen_parameters_neither_step_nor_decay_nor_gather_moments() -> None:
    objective, config = _Frozen(), OptimConfig(base_lr=0.1, warmup=0.0)
    optimizer = build_optimizer(objective, config)
    before = objective.head.weight.clone()
    for progress in (0.1, 0.6):
        objective.head(objective.body(torch.ones(1, 2))).sum().backward()
        set_schedule(optimizer, config, progress, batch_size=256)
        optimizer.step()
        if progress < 0.5:
            assert torch.equal(objective.head.weight, before)
            assert objective.head.weight not in optimizer.state
        optimizer.zero_grad()
    assert not torch.equal(objective.head.weight, before)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * optimizer.param_groups[1]["lr"])


@pytest.fixture
def dino(tiny_encoder: ViT) -> DINO:
    return DINOConfig(
        num_prototypes=16, hidden_dim=16, bottleneck_dim=8, num_local_crops=0, freeze_last_layer=0.1
    ).build(tiny_encoder)


def step_at(objective: DINO, optimizer: torch.optim.Optimizer, config: OptimConfig, progress: float) -> None:
    crops = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    objective({"global_crops": crops}, progress)["loss"].backward()
    set_schedule(optimizer, config, progress, batch_size=256)
    optimizer.step()
    objective.after_step(progress)
    optimizer.zero_grad()


def test_a_frozen_backbone_waits_for_its_heads_and_the_teacher_with_it(dino: DINO) -> None:
    config = OptimConfig(base_lr=0.01, warmup=0.0, weight_decay=0.1, freeze_backbone_until=0.5, unfreeze_ramp=0.2)
    optimizer = build_optimizer(dino, config)
    before = {name: value.clone() for name, value in dino.named_parameters()}

    def moved() -> set[str]:
        return {name for name, value in dino.named_parameters() if not torch.equal(value, before[name])}

    for progress in (0.0, 0.2, 0.4):
        step_at(dino, optimizer, config, progress)
    patches = {
        f"{whose}vit.patch_embed.proj.{part}"
        for whose in ("encoder.", "teacher_encoder.")
        for part in ("weight", "bias")
    }
    backbones = {name for name in moved() if "encoder." in name}
    assert backbones == patches
    assert {"head.mlp.0.weight", "head.last_layer.weight_v", "teacher_head.mlp.0.weight"} <= moved()
    frozen = dict(dino.named_parameters())["encoder.vit.blocks.0.attn.qkv.weight"]
    assert frozen not in optimizer.state

    step_at(dino, optimizer, config, 0.5)  # with the rate of the ramp's start, 0
    assert {name for name in moved() if "encoder." in name} == patches
    step_at(dino, optimizer, config, 0.55)
    assert len([name for name in moved() if "encoder.vit.blocks" in name]) == 2 * 24
    rates = {group["lr"] / config.lr_at(0.55, 256) for group in optimizer.param_groups if group["params"]}
    assert sorted(rates) == pytest.approx([0.25, 1.0])
    assert optimizer.state[frozen]["step"] == 2


def test_the_rate_decays_towards_the_input_in_any_objective(dino: DINO) -> None:
    config = OptimConfig(base_lr=1.0, warmup=0.0, layer_decay=0.5, patch_embed_lr=0.1)
    groups = [(name, group) for group in parameter_groups(dino, config) for name, _ in group.params]
    found = {name: group.lr_scale for name, group in groups}
    assert len(found) == len(groups) == sum(parameter.requires_grad for parameter in dino.parameters())
    assert found["encoder.vit.norm.weight"] == found["head.mlp.0.weight"] == 1.0
    assert found["encoder.vit.blocks.1.mlp.fc1.weight"] == 0.5
    assert found["encoder.vit.cls_token"] == 0.125
    assert found["encoder.vit.patch_embed.proj.weight"] == pytest.approx(0.0125)
    last = next(group for name, group in groups if name == "head.last_layer.weight_v")
    assert last.freeze_until == pytest.approx(0.1)


def test_the_trained_convolutions_before_a_hybrids_patches_are_frozen_too() -> None:
    encoder = EncoderConfig("vit_tiny_r_s16_p8_224", image_size=64).build()
    objective = DINOConfig(num_prototypes=16, hidden_dim=16, bottleneck_dim=8).build(encoder)
    groups = parameter_groups(objective, OptimConfig(freeze_backbone_until=0.5))
    open_ = {name for group in groups if not group.freeze_until for name, _ in group.params if "encoder." in name}
    assert open_ == {"encoder.vit.patch_embed.proj.weight", "encoder.vit.patch_embed.proj.bias"}


@pytest.mark.parametrize("clip_over", ["all", "module", "parameter"])
def test_gradients_are_clipped_over_what_is_asked_for(clip_over: str) -> None:
    objective = _Frozen()
    gradients = {"body": torch.tensor([[3.0, 0.0], [4.0, 0.0]]), "head": torch.tensor([[0.0, 0.1], [0.0, 0.0]])}
    objective.extra = torch.nn.Linear(1, 1)
    objective.extra.weight.grad, objective.extra.bias.grad = torch.tensor([[2.0]]), torch.tensor([1.5])
    for name, gradient in gradients.items():
        getattr(objective, name).weight.grad = gradient.clone()
    groups = clip_groups(objective, OptimConfig(clip_grad=1.0, clip_over=clip_over))
    norm = clip_gradients(groups, 1.0)
    total = (25 + 0.01 + 4 + 2.25) ** 0.5
    assert norm.item() == pytest.approx(total)
    scales = {
        "all": (1 / total, 1 / total, 1 / total, 1 / total),
        "module": (1 / 5, 1.0, 1 / 2.5, 1 / 2.5),  # the head's is small already
        "parameter": (1 / 5, 1.0, 1 / 2, 1 / 1.5),
    }[clip_over]
    torch.testing.assert_close(objective.body.weight.grad, gradients["body"] * scales[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(objective.head.weight.grad, gradients["head"] * scales[1], rtol=1e-4, atol=1e-6)
    assert objective.extra.weight.grad.item() == pytest.approx(2.0 * scales[2], rel=1e-4)
    assert objective.extra.bias.grad.item() == pytest.approx(1.5 * scales[3], rel=1e-4)


def test_an_unresolved_warm_up_is_named(objective: MAE) -> None:
    config = OptimConfig(warmup="auto")
    with pytest.raises(ValueError, match=r"optim\.warmup='auto'"):
        set_schedule(build_optimizer(objective, config), config, 0.0, batch_size=8)


@pytest.mark.parametrize("lr_scaling", ["linear", "sqrt"])
@pytest.mark.parametrize(("batch_size", "peak"), [(16, 5e-4), (64, 1e-3), (1000, 1e-3)])
def test_the_peak_rate_that_auto_chooses(lr_scaling: Literal["linear", "sqrt"], batch_size: int, peak: float) -> None:
    config = OptimConfig(base_lr="auto", lr_scaling=lr_scaling, warmup=0.25)
    size = RunSize(num_samples=5_000, batch_size=batch_size, num_steps=100)
    with pytest.raises(ValueError, match=r"optim\.base_lr='auto'"):
        config.peak_lr(batch_size)
    fresh, [reason] = config.resolve(size, is_trained=False)
    assert fresh.peak_lr(batch_size) == pytest.approx(peak)
    assert re.fullmatch(rf"optim.base_lr .*: a peak rate of {peak:.1e}, for fresh weights and {batch_size} .*", reason)
    assert fresh.warmup == 0.25
    trained, [reason] = config.resolve(size, is_trained=True)
    assert trained.peak_lr(batch_size) == pytest.approx(peak / 20)
    assert "trained weights" in reason
    assert fresh.resolve(size, is_trained=True) == (fresh, [])


def test_auto_takes_muon_at_twice_the_rate_from_fresh_weights_and_adamw_from_trained_ones(objective: MAE) -> None:
    config = OptimConfig(optimizer="auto", base_lr="auto")
    size = RunSize(num_samples=5_000, batch_size=64, num_steps=100)
    with pytest.raises(ValueError, match=r"optim\.optimizer='auto'"):
        build_optimizer(objective, config)
    fresh, reasons = config.resolve(size, is_trained=False)
    assert (fresh.optimizer, fresh.peak_lr(64)) == ("muon", pytest.approx(2e-3))
    assert isinstance(build_optimizer(objective, fresh), Muon)
    assert [reason.split(":")[0] for reason in reasons] == ["optim.optimizer muon", "optim.base_lr 0.008"]
    trained, _ = config.resolve(size, is_trained=True)
    assert (trained.optimizer, trained.peak_lr(64)) == ("adamw", pytest.approx(5e-5))
    named, _ = OptimConfig(optimizer="muon", base_lr="auto").resolve(size, is_trained=False)
    assert named.peak_lr(64) == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_lr": 0.0}, "base_lr=0.0"),
        ({"warmup": 40.0}, r"warmup=40.0: must lie in \[0, 1\); it is a share of the run"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"clip_grad": 0.0}, "clip_grad=0.0"),
        ({"freeze_backbone_until": 1.0}, r"freeze_backbone_until=1.0: must lie in \[0, 1\); it is a share"),
        (
            {"freeze_backbone_until": 0.6, "unfreeze_ramp": 0.5},
            "unfreeze_ramp=0.5: begins at freeze_backbone",
        ),
        ({"layer_decay": 0.0}, "layer_decay=0.0"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**settings)


def test_a_rate_cannot_drop_before_it_has_risen() -> None:
    with pytest.raises(ValueError, match=r"^drop_at=0.1: must be above warmup=0.2"):
        OptimConfig(warmup=0.2, drop_at=0.1)
    with pytest.raises(ValueError, match=r"^optim.drop_at=0.05: must be above warmup=0.1"):
        parse_run(DEFAULTS, ["--optim.warmup=auto", "--optim.drop_at=0.05", "--steps=100"]).resolve(1000)
    dropping = OptimConfig(base_lr=1.0, warmup=0.0, drop_at=0.875, min_lr=0.5)
    assert [dropping.lr_at(progress, 256) for progress in (0.5, 0.9)] == pytest.approx([1.0, 0.1])
