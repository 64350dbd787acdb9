"""DINO on backbones other than plain ViTs, against the papers' head and loss on timm's models."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_vit.export.interop import load_reference
from ssl_vit.models import EncoderConfig
from ssl_vit.models.encoder import Features
from ssl_vit.models.hierarchical import ConvNeXt
from ssl_vit.objectives.dino import DINO, DINOConfig
from tests.conftest import GOLDEN

ENCODERS = {
    "swin": EncoderConfig(
        "swin_tiny_patch4_window7_224",
        64,
        model_args={"depths": [2, 2, 2], "embed_dim": 16, "num_heads": [2, 4, 8], "window_size": 4},
    ),
    "convnext": EncoderConfig("convnext_tiny", 64, model_args={"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 40]}),
    "hybrid": EncoderConfig("vit_tiny_r_s16_p8_224", 64, embed_dim=24, depth=2, num_heads=2),
}


def build(name: str, teacher_temp: float = 0.04) -> DINO:
    config = DINOConfig(
        num_prototypes=64,
        hidden_dim=48,
        bottleneck_dim=16,
        local_crop_size=32,
        num_local_crops=3,
        teacher_temp=teacher_temp,
        warmup_teacher_temp=teacher_temp,
    )
    objective = config.build(ENCODERS[name].build())
    load_reference(objective, GOLDEN / f"dino_{name}_reference.safetensors")
    return objective


@pytest.fixture(params=ENCODERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def golden_of(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference numbers, and their crops as a batch."""
    golden = load_file(GOLDEN / f"dino_{name}_reference.safetensors")
    batch = {
        "global_crops": torch.stack([golden[f"global_{view}"] for view in range(2)], dim=1),
        "local_crops": torch.stack([golden[f"local_{view}"] for view in range(3)], dim=1),
    }
    return golden, batch


def mean_of_normed(self: ConvNeXt, maps: Tensor) -> Features:
    """Pool as the reference does, by the mean of the normed sites; the encoder gives the norm of the mean."""
    patches = self.net.head.norm(maps).flatten(2).transpose(1, 2)
    return Features(patches.mean(dim=1), patches)


def test_features(name: str) -> None:
    objective, (golden, batch) = build(name).eval(), golden_of(name)
    student = objective.encode(objective.encoder, [batch["global_crops"], batch["local_crops"]])
    [teacher] = objective.encode(objective.teacher_encoder, [batch["global_crops"]])
    kind = {"swin": "{}pooled{}", "convnext": "alt_{}pooled{}", "hybrid": "{}cls{}"}[name]
    for features, role, size in ((*student[:1], "student_", "_global"), (student[1], "student_", "_local")):
        expected = golden[kind.format(role, size)]
        torch.testing.assert_close(features.cls.flatten(0, 1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(teacher.cls.flatten(0, 1), golden[kind.format("teacher_", "")], rtol=1e-5, atol=1e-5)
    for features, size in zip(student, ("global", "local"), strict=True):
        tokens = golden[f"student_tokens_{size}_0_first"][:, -features.patches.shape[2] :]
        torch.testing.assert_close(features.patches[0, :1], tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("temp", "key"), [(0.04, "temp_004"), (0.07, "temp_007")])
def test_loss_centre_and_gradient(name: str, temp: float, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConvNeXt, "_features", mean_of_normed)
    objective, (golden, batch) = build(name, temp), golden_of(name)
    student = torch.cat([golden["student_logits"][:4], golden["student_logits"][4:]])
    [whole, local] = objective.encode(objective.encoder, [batch["global_crops"], batch["local_crops"]])
    cls = torch.cat([whole.cls, local.cls]).flatten(0, 1)
    torch.testing.assert_close(objective.head(cls), student, rtol=1e-5, atol=1e-5)
    loss = objective(batch, 0.0)["loss"]
    assert loss.item() == pytest.approx(golden[f"loss_{key}"].item(), rel=1e-5)
    loss.backward()
    grads = [p.grad for n, p in objective.named_parameters() if p.grad is not None and "weight_g" not in n]
    assert nn.utils.get_total_norm(grads).item() == pytest.approx(golden[f"grad_norm_{key}"].item(), rel=1e-5)
    objective.after_step(0.0)
    torch.testing.assert_close(objective.center, golden["center_after"], rtol=1e-5, atol=1e-6)


def test_convnext_pools_in_timms_order() -> None:
    golden, batch = golden_of("convnext")
    loss = build("convnext")(batch, 0.0)["loss"]
    assert loss.item() == pytest.approx(golden["alt_loss_temp_004"].item(), rel=1e-5)
