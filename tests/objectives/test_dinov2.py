import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from ssl_vit.models.config import EncoderConfig
from ssl_vit.objectives.dinov2 import DINOv2, DINOv2Config, ibot_loss, koleo_loss, sinkhorn_knopp
from tests.conftest import GOLDEN, TINY
from tests.families import FAMILIES
from tests.specs import spec

SMALL = {"num_prototypes": 64, "hidden_dim": 48, "bottleneck_dim": 16, "local_crop_size": 16, "num_local_crops": 2}


def build(**settings) -> DINOv2:
    return DINOv2Config(**{**SMALL, **settings}).build(EncoderConfig(image_size=32, layer_scale=1e-5, **TINY).build())


def random_batch(images: int = 4) -> dict[str, torch.Tensor]:
    masks = torch.rand(images, 2, 16) < 0.3
    masks[0] = False
    return {
        "global_crops": torch.randn(images, 2, 3, 32, 32),
        "local_crops": torch.randn(images, 2, 3, 16, 16),
        "masks": masks,
    }


class TestAgainstThePapersCode:
    @pytest.fixture
    def golden(self) -> dict[str, torch.Tensor]:
        return load_file(GOLDEN / "dinov2_losses_reference.safetensors")

    def test_sinkhorn_of_class_tokens(self, golden: dict[str, torch.Tensor]) -> None:
        probs = sinkhorn_knopp(golden["teacher_cls_logits"], 0.05)
        torch.testing.assert_close(probs, golden["sinkhorn_cls_targets"], rtol=1e-4, atol=1e-6)

    def test_sinkhorn_of_patches_and_ibot(self, golden: dict[str, torch.Tensor]) -> None:
        masks = golden["masks"].bool()
        probs = sinkhorn_knopp(golden["teacher_patch_logits"][masks], 0.07)
        torch.testing.assert_close(probs, golden["sinkhorn_patch_targets"], rtol=1e-4, atol=1e-6)
        loss = ibot_loss(golden["student_patch_logits"][masks], probs, masks)
        assert loss.item() == pytest.approx(golden["ibot_loss"].item(), rel=1e-4)

    def test_koleo(self, golden: dict[str, torch.Tensor]) -> None:
        assert koleo_loss(golden["koleo_features"]).item() == pytest.approx(golden["koleo_loss"].item(), rel=1e-4)

    def test_koleo_of_dinov3(self) -> None:
        golden = load_file(GOLDEN / "dinov3_losses_reference.safetensors")
        features = golden["koleo_features"].requires_grad_()
        loss = koleo_loss(features)
        loss.backward()
        assert loss.item() == pytest.approx(golden["koleo"].item(), rel=1e-5)
        assert features.grad.norm().item() == pytest.approx(golden["grad_norm.koleo"].item(), rel=1e-5)
        halves = torch.stack([koleo_loss(half) for half in golden["koleo_features"].detach().chunk(2)])
        assert halves.mean().item() == pytest.approx(golden["koleo_groups"].mean().item(), rel=1e-5)


class TestSinkhorn:
    def test_is_the_plain_iteration(self) -> None:
        logits = torch.randn(12, 7)
        scores = (logits / 0.1).double().exp()
        for _ in range(3):
            scores = scores / scores.sum(dim=0, keepdim=True) / 7
            scores = scores / scores.sum(dim=1, keepdim=True) / 12
        torch.testing.assert_close(sinkhorn_knopp(logits, 0.1), (scores * 12).float(), rtol=1e-4, atol=1e-6)

    def test_balances_rows_and_prototypes(self) -> None:
        probs = sinkhorn_knopp(torch.randn(64, 8), 0.5, num_iterations=50)
        torch.testing.assert_close(probs.sum(dim=1), torch.ones(64))
        torch.testing.assert_close(probs.sum(dim=0), torch.full((8,), 8.0), rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("scale", [1e2, 1e4])
    def test_does_not_overflow_without_normalised_features(self, scale: float) -> None:
        probs = sinkhorn_knopp(scale * torch.randn(8, 16), 0.04)
        assert probs.isfinite().all()
        torch.testing.assert_close(probs.sum(dim=1), torch.ones(8))

    def test_no_rows_are_no_rows(self) -> None:
        assert sinkhorn_knopp(torch.zeros(0, 5), 0.1).shape == (0, 5)


class TestIBOT:
    def test_is_the_double_loop(self) -> None:
        student, teacher = torch.randn(3, 5, 11), torch.randn(3, 5, 11).softmax(dim=-1)
        masks = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]).bool()
        total = torch.zeros(())
        for crop in range(3):
            patches = masks[crop].nonzero().flatten().tolist()
            for patch in patches:
                term = -(teacher[crop, patch] * F.log_softmax(student[crop, patch] / 0.1, dim=-1)).sum()
                total += term / len(patches)
        torch.testing.assert_close(ibot_loss(student[masks], teacher[masks], masks), total / 3)

    def test_nothing_masked_is_no_loss(self) -> None:
        student = torch.zeros(0, 5, requires_grad=True)
        assert ibot_loss(student, torch.zeros(0, 5), torch.zeros(2, 2, 4, dtype=torch.bool)).item() == 0

    def test_the_student_does_not_see_masked_patches_and_the_teacher_does(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        objective, batch = build(ibot_weight=1.0, koleo_weight=0.0), random_batch()
        seen = {}
        for name in ("encoder", "teacher_encoder"):
            module = getattr(objective, name)

            def note(groups: list, name: str = name, encode: Callable = module.forward_groups, **masking: Any) -> Any:
                seen[name] = masking.get("mask")
                return encode(groups, **masking)

            monkeypatch.setattr(module, "forward_groups", note)
        objective(batch, 0.5)
        assert torch.equal(seen["encoder"], batch["masks"].transpose(0, 1).flatten(0, 1))
        assert seen["teacher_encoder"] is None

    def test_separate_heads_learn_and_have_teachers(self) -> None:
        objective = build(ibot_separate_head=True)
        objective(random_batch(), 0.5)["loss"].backward()
        assert objective.patch_head.mlp[0].weight.grad.abs().sum() > 0
        assert all(p.grad is None and not p.requires_grad for p in objective.teacher_patch_head.parameters())
        with torch.no_grad():
            objective.patch_head.mlp[0].weight.add_(1.0)
        before = objective.teacher_patch_head.mlp[0].weight.clone()
        objective.after_step(0.0)
        torch.testing.assert_close(objective.teacher_patch_head.mlp[0].weight, before + 0.008)

    def test_a_batch_without_any_masked_patch_trains_all_the_same(self) -> None:
        objective, batch = build(centering="center", ibot_separate_head=True), random_batch()
        batch["masks"][:] = False
        losses = objective(batch, 0.5)
        losses["loss"].backward()
        objective.after_step(0.5)
        assert losses["loss_ibot"].item() == 0
        assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []
        assert torch.equal(objective.patch_center, torch.zeros(1, 64))

    def test_without_ibot_no_parameter_is_left_over(self) -> None:
        objective = build(ibot_weight=0.0)
        objective(random_batch(), 0.5)["loss"].backward()
        assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []
        assert not hasattr(objective, "mask_token")

    def test_an_encoder_that_cannot_mask_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"ibot_weight=1\.0.*vit_tiny_r_s16_p8_224 cannot"):
            DINOv2Config(**SMALL).build(FAMILIES["hybrid"].build())

    def test_the_mask_token_is_as_wide_as_the_stem(self) -> None:
        swin = FAMILIES["swin"].build()
        objective = DINOv2Config(**SMALL).build(swin)
        assert objective.mask_token.shape == (1, 16)
        assert swin.embed_dim == 64


class TestKoLeo:
    def test_is_the_double_loop(self) -> None:
        features = torch.randn(6, 5)
        unit = F.normalize(features, dim=-1)
        nearest = [min((unit[i] - unit[j]).norm() for j in range(6) if j != i) for i in range(6)]
        expected = -torch.stack(nearest).log().mean()
        torch.testing.assert_close(koleo_loss(features), expected, rtol=1e-4, atol=1e-5)

    def test_duplicates_and_a_batch_of_one_stay_finite(self) -> None:
        twins = torch.randn(1, 5).repeat(4, 1).requires_grad_()
        loss = koleo_loss(twins)
        loss.backward()
        assert loss.isfinite()
        assert twins.grad.isfinite().all()
        assert koleo_loss(torch.randn(1, 5)).item() == 0


class TestLearningRates:
    def test_fall_from_block_to_block(self) -> None:
        scales = {name: group.lr_scale for group in build().param_groups() for name, _ in group.params}
        assert scales["encoder.vit.norm.weight"] == 1.0
        assert scales["encoder.vit.blocks.1.mlp.fc1.weight"] == pytest.approx(0.9)
        assert scales["encoder.vit.blocks.0.mlp.fc1.weight"] == pytest.approx(0.81)
        assert scales["encoder.vit.cls_token"] == scales["encoder.vit.pos_embed"] == pytest.approx(0.729)
        assert scales["mask_token"] == pytest.approx(0.729)
        assert scales["encoder.vit.patch_embed.proj.weight"] == pytest.approx(0.729 * 0.2)
        assert scales["head.mlp.0.weight"] == scales["head.last_layer.weight_v"] == 1.0

    def test_scales_and_norms_do_not_decay(self) -> None:
        decays = {name: group.weight_decay_scale for group in build().param_groups() for name, _ in group.params}
        assert decays["encoder.vit.blocks.0.ls1.gamma"] == decays["encoder.vit.norm.weight"] == 0
        assert decays["encoder.vit.cls_token"] == decays["encoder.vit.pos_embed"] == 1


def test_masks_come_with_the_sample_and_follow_from_its_generator() -> None:
    transform = DINOv2Config(**SMALL).build_transform(spec(64))
    image = torch.randint(0, 256, (3, 80, 80), dtype=torch.uint8)
    masks = torch.stack([transform(image, np.random.default_rng(seed))["masks"] for seed in range(200)])
    assert torch.equal(masks[3], transform(image, np.random.default_rng(3))["masks"])
    shares = masks.float().mean(dim=-1).flatten()
    assert (shares == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)  # 400 crops: deviation 0.025
    masked = shares[shares > 0]
    assert masked.min() >= 0.09
    assert masked.max() <= 0.51
    assert masked.mean().item() == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("centering", ["sinkhorn", "center"])
def test_losses_add_up(centering: str) -> None:
    objective = build(centering=centering, ibot_weight=0.5, koleo_weight=0.1)
    losses = objective(random_batch(), 0.5)
    expected = losses["loss_dino"] + 0.5 * losses["loss_ibot"] + 0.1 * losses["loss_koleo"]
    torch.testing.assert_close(losses["loss"].detach(), expected)
    assert losses["kl"].item() == pytest.approx((losses["loss_dino"] - losses["teacher_entropy"]).item(), abs=1e-5)
    assert losses["loss_ibot"] > 0
    assert losses["below_ln_k"].item() == pytest.approx(math.log(64) - losses["loss_dino"].item(), abs=1e-5)
