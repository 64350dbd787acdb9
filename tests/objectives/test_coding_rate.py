import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from scripts import pretrain_dino, pretrain_dinov2
from ssl_vit.models.config import EncoderConfig
from ssl_vit.objectives.coding_rate import coding_rate, patch_agreement, view_agreement
from ssl_vit.objectives.dino import DINO, DINOConfig
from ssl_vit.objectives.dinov2 import DINOv2Config
from ssl_vit.objectives.objective import RunSize
from ssl_vit.training.config import RunConfig, parse_run
from tests.conftest import ROOT, TINY
from tests.processes import run_two

SMALL = {"loss": "coding_rate", "hidden_dim": 48, "bottleneck_dim": 16, "num_local_crops": 2, "local_crop_size": 16}
KINDS = {"simdino": DINOConfig, "simdinov2": DINOv2Config}
AUTO = ("num_prototypes", "teacher_temp", "teacher_temp_warmup", "ema_momentum", "freeze_last_layer")


def build(kind: str = "simdino", **settings) -> DINO:
    more = {"koleo_weight": 0.0} if kind == "simdinov2" else {}
    return KINDS[kind](**{**SMALL, **more, **settings}).build(EncoderConfig(image_size=32, **TINY).build())


def random_batch(images: int = 4) -> dict[str, Tensor]:
    masks = torch.rand(images, 2, 16) < 0.4
    masks[0, 0] = False  # a crop without masked patches
    return {
        "global_crops": torch.randn(images, 2, 3, 32, 32),
        "local_crops": torch.randn(images, 2, 3, 16, 16),
        "masks": masks,
    }


def waves(shape: tuple[int, ...], frequency: float, phase: float) -> Tensor:
    count = torch.arange(np.prod(shape), dtype=torch.float64)
    return torch.sin(frequency * count + phase).float().reshape(shape)


def log_det(features: Tensor, eps: float) -> Tensor:
    """gamma / 2 x log det, from eigenvalues in fp64."""
    num, dim = features.shape
    values = torch.linalg.eigvalsh(features.double().T @ features.double())
    return (dim + num) / (dim * num) / 2 * (1 + dim / (num * eps) * values).log().sum()


class TestAgainstThePapersCode:
    """Numbers that the paper's code printed: eps .5, 4 crops of 3 images, 5 dimensions."""

    student = F.normalize(waves((12, 5), 0.61, 0.1), dim=-1).reshape(4, 3, 5)
    teacher = F.normalize(waves((6, 5), 0.47, 0.9), dim=-1).reshape(2, 3, 5)

    def test_agreement(self) -> None:
        assert view_agreement(self.student, self.teacher).item() == pytest.approx(0.0422785, abs=1e-7)

    def test_coding_rate(self) -> None:
        assert coding_rate(self.student[:2], 0.5).mean().item() == pytest.approx(0.6521109, abs=1e-6)
        average = (self.student[:2] + self.teacher) / 2
        assert coding_rate(average, 0.5).mean().item() == pytest.approx(0.5373815, abs=1e-6)

    @pytest.mark.parametrize(("kind", "rate"), [("student", 0.6521109), ("average", 0.5373815)])
    def test_loss_of_the_objective(self, kind: str, rate: float) -> None:
        """Of the objective as a whole, whose heads give these directions."""
        objective = build(coding_features=kind, coding_eps=0.5, coding_coeff=3.0)
        objective.head.forward, objective.teacher_head.forward = lambda _: self.student, lambda _: self.teacher
        loss = objective(random_batch(3), 0.0)["loss"]
        assert loss.item() == pytest.approx(-3 * 0.0422785 - rate, abs=1e-6)


class TestAgreement:
    @pytest.mark.parametrize(("views", "teachers"), [(2, 2), (6, 2), (3, 1)])
    def test_is_the_double_loop(self, views: int, teachers: int) -> None:
        student, teacher = torch.randn(views, 5, 7), torch.randn(teachers, 5, 7)
        pairs = [
            F.cosine_similarity(student[s], teacher[t], dim=-1).mean()
            for t in range(teachers)
            for s in range(views)
            if s != t
        ]
        torch.testing.assert_close(view_agreement(student, teacher), torch.stack(pairs).mean())

    def test_equal_views_agree_wholly(self) -> None:
        assert view_agreement(torch.ones(3, 4, 5), torch.ones(2, 4, 5)).item() == pytest.approx(1.0)

    def test_a_single_view_is_refused(self) -> None:
        with pytest.raises(ValueError, match="at least two"):
            view_agreement(torch.ones(1, 4, 5), torch.ones(1, 4, 5))

    def test_patches_of_a_crop_share_its_weight(self) -> None:
        student, teacher, weights = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0.5, 0.25, 0.25])
        expected = (F.cosine_similarity(student, teacher, dim=-1) * weights).sum()
        torch.testing.assert_close(patch_agreement(student, teacher, weights), expected)
        assert patch_agreement(student[:0], teacher[:0], weights[:0]).item() == 0


class TestCodingRate:
    @pytest.mark.parametrize("num", [3, 16, 100])
    def test_is_half_a_log_determinant(self, num: int) -> None:
        features = F.normalize(torch.randn(2, num, 16), dim=-1)
        expected = torch.stack([log_det(view, 0.05) for view in features])
        torch.testing.assert_close(coding_rate(features, 0.05), expected.float(), rtol=1e-5, atol=1e-6)

    def test_is_lowest_for_one_direction_and_highest_for_all_alike(self) -> None:
        num, dim, eps = 64, 16, 0.05
        gamma = (dim + num) / (dim * num)
        alike = F.normalize(torch.randn(1, 1, dim), dim=-1).expand(1, num, dim)
        everywhere = torch.eye(dim).repeat(num // dim, 1)[None]
        random = F.normalize(torch.randn(1, num, dim), dim=-1)
        lowest, highest = gamma / 2 * math.log(1 + dim / eps), gamma / 2 * dim * math.log(1 + 1 / eps)
        assert coding_rate(alike, eps).item() == pytest.approx(lowest, rel=1e-4)
        assert coding_rate(everywhere, eps).item() == pytest.approx(highest, rel=1e-5)
        assert lowest < coding_rate(random, eps).item() < highest

    def test_gradients_are_those_of_the_log_determinant(self) -> None:
        features = F.normalize(torch.randn(1, 8, 16), dim=-1).requires_grad_()
        (found,) = torch.autograd.grad(coding_rate(features, 0.05).sum(), features)
        (expected,) = torch.autograd.grad(log_det(features[0], 0.05), features)
        torch.testing.assert_close(found, expected.to(found), rtol=1e-4, atol=1e-6)

    def test_features_that_are_not_finite_give_nan_and_no_error(self) -> None:
        features = torch.randn(2, 8, 16)
        features[0, 3, 2] = float("nan")
        found = coding_rate(features, 0.05)
        assert found[0].isnan()
        assert found[1].isfinite()

    def test_is_taken_in_fp32_under_autocast(self) -> None:
        features = F.normalize(torch.randn(2, 8, 16), dim=-1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = coding_rate(features, 0.05), view_agreement(features, features.flip(1))
        assert {value.dtype for value in found} == {torch.float32}
        assert torch.equal(found[0], coding_rate(features, 0.05))


class TestTheObjective:
    @pytest.mark.parametrize("kind", KINDS)
    def test_has_neither_prototypes_nor_centre(self, kind: str) -> None:
        objective = build(kind)
        names = list(objective.state_dict())
        assert not [name for name in names if "last_layer" in name or "center" in name]
        assert objective.head(torch.randn(3, 32)).norm(dim=-1).tolist() == pytest.approx([1, 1, 1])
        assert all(group.freeze_until == 0 for group in objective.param_groups())

    def test_is_the_sum_of_its_terms(self) -> None:
        objective, batch = build("simdinov2", ibot_weight=0.5, coding_coeff=2.0).eval(), random_batch()
        losses = objective(batch, 0.3)
        masks = batch["masks"].transpose(0, 1).flatten(0, 1)
        crops = batch["global_crops"].transpose(0, 1).flatten(0, 1)
        student = objective.encoder(crops, mask=masks, mask_token=objective.mask_token[0])
        teacher = objective.teacher_encoder(crops)
        local = [objective.head(objective.encoder(crop).cls) for crop in batch["local_crops"].unbind(1)]
        views = torch.stack([*objective.head(student.cls).view(2, 4, 16), *local])
        targets = objective.teacher_head(teacher.cls).view(2, 4, 16)
        agreement, rate = view_agreement(views, targets), coding_rate((views[:2] + targets) / 2, 0.05).mean()
        cosines = F.cosine_similarity(objective.head(student.patches), objective.teacher_head(teacher.patches), dim=-1)
        patches = torch.stack([row[mask].sum() / max(1, mask.sum()) for row, mask in zip(cosines, masks, strict=True)])
        expected = -2 * agreement - rate - 0.5 * patches.mean()
        torch.testing.assert_close(losses["loss"], expected, rtol=1e-5, atol=1e-6)
        assert losses["loss_ibot"].item() == pytest.approx(-patches.mean().item(), rel=1e-4)
        assert losses["view_cosine"].item() == pytest.approx(agreement.item(), abs=1e-5)
        assert losses["coding_rate"].item() == pytest.approx(rate.item(), rel=1e-4)
        assert "teacher_temp" not in losses

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_agreement_is_exact_under_accumulation_and_the_rate_is_of_a_micro_batch(self, kind: str) -> None:
        objective, batch = build(kind).eval(), random_batch()
        whole = objective(batch, 0.3)
        halves = [{name: value[start : start + 2] for name, value in batch.items()} for start in (0, 2)]
        parts = [objective(half, 0.3) for half in halves]
        for name in ("view_cosine", *(["loss_ibot"] if kind == "simdinov2" else [])):
            mean = torch.stack([part[name] for part in parts]).mean()
            torch.testing.assert_close(mean, whole[name], rtol=1e-4, atol=1e-6)
        rates = torch.stack([part["coding_rate"] for part in parts]).mean()
        assert not torch.allclose(rates, whole["coding_rate"], rtol=1e-2)

    def test_steps_bring_views_together_and_spread_images(self) -> None:
        objective = build(ema_momentum=0.9)
        patterns = torch.randn(32, 1, 3, 16, 16)  # an image's views are its pattern with other noise
        batch = {"global_crops": patterns.repeat(1, 2, 1, 2, 2), "local_crops": patterns.repeat(1, 2, 1, 1, 1)}
        batch = {name: crops + 0.3 * torch.randn_like(crops) for name, crops in batch.items()}
        optimizer = torch.optim.AdamW((p for p in objective.parameters() if p.requires_grad), lr=2e-3)
        before = objective(batch, 0.0) | objective.diagnostics()
        for step in range(60):
            optimizer.zero_grad()
            objective(batch, step / 60)["loss"].backward()
            optimizer.step()
            objective.after_step(step / 60)
        after = objective(batch, 0.0) | objective.diagnostics()
        assert after["loss"] < before["loss"] - 0.3, (before, after)
        assert after["coding_rate"] > 1.3 * before["coding_rate"]
        assert after["projection_rank"] > 1.3 * before["projection_rank"]
        assert after["view_cosine"] > 0.7


class TestSettings:
    @pytest.mark.parametrize("kind", KINDS)
    def test_those_of_prototypes_need_no_value(self, kind: str) -> None:
        config = KINDS[kind](loss="coding_rate", **dict.fromkeys(AUTO, "auto"))
        found = config.resolve(RunSize(50_000, 256, 20_000))
        assert list(found) == ["ema_momentum"]
        with pytest.raises(ValueError, match="ema_momentum='auto'"):
            config.check_resolved()

    @pytest.mark.parametrize("kind", KINDS)
    def test_those_of_prototypes_change_nothing(self, kind: str) -> None:
        """Neither the first loss nor the gradients, groups and state."""
        others = {"num_prototypes": 7, "teacher_temp": 0.01, "student_temp": 3.0, "centering": "none"}
        others |= {"norm_last_layer": False, "freeze_last_layer": 0.9, "center_momentum": 0.1, "sinkhorn_iterations": 9}
        found = []
        batch = random_batch()
        for settings in ({}, others):
            torch.manual_seed(0)
            objective = build(kind, **settings)
            loss = objective(batch, 0.5)["loss"]
            loss.backward()
            objective.after_step(0.5)
            found.append((loss, {n: p.grad for n, p in objective.named_parameters()}, objective.state_dict()))
            assert all(group.freeze_until == 0 for group in objective.param_groups())
        assert torch.equal(found[0][0], found[1][0])
        for one, other in zip(found[0][1:], found[1][1:], strict=True):
            assert one.keys() == other.keys()
            assert all(value is None or torch.equal(value, other[name]) for name, value in one.items())

    @pytest.mark.parametrize(
        ("defaults", "batch", "momentum"), [(pretrain_dino.DEFAULTS, 512, 0.996), (pretrain_dinov2.DEFAULTS, 1024, 0.9)]
    )
    def test_auto_gives_the_published_momentum(self, defaults: RunConfig, batch: int, momentum: float) -> None:
        flags = ["--data.source=x", "--objective.loss=coding_rate", f"--batch.size={batch}"]
        config, _ = parse_run(defaults, flags).resolve(1_281_167)
        assert config.objective.ema_momentum == momentum
        assert getattr(config.objective, "koleo_weight", 0) == 0

    def test_koleo_stays_with_prototypes(self) -> None:
        config, _ = parse_run(pretrain_dinov2.DEFAULTS, ["--data.source=x"]).resolve(1_281_167)
        assert config.objective.koleo_weight == 0.1

    @pytest.mark.parametrize("name", ["coding_eps", "coding_coeff"])
    def test_what_cannot_be_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name}=0: must be above 0"):
            DINOConfig(loss="coding_rate", **{name: 0})

    def test_help_says_which_settings_are_of_which_loss(self) -> None:
        source = (ROOT / "ssl_vit" / "objectives" / "dino.py").read_text()
        of_prototypes = set(re.findall(r'^    (\w+): .*\n    """Of prototypes only', source, re.MULTILINE))
        assert of_prototypes == {
            *("num_prototypes", "norm_last_layer", "student_temp", "teacher_temp", "warmup_teacher_temp"),
            *("teacher_temp_warmup", "centering", "sinkhorn_iterations", "center_momentum", "freeze_last_layer"),
        }
        of_codes = set(re.findall(r'^    (\w+): .*\n    """Of coding_rate only', source, re.MULTILINE))
        assert of_codes == {"coding_coeff", "coding_eps", "coding_features"}


HEALTHY = {"feature_std": 0.6, "projection_rank": 0.5}


class TestSignsOfCollapse:
    @pytest.mark.parametrize("kind", KINDS)
    def test_equal_images_look_collapsed(self, kind: str) -> None:
        objective = build(kind).eval()
        batch = {name: crops[:1].expand(8, *crops.shape[1:]) for name, crops in random_batch(1).items()}
        values = objective(batch, 0.5) | objective.diagnostics()
        sign = objective.diagnose({name: value.item() for name, value in values.items()})
        assert "nearly the same features" in (sign or "")
        assert "a lower objective.coding_coeff or objective.coding_eps" in (sign or "")

    def test_different_images_do_not(self) -> None:
        objective = build()
        values = objective(random_batch(32), 0.5) | objective.diagnostics()
        assert values["projection_rank"] > 0.1
        assert objective.diagnose(HEALTHY) is None

    def test_few_dimensions_are_one(self) -> None:
        sign = build().diagnose({**HEALTHY, "projection_rank": 0.05})
        assert (sign or "").startswith("The projections use few dimensions (5.0% of those that they could). Try")

    def test_settings_that_explain_it_come_first(self) -> None:
        run = {"batch": {"size": 32}, "optim": {"base_lr": 0.05, "lr_scaling": "linear"}}
        sign = build(ema_momentum=0.5, centering="none", teacher_temp=0.5).diagnose({**HEALTHY, "feature_std": 0}, run)
        assert sign is not None
        assert "objective.ema_momentum 0.5 makes the teacher a copy" in sign
        assert "optim.base_lr 0.05 is 100 times" in sign
        assert "batch.size 32 is small: 64 or more, without accumulation. Else try" in sign
        assert "centering" not in sign
        assert "teacher_temp" not in sign


def _gradients_of_a_share(environment: dict[str, str], folder: Path) -> None:
    """What one process of a launch does: the average of all processes' losses and gradients, into a file."""
    os.environ.update(environment)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    found = {}
    for kind in KINDS:
        objective, batch = seeded(kind)
        found |= gradients(kind, objective, {name: crops[rank::size] for name, crops in batch.items()})
    for value in found.values():
        dist.all_reduce(value)
    if rank == 0:
        save_file({name: value / size for name, value in found.items()}, folder / "found.safetensors")
    dist.destroy_process_group()


def seeded(kind: str) -> tuple[DINO, dict[str, Tensor]]:
    torch.manual_seed(0)
    return build(kind), random_batch(8)


def gradients(kind: str, objective: DINO, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    losses = objective(batch, 0.5)
    losses["loss"].backward()
    found = {f"{kind} {key}": p.grad for key, p in objective.named_parameters() if p.grad is not None}
    return {**{f"{kind} {name}": value.detach()[None].float() for name, value in losses.items()}, **found}


def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path: Path) -> None:
    run_two(_gradients_of_a_share, tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    for kind in KINDS:
        for name, expected in gradients(kind, *seeded(kind)).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5 * float(expected.norm()) + 1e-6)
