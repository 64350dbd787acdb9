"""Every encoder with every objective: what the loop relies on must hold for each pair."""

import copy
import dataclasses
import functools
import json
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from ssl_vit.data.augment.multicrop import MultiCropConfig
from ssl_vit.data.transform import InputSpec
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.encoder import Encoder
from ssl_vit.objectives.dino import DINOConfig
from ssl_vit.objectives.dinov2 import DINOv2Config
from ssl_vit.objectives.distill import DistillConfig
from ssl_vit.objectives.fcmae import FCMAEConfig
from ssl_vit.objectives.finetune import FineTuneConfig
from ssl_vit.objectives.lejepa import LeJEPAConfig
from ssl_vit.objectives.mae import MAEConfig
from ssl_vit.objectives.objective import Objective, ObjectiveConfig
from ssl_vit.objectives.simmim import SimMIMConfig
from tests.backbones import teacher_folder
from tests.conftest import TINY
from tests.families import CANNOT_DROP, CANNOT_MASK, FAMILIES
from tests.specs import grey

ENCODERS = {
    "vit": EncoderConfig(image_size=32, **TINY),
    "vit, fixed positions, not square": EncoderConfig(image_size=(16, 48), pos_embed="sincos", **TINY),
    "vit, one channel, drop path": EncoderConfig(image_size=32, in_chans=1, drop_path_rate=0.3, **TINY),
    "vit, registers, LayerScale": EncoderConfig(arch="vit_small_patch14_reg4_dinov2", image_size=42, depth=1),
    "vit, no class token": EncoderConfig(arch="vit_medium_patch16_gap_256", image_size=64, depth=1),
    **FAMILIES,
    "vit, SwiGLU": EncoderConfig(arch="vit_giant_patch14_dinov2", image_size=42, depth=1, embed_dim=96, num_heads=4),
}
SMALL_HEAD = {"num_prototypes": 32, "hidden_dim": 24, "bottleneck_dim": 8, "num_local_crops": 2}
OBJECTIVES = {
    "mae": MAEConfig(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2),
    "dino": DINOConfig(**SMALL_HEAD),
    "dinov2": DINOv2Config(**SMALL_HEAD, mask_prob=1.0, ibot_separate_head=True),
    "finetune, mean": FineTuneConfig(num_classes=3, rand_augment=None),
    "finetune, class token, average of weights": FineTuneConfig(
        num_classes=3, pool="cls", model_ema=0.9, rand_augment=None
    ),
    "simmim": SimMIMConfig(),
    "simmim, normalised target": SimMIMConfig(norm_target=5, mask_ratio=0.3),
    "fcmae": FCMAEConfig(decoder_embed_dim=16),
    "lejepa": LeJEPAConfig(hidden_dim=24, projection_dim=8, num_directions=16, num_local_crops=2),
    "lejepa, SIGReg": LeJEPAConfig(regulariser="sigreg", hidden_dim=24, projection_dim=8, num_local_crops=0),
    "simdino": DINOConfig(**SMALL_HEAD, loss="coding_rate"),
    "simdinov2": DINOv2Config(**SMALL_HEAD, loss="coding_rate", mask_prob=1.0, koleo_weight=0.0),
    "distill": DistillConfig(queue_size=6),
    "distill, the image alone": DistillConfig(queue_size=2, local_weight=0, teacher_feature="mean", mixup=False),
    "dinov2, centred, shared head, trainable norms": DINOv2Config(**SMALL_HEAD, mask_prob=1.0, centering="center"),
}


def refusal(encoder: str, objective: str) -> str | None:
    """What is said of a pair that cannot work; None for a pair that works."""
    if objective == "mae" and encoder in CANNOT_DROP:
        return "encoder.arch=.*: MAE drops tokens before the first block, which this backbone cannot; use a Vision"
    if objective.startswith(("dinov2", "simdinov2")) and encoder in CANNOT_MASK:
        return "ibot_weight=1.0: iBOT masks tokens, which .* cannot.*; use ibot_weight 0, DINO, or"
    if objective.startswith("simmim") and encoder in CANNOT_MASK:
        return "encoder.arch=.*: SimMIM masks tokens, and this stem mixes pixels of neighbours; use vit_"
    if objective == "fcmae" and encoder not in ("convnext", "convnextv2"):
        return "encoder.arch=.*: FCMAE computes from visible tokens alone, which this backbone cannot; use convnextv2_"
    return None


PAIRS = [(encoder, objective) for encoder in ENCODERS for objective in OBJECTIVES]
WORKING = [pair for pair in PAIRS if refusal(*pair) is None]


@pytest.fixture(params=ENCODERS, ids=str)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return build(request.param)


def build(name: str) -> Encoder:
    return copy.deepcopy(_built(name))


@functools.cache
def _built(name: str) -> Encoder:
    torch.manual_seed(0)
    return ENCODERS[name].build()


@pytest.fixture(params=WORKING, ids=" + ".join)
def names(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def config(names: tuple[str, str]) -> ObjectiveConfig:
    return config_of(names[1], _built(names[0]))


def config_of(name: str, encoder: Encoder) -> ObjectiveConfig:
    config = OBJECTIVES[name]
    if isinstance(config, MultiCropConfig):  # one or two tokens a side
        config = dataclasses.replace(config, local_crop_size=encoder.stride)
    if isinstance(config, DistillConfig):
        config = dataclasses.replace(config, teacher=str(teacher_folder(encoder.in_chans)))
    if isinstance(config, SimMIMConfig):
        config = dataclasses.replace(config, mask_unit=encoder.stride[0])
    return config


@pytest.fixture
def objective(names: tuple[str, str], config: ObjectiveConfig) -> Objective:
    return config.build(build(names[0]))


@pytest.fixture
def batch(names: tuple[str, str]) -> dict[str, Tensor]:
    return _batch(names)


@functools.cache
def _batch(names: tuple[str, str]) -> dict[str, Tensor]:
    encoder = _built(names[0])
    transform = config_of(names[1], encoder).build_transform(
        InputSpec(encoder.image_size, encoder.stride, grey(encoder.in_chans))
    )
    image = torch.randint(0, 256, (encoder.in_chans, 70, 80), dtype=torch.uint8)
    samples = [transform(image, np.random.default_rng(seed)) | {"label": torch.tensor(seed % 3)} for seed in range(4)]
    return transform.on_device(
        {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}, torch.device("cpu")
    )


@pytest.mark.parametrize("names", [pair for pair in PAIRS if pair not in WORKING], ids=" + ".join)
def test_a_pair_that_cannot_work_is_refused_when_it_is_built(names: tuple[str, str]) -> None:
    encoder = build(names[0])
    with pytest.raises(ValueError, match=f"^{refusal(*names)}") as raised:
        config_of(names[1], encoder).build(encoder)
    assert "\n" not in str(raised.value)


def test_losses_are_finite_scalars(objective: Objective, batch: dict[str, Tensor]) -> None:
    losses = objective(batch, 0.5)
    assert losses["loss"].requires_grad
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())


def test_every_trainable_parameter_gets_a_gradient(objective: Objective, batch: dict[str, Tensor]) -> None:
    objective.eval()  # drop path would skip a block now and then
    objective(batch, 0.5)["loss"].backward()
    trainable = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert [name for name, p in trainable.items() if p.grad is None] == []
    assert [name for name, p in objective.named_parameters() if not p.requires_grad and p.grad is not None] == []
    assert [name for name in trainable if "teacher" in name] == []


def test_groups_hold_every_trainable_parameter_once(objective: Objective) -> None:
    names = sorted(name for group in objective.param_groups() for name, _ in group.params)
    assert names == sorted(name for name, p in objective.named_parameters() if p.requires_grad)


def test_a_step_changes_the_backbone_and_forward_is_deterministic(
    objective: Objective, batch: dict[str, Tensor]
) -> None:
    optimizer = torch.optim.AdamW((p for p in objective.parameters() if p.requires_grad), lr=1e-2)
    before = [p.detach().clone() for p in objective.backbone().parameters()]
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        losses.append(objective(batch, 0.5)["loss"])
    assert torch.equal(losses[0], losses[1])
    losses[1].backward()
    optimizer.step()
    objective.after_step(0.5)
    changed = [not torch.equal(old, new) for old, new in zip(before, objective.backbone().parameters(), strict=True)]
    assert any(changed)


def test_diagnostics_are_finite_scalars_and_can_be_judged(objective: Objective, batch: dict[str, Tensor]) -> None:
    values = objective(batch, 0.5) | objective.diagnostics()
    assert all(value.ndim == 0 and value.isfinite() for value in values.values())
    objective.diagnose({name: value.item() for name, value in values.items()})


def test_layers_run_from_the_embeddings_to_the_last_norm(encoder: Encoder) -> None:
    layers = [encoder.layer_of(name) for name, _ in encoder.named_parameters()]
    assert set(layers) == set(range(encoder.num_layers + 2))


def test_the_backbone_is_part_of_the_state(objective: Objective) -> None:
    assert any(module is objective.backbone() for module in objective.modules())
    assert isinstance(objective.encoder, Encoder)


def test_features_have_the_contracts_shapes(encoder: Encoder) -> None:
    height, width = encoder.image_size
    features = encoder(torch.randn(2, encoder.in_chans, height, width))
    assert features.cls.shape == (2, encoder.embed_dim)
    assert features.patches.shape == (2, encoder.num_patches, encoder.embed_dim)


def test_the_last_layers_end_with_the_features(encoder: Encoder) -> None:
    images = torch.randn(2, encoder.in_chans, *encoder.image_size)
    whole = encoder.eval()(images)
    layers = encoder.last_layers(images, encoder.num_last_layers)
    assert len(layers) == encoder.num_last_layers
    assert {layer.patches.shape for layer in layers} == {whole.patches.shape}
    for found, expected in zip(layers[-1], whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=rf"num_layers={encoder.num_last_layers + 1}: the last .* share width and grid"
    ):
        encoder.last_layers(images, encoder.num_last_layers + 1)


def test_groups_of_several_sizes_have_the_features_of_single_calls(encoder: Encoder) -> None:
    small = (encoder.stride[0], 2 * encoder.stride[1])
    groups = [torch.randn(2, encoder.in_chans, *size) for size in (encoder.image_size, small)]
    for features, images in zip(encoder.eval().forward_groups(groups), groups, strict=True):
        rows, columns = encoder.grid_of(*images.shape[-2:])
        assert features.patches.shape == (2, rows * columns, encoder.embed_dim)
        for found, expected in zip(features, encoder(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_size_that_the_stride_does_not_divide_is_refused(encoder: Encoder) -> None:
    height, width = encoder.image_size
    with pytest.raises(ValueError, match=rf"the width {width + 1} is no multiple of {encoder.stride[1]}"):
        encoder(torch.randn(1, encoder.in_chans, height, width + 1))


def test_recomputed_blocks_give_the_same_gradients(encoder: Encoder) -> None:
    images = torch.randn(2, encoder.in_chans, *encoder.image_size)
    again = dataclasses.replace(encoder.config, grad_checkpointing=True).build()
    again.load_state_dict(encoder.state_dict())
    gradients = []
    for built in (encoder, again):
        torch.manual_seed(1)  # drop path
        features = built(images)
        (features.cls.square().sum() + features.patches.square().sum()).backward()
        gradients.append([p.grad for p in built.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-4)


def test_the_settings_build_the_encoder_again(encoder: Encoder) -> None:
    plain = json.loads(json.dumps(dataclasses.asdict(encoder.config)))
    again = EncoderConfig.from_plain(plain).build().eval()
    again.load_state_dict(encoder.state_dict())
    images = torch.randn(1, encoder.in_chans, *encoder.image_size)
    assert torch.equal(again(images).patches, encoder.eval()(images).patches)


def test_timm_builds_the_model_from_its_arguments(encoder: Encoder) -> None:
    arguments, _ = encoder.timm_arguments("cls")
    arch = encoder.config.arch
    model: Any = timm.create_model(arch, num_classes=0, in_chans=encoder.in_chans, **arguments)
    model.load_state_dict(encoder.model.state_dict())
    images = torch.randn(1, encoder.in_chans, *encoder.image_size)
    tokens = model.eval().forward_features(images)
    pooled = model.forward_head(tokens, pre_logits=True)
    if encoder.has_cls_token and "_distilled" not in arch:
        torch.testing.assert_close(encoder.eval()(images).cls, pooled, rtol=1e-4, atol=1e-5)
    if not encoder.has_cls_token and hasattr(encoder, "net"):
        torch.testing.assert_close(encoder.eval()(images).cls, pooled, rtol=1e-4, atol=1e-5)


def test_masked_tokens_hide_their_pixels(encoder: Encoder) -> None:
    images = torch.randn(1, encoder.in_chans, *encoder.image_size)
    mask = torch.zeros(1, encoder.num_patches, dtype=torch.bool)
    mask[0, -1] = True
    token = torch.randn(encoder.mask_dim)
    if not encoder.supports_mask:
        assert encoder.config.arch in {FAMILIES[name].arch for name in CANNOT_MASK}
        return
    changed = images.clone()
    changed[:, :, -encoder.stride[0] :, -encoder.stride[1] :] = 3.0  # the last token's pixels
    masked, hidden = (encoder.eval()(each, mask=mask, mask_token=token) for each in (images, changed))
    torch.testing.assert_close(masked.patches, hidden.patches, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(masked.patches[0, -1], encoder(images).patches[0, -1], atol=1e-3)
    with pytest.raises(ValueError, match="mask is given without mask_token"):
        encoder(images, mask=mask)


def test_only_kept_patches_come_back(encoder: Encoder) -> None:
    if not encoder.supports_keep:
        assert encoder.config.arch in {FAMILIES[name].arch for name in CANNOT_DROP}
        with pytest.raises(ValueError, match=r"^keep: "):
            encoder(torch.randn(1, encoder.in_chans, *encoder.image_size), keep=torch.tensor([[0]]))
        return
    features = encoder(torch.randn(2, encoder.in_chans, *encoder.image_size), keep=torch.tensor([[2, 0], [1, 3]]))
    assert features.patches.shape == (2, 2, encoder.embed_dim)
