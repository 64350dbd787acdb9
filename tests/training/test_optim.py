import pytest
import torch

from ssl_vit.models.vit import ViT
from ssl_vit.objectives.mae import MAE, MAEConfig
from ssl_vit.objectives.objective import Objective, ParamGroup
from ssl_vit.training.optim import OptimConfig, build_optimizer, clip_gradients, clip_groups, set_schedule


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_lr": 0.0}, "base_lr=0.0"),
        ({"warmup": 40.0}, r"warmup=40.0: must lie in \[0, 1\); it is a share of the run"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"clip_grad": 0.0}, "clip_grad=0.0"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**settings)


def test_a_rate_cannot_drop_before_it_has_risen() -> None:
    with pytest.raises(ValueError, match=r"^drop_at=0.1: must be above warmup=0.2"):
        OptimConfig(warmup=0.2, drop_at=0.1)
    dropping = OptimConfig(base_lr=1.0, warmup=0.0, drop_at=0.875, min_lr=0.5)
    assert [dropping.lr_at(progress, 256) for progress in (0.5, 0.9)] == pytest.approx([1.0, 0.1])
