import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from ssl_vit.export.interop import load_reference
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.vit import ViT
from ssl_vit.objectives.centering import RunningMean, sinkhorn_knopp
from ssl_vit.objectives.dino import DINO, DINOConfig, dino_loss
from ssl_vit.objectives.dinov2 import DINOv2Config
from ssl_vit.objectives.objective import RunSize
from tests.conftest import GOLDEN, TINY
from tests.specs import grey, spec

SMALL = {"num_prototypes": 64, "hidden_dim": 48, "bottleneck_dim": 16, "local_crop_size": 16, "num_local_crops": 4}


def encoder(**settings) -> ViT:
    return EncoderConfig(image_size=32, **{**TINY, **settings}).build()


def build(**settings) -> DINO:
    return DINOConfig(**{**SMALL, **settings}).build(encoder())


def random_batch(images: int = 4) -> dict[str, torch.Tensor]:
    return {"global_crops": torch.randn(images, 2, 3, 32, 32), "local_crops": torch.randn(images, 4, 3, 16, 16)}


def naive_loss(student: torch.Tensor, probs: torch.Tensor, temp: float) -> torch.Tensor:
    terms = []
    for t, s in itertools.product(range(len(probs)), range(len(student))):
        if s != t:
            terms.append(-(probs[t] * F.log_softmax(student[s] / temp, dim=-1)).sum(dim=-1).mean())
    return torch.stack(terms).mean()


class TestAgainstThePapersCode:
    @pytest.fixture
    def golden(self) -> dict[str, torch.Tensor]:
        return load_file(GOLDEN / "dino_reference.safetensors")

    @pytest.fixture
    def reference(self) -> DINO:
        objective = build()
        load_reference(objective, GOLDEN / "dino_reference.safetensors")
        return objective

    def test_features_of_global_crops(self, reference: DINO, golden: dict[str, torch.Tensor]) -> None:
        crops = torch.stack([golden["global_0"], golden["global_1"]], dim=1)
        for module, key in ((reference.encoder, "student_cls_global"), (reference.teacher_encoder, "teacher_cls")):
            [features] = reference.encode(module, [crops])
            cls = features.cls.flatten(0, 1)
            torch.testing.assert_close(cls, golden[key], rtol=1e-4, atol=1e-5)

    def test_logits(self, reference: DINO, golden: dict[str, torch.Tensor]) -> None:
        cls = torch.cat([golden["student_cls_global"], golden["student_cls_local"]])
        torch.testing.assert_close(reference.head(cls), golden["student_logits"], rtol=1e-4, atol=1e-5)
        teacher = reference.teacher_head(golden["teacher_cls"])
        torch.testing.assert_close(teacher, golden["teacher_logits"], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("temp", "key"), [(0.04, "loss_temp_004"), (0.07, "loss_temp_007")])
    def test_losses(self, reference: DINO, golden: dict[str, torch.Tensor], temp: float, key: str) -> None:
        student, teacher = golden["student_logits"].view(6, 3, 64), golden["teacher_logits"].view(2, 3, 64)
        loss = dino_loss(student, reference.center_probs(teacher, golden["center"], temp))
        assert loss.item() == pytest.approx(golden[key].item(), rel=1e-4)

    def test_centre_after_a_step(self, reference: DINO, golden: dict[str, torch.Tensor]) -> None:
        assert torch.equal(reference.center, golden["center"])
        crops = torch.stack([golden["global_0"], golden["global_1"]], dim=1)
        reference({"global_crops": crops}, 0.0)
        reference.after_step(0.0)
        torch.testing.assert_close(reference.center, golden["center_after"], rtol=1e-4, atol=1e-5)


class TestLoss:
    @pytest.mark.parametrize(("views", "teachers"), [(2, 2), (6, 2), (3, 1), (5, 3)])
    def test_is_the_double_loop_in_value_and_gradient(self, views: int, teachers: int) -> None:
        logits = torch.randn(views, 5, 33, requires_grad=True)
        probs = torch.randn(teachers, 5, 33).mul(3).softmax(dim=-1)
        values, gradients = [], []
        for function in (dino_loss, naive_loss):
            loss = function(logits, probs, 0.1)
            values.append(loss)
            gradients.append(torch.autograd.grad(2.5 * loss, logits)[0])
        torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)

    def test_uniform_answers_give_ln_k(self) -> None:
        loss = dino_loss(torch.zeros(4, 3, 65), torch.full((2, 3, 65), 1 / 65))
        assert loss.item() == pytest.approx(math.log(65))

    def test_half_precision_logits_are_summed_in_fp32(self) -> None:
        logits, probs = torch.randn(4, 3, 4096).bfloat16(), torch.randn(2, 3, 4096).softmax(dim=-1)
        loss = dino_loss(logits, probs)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, naive_loss(logits.float(), probs, 0.1), rtol=1e-5, atol=1e-5)

    def test_a_single_view_has_nothing_to_agree_with(self) -> None:
        with pytest.raises(ValueError, match="at least two"):
            dino_loss(torch.zeros(1, 3, 8), torch.zeros(1, 3, 8))

    def test_the_whole_objective_is_the_double_loop_over_crops(self) -> None:
        objective, batch = build(teacher_temp=0.05, teacher_temp_warmup=0.0).eval(), random_batch()
        objective.center.normal_(std=0.1)
        crops = [*batch["global_crops"].unbind(1), *batch["local_crops"].unbind(1)]
        student = torch.stack([objective.head(objective.encoder(crop).cls) for crop in crops])
        teacher = torch.stack([objective.teacher_head(objective.teacher_encoder(crop).cls) for crop in crops[:2]])
        probs = ((teacher - objective.center) / 0.05).softmax(dim=-1)
        torch.testing.assert_close(objective(batch, 0.3)["loss"], naive_loss(student, probs, 0.1))

    def test_crops_of_one_size_share_a_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        objective = build(local_crop_size=32)
        sizes = []
        monkeypatch.setattr(
            objective.encoder,
            "forward_groups",
            lambda groups, **how: (
                sizes.append([len(images) for images in groups]) or ViT.forward_groups(objective.encoder, groups, **how)
            ),
        )
        objective({"global_crops": torch.randn(2, 2, 3, 32, 32), "local_crops": torch.randn(2, 4, 3, 32, 32)}, 0.0)
        objective(random_batch(2), 0.0)
        assert sizes == [[12], [4, 8]]


class TestTeacher:
    def test_starts_as_the_student_and_shares_nothing(self) -> None:
        objective = build()
        for student, teacher in (
            (objective.encoder, objective.teacher_encoder),
            (objective.head, objective.teacher_head),
        ):
            own = dict(student.named_parameters())
            for name, parameter in teacher.named_parameters():
                assert torch.equal(parameter, own[name])
                assert parameter.data_ptr() != own[name].data_ptr()
                assert not parameter.requires_grad

    def test_never_drops_paths(self) -> None:
        objective = DINOConfig(**SMALL).build(encoder()).train()
        assert objective.encoder.training
        assert not any(module.training for module in objective.teacher_encoder.modules())
        assert objective.backbone() is objective.teacher_encoder

    def test_moves_by_the_momentum_of_the_moment(self) -> None:
        objective = build(ema_momentum=0.9, ema_momentum_end=1.0)
        objective(random_batch(), 0.0)
        with torch.no_grad():
            for parameter in itertools.chain(objective.encoder.parameters(), objective.head.parameters()):
                parameter.add_(1.0)
        teacher = objective.teacher_head.mlp[0].weight.clone()
        objective.after_step(0.5)
        torch.testing.assert_close(objective.teacher_head.mlp[0].weight, teacher + 0.05)

    def test_schedules_are_functions_of_progress(self) -> None:
        objective = build(warmup_teacher_temp=0.04, teacher_temp=0.07, teacher_temp_warmup=0.3, ema_momentum=0.996)
        assert [objective.teacher_temp(p) for p in (0, 0.15, 0.3, 1)] == pytest.approx([0.04, 0.055, 0.07, 0.07])
        assert [objective.ema_momentum(p) for p in (0, 0.5, 1)] == pytest.approx([0.996, 0.998, 1.0])


class TestCentre:
    def test_micro_batches_move_it_as_one_batch_does(self) -> None:
        batch = random_batch(4)
        centres = []
        for size in (4, 1):
            torch.manual_seed(0)
            objective = build()
            for start in range(0, 4, size):
                objective({name: value[start : start + size] for name, value in batch.items()}, 0.25)
            assert torch.equal(objective.center, torch.zeros(1, 64))  # not before the step
            objective.after_step(0.25)
            centres.append(objective.center)
        assert centres[0].abs().max() > 1e-4
        torch.testing.assert_close(centres[0], centres[1], rtol=1e-5, atol=1e-8)

    def test_a_skipped_step_leaves_nothing_behind(self) -> None:
        rows, centre = torch.randn(4, 8), torch.zeros(1, 8)
        sums = RunningMean()
        sums.add(torch.full((4, 8), 100.0), 0.1)
        sums.add(rows, 0.2)
        sums.move(centre, 0.9)
        torch.testing.assert_close(centre, 0.1 * rows.mean(dim=0, keepdim=True))

    def test_is_part_of_the_state(self) -> None:
        assert "center" in build().state_dict()

    def test_without_centring_it_stays(self) -> None:
        objective = build(centering="none")
        objective(random_batch(), 0.0)
        objective.after_step(0.0)
        assert torch.equal(objective.center, torch.zeros(1, 64))


def test_the_last_layer_is_a_group_of_its_own_that_waits() -> None:
    groups = build(freeze_last_layer=0.1, norm_last_layer=False).param_groups()
    frozen = {name for group in groups if group.freeze_until == 0.1 for name, _ in group.params}
    assert frozen == {"head.last_layer.weight_g", "head.last_layer.weight_v"}
    assert all(group.freeze_until == 0 for group in groups if "head.last_layer.weight_v" not in dict(group.params))


def test_the_prototypes_norm_learns_only_where_asked() -> None:
    assert not build(norm_last_layer=True).head.last_layer.weight_g.requires_grad
    assert build(norm_last_layer=False).head.last_layer.weight_g.requires_grad
    assert torch.equal(build().head.last_layer.weight_g, torch.ones(64, 1))


class TestAuto:
    def test_imagenet_gives_the_papers_values(self) -> None:
        config = DINOConfig(**dict.fromkeys(("num_prototypes", "ema_momentum", "freeze_last_layer"), "auto"))
        found = config.resolve(RunSize(num_samples=1_281_167, batch_size=512, num_steps=250_227))
        assert {name: found[name].value for name in found} == {
            "num_prototypes": 65536,
            "ema_momentum": 0.996,
            "freeze_last_layer": pytest.approx(0.01, abs=1e-4),
        }

    def test_small_data_and_short_runs_get_a_sharp_and_quick_teacher(self) -> None:
        config = DINOConfig(
            num_prototypes="auto",
            teacher_temp="auto",
            ema_momentum="auto",
            teacher_temp_warmup="auto",
            centering="auto",
        )
        found = config.resolve(RunSize(num_samples=4495, batch_size=32, num_steps=1700))
        values = {name: found[name].value for name in found}
        assert values == {
            "num_prototypes": 256,
            "teacher_temp": 0.02,
            "centering": "sinkhorn",
            "ema_momentum": pytest.approx(0.988, abs=1e-3),
            "teacher_temp_warmup": 0.0,
        }
        assert all(found[name].reason for name in found)

    def test_a_temperature_that_was_given_is_warmed_up_to(self) -> None:
        config = DINOConfig(teacher_temp=0.07, teacher_temp_warmup="auto")
        assert config.resolve(RunSize(20_000, 64, 5000))["teacher_temp_warmup"].value == 0.3
        config = DINOConfig(teacher_temp=0.04, teacher_temp_warmup="auto")
        assert config.resolve(RunSize(2_000_000, 64, 5000))["teacher_temp_warmup"].value == 0.0

    def test_the_teacher_of_dinov2_is_slower(self) -> None:
        config = DINOv2Config(ema_momentum="auto")
        assert config.resolve(RunSize(1_281_167, 2048, 125_000))["ema_momentum"].value == 0.992

    def test_numbers_stay(self) -> None:
        assert DINOConfig().resolve(RunSize(100, 10, 10)) == {}

    def test_building_needs_numbers(self) -> None:
        with pytest.raises(ValueError, match="teacher_temp='auto'"):
            build(teacher_temp="auto")

    @pytest.mark.parametrize("samples", [1, 7, 100])
    def test_any_number_of_images_can_be_resolved(self, samples: int) -> None:
        size = RunSize(samples, 8, 1)
        auto = dict.fromkeys(
            ("num_prototypes", "teacher_temp", "teacher_temp_warmup", "ema_momentum", "freeze_last_layer"), "auto"
        )
        found = DINOConfig(**auto).resolve(size)
        config = DINOConfig(**{name: value.value for name, value in found.items()})  # which refuses impossible values
        assert (config.num_prototypes, config.ema_momentum) == (256, 0.9)

    def test_a_long_run_has_prototypes_by_its_images_and_a_short_one_by_what_it_sees(self) -> None:
        found = [
            DINOConfig(num_prototypes="auto").resolve(RunSize(50_000, 64, steps))["num_prototypes"].value
            for steps in (1_500, 6_000, 100_000)
        ]
        assert found == [256, 1024, 4096]  # 96,000 and 384,000 images by 375; 50,000 by 16

    def test_a_long_run_on_few_images_has_a_moving_centre(self) -> None:
        found = DINOConfig(teacher_temp="auto", centering="auto").resolve(RunSize(5_000, 256, 2_000))
        assert {name: found[name].value for name in found} == {"teacher_temp": 0.04, "centering": "center"}

    @pytest.mark.parametrize(("width", "found"), [(512, True), (2048, False)])
    def test_narrow_heads_have_batch_norm(self, width: int, found: bool) -> None:
        config = DINOConfig(head_batch_norm="auto", hidden_dim=width)
        assert config.resolve(RunSize(50_000, 64, 1_500))["head_batch_norm"].value is found

    def test_the_coding_rate_has_no_batch_norm(self) -> None:
        config = DINOConfig(loss="coding_rate", head_batch_norm="auto", hidden_dim=512)
        assert config.resolve(RunSize(50_000, 64, 1_500))["head_batch_norm"].value is False


class TestSignsOfCollapse:
    def test_are_numbers_that_mean_what_they_say(self) -> None:
        objective = build()
        losses = objective(random_batch(), 0.0)
        assert losses["kl"].item() == pytest.approx((losses["loss"] - losses["teacher_entropy"]).item(), abs=1e-5)
        assert losses["below_ln_k"].item() == pytest.approx(math.log(64) - losses["loss"].item(), abs=1e-5)
        signs = objective.diagnostics()
        assert 0 < signs["feature_std"] <= 1.01
        assert 1 <= signs["rankme"] <= 4.01  # four images
        assert 1 / 8 <= signs["prototypes_used"] <= 1  # eight crops


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_prototypes": 1}, "num_prototypes=1: must be at least 2"),
        ({"student_temp": 0.0}, "student_temp=0.0: must be above 0"),
        ({"ema_momentum": 1.5}, r"ema_momentum=1.5: must lie in \[0, 1\]"),
        ({"blur_prob": (1.0, 2.0, 0.0)}, "blur_prob"),
        ({"global_crop_scale": (0.0, 1.0)}, "global_crop_scale"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DINOConfig(**settings)


def test_local_crops_must_fit_the_patches() -> None:
    with pytest.raises(ValueError, match=r"local_crop_size=20: the height 20 .*nearest that are: 16 and 24"):
        DINOConfig(local_crop_size=20).build_transform(spec(32))


def test_local_crops_are_no_larger_than_global_ones() -> None:
    with pytest.raises(ValueError, match=r"larger than the global crops, \(64, 64\); \[24, 24\] would be"):
        DINOConfig().build_transform(spec(64))


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_is_over_the_views_of_all_images_together(iterations: int) -> None:
    objective = build(centering="sinkhorn", sinkhorn_iterations=iterations)
    logits = torch.randn(2, 5, 64)
    probs = objective.center_probs(logits, objective.center, 0.05)
    torch.testing.assert_close(probs.flatten(0, 1), sinkhorn_knopp(logits.flatten(0, 1), 0.05, iterations))


def test_signs_are_of_all_micro_batches_of_a_step() -> None:
    objective = build()
    for _ in range(4):
        objective(random_batch(1), 0.25)
    assert objective.diagnostics()["feature_std"].isfinite()
    objective(random_batch(3), 0.5)
    assert objective.diagnostics()["rankme"] <= 3.01


def test_any_number_and_shape_of_crops() -> None:
    objective = DINOConfig(**{**SMALL, "num_local_crops": 0}).build(encoder(in_chans=5))
    transform = objective.config.build_transform(spec(32, normalization=grey(5)))
    image = torch.randint(0, 256, (5, 40, 50), dtype=torch.uint8)
    sample = transform(image, np.random.default_rng(0))
    batch = {name: torch.stack([value, value]) for name, value in sample.items()}
    assert objective(transform.on_device(batch, torch.device("cpu")), 0.0)["loss"].isfinite()


class TestInitialisation:
    """The golden weights replace all of these, so they are looked at by themselves."""

    @pytest.mark.parametrize(("config", "std"), [(DINOConfig, 0.02), (DINOv2Config, 1e-6)])
    def test_tokens_and_positions_are_the_papers(self, config: type[DINOConfig], std: float) -> None:
        wide = {"embed_dim": 384, "depth": 1, "num_heads": 6}
        built = config(**SMALL).build(EncoderConfig(arch="vit_small_patch16_224", image_size=64, **wide).build())
        vit = built.encoder.vit
        assert vit.cls_token.std().item() == pytest.approx(std, rel=0.2)
        assert vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
        for name, module in vit.named_modules():
            if isinstance(module, torch.nn.Linear):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
                assert torch.equal(module.bias, torch.zeros_like(module.bias)), name
            elif isinstance(module, torch.nn.LayerNorm):
                assert torch.equal(module.weight, torch.ones_like(module.weight)), name
                assert torch.equal(module.bias, torch.zeros_like(module.bias)), name
        # The patch projection is left as torch makes it: uniform within 1 / sqrt(inputs).
        projection = vit.patch_embed.proj.weight
        assert projection.abs().max().item() == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.01)
        assert torch.equal(vit.cls_token, built.teacher_encoder.vit.cls_token)

    def test_registers_mask_token_and_layer_scale_of_dinov2(self) -> None:
        arch = {**TINY, "arch": "vit_small_patch14_reg4_dinov2", "embed_dim": 96}
        built = DINOv2Config(**SMALL).build(EncoderConfig(image_size=32, layer_scale=1e-5, **arch).build())
        vit = built.encoder.vit
        assert vit.reg_token.std().item() == pytest.approx(1e-6, rel=0.2)
        assert vit.cls_token.abs().max() < 1e-5
        assert not built.mask_token.any()
        for block in vit.blocks:
            assert torch.equal(block.ls1.gamma, torch.full((96,), 1e-5))

    def test_pretrained_tokens_stay(self) -> None:
        start = encoder()
        start.is_pretrained = True
        before = start.vit.cls_token.clone()
        assert torch.equal(DINOConfig(**SMALL).build(start).encoder.vit.cls_token, before)

    def test_a_backbone_without_a_class_token_has_none_to_fill(self) -> None:
        assert DINOConfig(**SMALL).build(encoder(arch="vit_base_patch16_siglip_224")).encoder.vit.cls_token is None
