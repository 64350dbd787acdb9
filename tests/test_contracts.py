"""Every encoder with every objective: what the loop relies on must hold for each pair."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_vit.data.transform import InputSpec
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.encoder import Encoder
from ssl_vit.objectives.dino import DINOConfig
from ssl_vit.objectives.dinov2 import DINOv2Config
from ssl_vit.objectives.finetune import FineTuneConfig
from ssl_vit.objectives.mae import MAEConfig
from ssl_vit.objectives.objective import Objective, ObjectiveConfig
from tests.conftest import TINY
from tests.specs import grey

ENCODERS = {
    "vit": EncoderConfig(image_size=32, **TINY),
    "vit, fixed positions, not square": EncoderConfig(image_size=(16, 48), pos_embed="sincos", **TINY),
    "vit, one channel, drop path": EncoderConfig(image_size=32, in_chans=1, drop_path_rate=0.3, **TINY),
    "vit, registers, LayerScale": EncoderConfig(arch="vit_small_patch14_reg4_dinov2", image_size=42, depth=1),
    "vit, no class token": EncoderConfig(arch="vit_medium_patch16_gap_256", image_size=64, depth=1),
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
    "dinov2, centred, shared head, trainable norms": DINOv2Config(**SMALL_HEAD, mask_prob=1.0, centering="center"),
}


@pytest.fixture(params=ENCODERS, ids=str)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    torch.manual_seed(0)
    return ENCODERS[request.param].build()


@pytest.fixture(params=OBJECTIVES, ids=str)
def config(request: pytest.FixtureRequest, encoder: Encoder) -> ObjectiveConfig:
    config = OBJECTIVES[request.param]
    if isinstance(config, DINOConfig):  # one or two patches a side
        config = dataclasses.replace(config, local_crop_size=encoder.stride)
    return config


@pytest.fixture
def objective(encoder: Encoder, config: ObjectiveConfig) -> Objective:
    return config.build(encoder)


@pytest.fixture
def batch(encoder: Encoder, config: ObjectiveConfig) -> dict[str, Tensor]:
    transform = config.build_transform(InputSpec(encoder.image_size, encoder.stride, grey(encoder.in_chans)))
    image = torch.randint(0, 256, (encoder.in_chans, 70, 80), dtype=torch.uint8)
    samples = [transform(image, np.random.default_rng(seed)) | {"label": torch.tensor(seed % 3)} for seed in range(4)]
    return transform.on_device(
        {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}, torch.device("cpu")
    )


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


def test_only_kept_patches_come_back(encoder: Encoder) -> None:
    if not encoder.supports_keep:
        pytest.skip("this encoder cannot drop tokens")
    features = encoder(torch.randn(2, encoder.in_chans, *encoder.image_size), keep=torch.tensor([[2, 0], [1, 3]]))
    assert features.patches.shape == (2, 2, encoder.embed_dim)
