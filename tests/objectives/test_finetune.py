import dataclasses
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.vit import ViT
from ssl_vit.objectives.finetune import AttentiveConfig, FineTune, FineTuneConfig
from ssl_vit.objectives.objective import RunSize
from tests.conftest import TINY
from tests.families import FAMILIES


def batch(num: int = 4) -> dict[str, torch.Tensor]:
    return {"images": torch.randn(num, 3, 32, 32), "targets": torch.eye(3)[torch.arange(num) % 3]}


def test_mean_pooling_leaves_out_the_class_token_and_normalises_after_pooling(tiny_encoder: ViT) -> None:
    """As timm's own model with average pooling."""
    objective = FineTuneConfig(num_classes=3, head_init=0.5).build(tiny_encoder)
    reference = timm.create_model(
        TINY["arch"], img_size=32, num_classes=3, global_pool="avg", **{k: v for k, v in TINY.items() if k != "arch"}
    )
    tensors = {**objective.encoder.vit.state_dict(), **objective.classifier.state_dict()}
    reference.load_state_dict(tensors)
    images = batch()["images"]
    torch.testing.assert_close(objective.eval().logits(images)["head"], reference.eval()(images))
    assert isinstance(objective.encoder.vit.norm, torch.nn.Identity)


def test_the_class_token_can_be_classified(tiny_encoder: ViT) -> None:
    objective = FineTuneConfig(num_classes=3, pool="cls").build(tiny_encoder)
    images = batch()["images"]
    expected = objective.classifier.head(tiny_encoder(images).cls)
    torch.testing.assert_close(objective.logits(images)["head"], expected)


def test_learning_rates_decay_towards_the_input(tiny_encoder: ViT) -> None:
    """decay^(layers + 1 - l): embeddings are layer 0, block i is i + 1, norm and head the last (MAE, BEiT)."""
    objective = FineTuneConfig(num_classes=3, layer_decay=0.5).build(tiny_encoder)
    scales = {name: group.lr_scale for group in objective.param_groups() for name, _ in group.params}
    decays = {name: group.weight_decay_scale for group in objective.param_groups() for name, _ in group.params}
    assert scales["encoder.vit.patch_embed.proj.weight"] == scales["encoder.vit.pos_embed"] == 0.5**3
    assert scales["encoder.vit.blocks.0.attn.qkv.weight"] == 0.5**2
    assert scales["encoder.vit.blocks.1.mlp.fc1.bias"] == 0.5
    assert scales["classifier.fc_norm.weight"] == scales["classifier.head.weight"] == 1
    assert {name for name, decay in decays.items() if decay == 0} == {
        name for name, p in objective.named_parameters() if p.ndim == 1 or name.endswith(("pos_embed", "cls_token"))
    }


@pytest.mark.parametrize("config", [*FAMILIES.values(), EncoderConfig(image_size=32, **TINY)], ids=lambda c: c.arch)
def test_learning_rates_and_weight_decay_are_timms(config: EncoderConfig) -> None:
    """In every family; but the final norm is one layer later than in timm, as the head is."""
    encoder = config.build()
    objective = FineTuneConfig(num_classes=3, layer_decay=0.5).build(encoder)
    model, named = timms(objective)
    groups = param_groups_layer_decay(
        model, 1.0, getattr(model, "no_weight_decay", set)(), layer_decay=0.5, weight_decay_exclude_1d=True
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    theirs = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    ours = {named[n]: (g.lr_scale, g.weight_decay_scale) for g in objective.param_groups() for n, _ in g.params}
    assert ours == {name: (1.0, 0.0) if name.startswith("norm.") else found for name, found in theirs.items()}


def timms(objective: FineTune) -> tuple[Any, dict[str, str]]:
    """timm's own classifier of the architecture, and its names of an objective's parameters."""
    encoder, pooled = objective.encoder, objective.pooled
    arguments, _ = encoder.timm_arguments(pooled, norm_pooled=pooled == "mean")
    model = timm.create_model(encoder.config.arch, num_classes=3, in_chans=encoder.in_chans, **arguments)
    named = {name: name.split(".", 2)[-1] for name, _ in objective.encoder.named_parameters("encoder")}
    heads = dict(zip(("head", "head_dist"), encoder.head_names, strict=False))
    for name, _ in objective.classifier.named_parameters():
        module, _, kind = name.partition(".")
        named[f"classifier.{name}"] = f"{heads.get(module, module)}.{kind}"
    return model, named


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_both_heads_of_distilled_deit_learn_from_the_averaged_logits(pool: str) -> None:
    objective = FineTuneConfig(num_classes=3, pool=pool, head_init=0.5).build(FAMILIES["distilled"].build())
    assert objective.pooled == "cls"  # the architecture's own, whatever `pool` says
    model, named = timms(objective)
    model.load_state_dict({named[name]: value for name, value in objective.named_parameters()})
    given = {"images": torch.randn(2, 3, 64, 64), "targets": torch.eye(3)[:2]}
    logits = model(given["images"])
    torch.testing.assert_close(objective.logits(given["images"])["head"], logits, rtol=1e-4, atol=1e-5)
    objective(given, 0.5)["loss"].backward()
    (-(given["targets"] * logits.log_softmax(dim=1)).sum(dim=1).mean()).backward()
    gradients = {named[name]: parameter.grad for name, parameter in objective.named_parameters()}
    assert gradients["head.weight"].abs().sum() > 0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_fixed_positions_are_trained_too(tiny_encoder: ViT) -> None:
    assert not tiny_encoder.vit.pos_embed.requires_grad
    assert FineTuneConfig(num_classes=3).build(tiny_encoder).encoder.vit.pos_embed.requires_grad


def test_the_average_of_weights_is_what_is_tested(tiny_encoder: ViT) -> None:
    objective = FineTuneConfig(num_classes=3, model_ema=0.75, head_init=0.5).build(tiny_encoder).train()
    assert not objective.ema_encoder.training
    before = objective.classifier.head.weight.detach().clone()
    with torch.no_grad():
        objective.classifier.head.weight.add_(1)
        objective.encoder.vit.cls_token.add_(1)
    objective.after_step(0.5)
    torch.testing.assert_close(objective.tested_classifier().head.weight, before + 0.25)
    assert objective.backbone() is objective.ema_encoder
    images = batch()["images"]
    features = objective.ema_encoder(images).patches.mean(dim=1)
    torch.testing.assert_close(objective.logits(images)["head"], objective.ema_classifier([features]))
    assert not any(p.requires_grad for p in objective.ema_encoder.parameters())


def test_the_loss_is_cross_entropy_with_soft_targets(tiny_encoder: ViT) -> None:
    objective = FineTuneConfig(num_classes=3, head_init=0.5).build(tiny_encoder).eval()
    given = {**batch(), "targets": torch.softmax(torch.randn(4, 3), dim=1)}
    logits = objective.logits(given["images"])["head"]
    expected = -(given["targets"] * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(objective(given, 0.5)["loss"], expected)


def test_the_number_of_classes_follows_from_the_source() -> None:
    found = FineTuneConfig().resolve(RunSize(100, 10, 10, num_classes=7))
    assert found["num_classes"].value == 7
    assert FineTuneConfig(num_classes=9).resolve(RunSize(100, 10, 10, num_classes=7)) == {}
    with pytest.raises(ValueError, match=r"^num_classes=5: the source has 7 classes"):
        FineTuneConfig(num_classes=5).resolve(RunSize(100, 10, 10, num_classes=7))
    with pytest.raises(ValueError, match="num_classes='auto'"):
        FineTuneConfig().build(EncoderConfig(image_size=32, **TINY).build())


def test_attentive_probes_share_a_frozen_encoder_and_see_patch_tokens_only(tiny_encoder: ViT) -> None:
    objective = AttentiveConfig(num_classes=3).build(tiny_encoder).train()
    assert not objective.encoder.training
    losses = objective(batch(), 0.5)
    losses["loss"].backward()
    assert all(p.grad is not None for p in objective.probes.parameters())
    assert all(p.grad is None for p in objective.encoder.parameters())
    images = batch()["images"]
    before = objective.logits(images)["lr_1"]
    tokens = tiny_encoder(images).patches
    torch.testing.assert_close(before, objective.probes[2](tokens))
    # Attention over a set: the order of the patches does not matter, and the class token is not among them.
    torch.testing.assert_close(before, objective.probes[2](tokens.flip(1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["distilled", "hybrid", "eva02", "swin", "convnext"])
def test_attentive_probes_learn_from_the_tokens_of_every_family(family: str) -> None:
    encoder = FAMILIES[family].build()
    objective = AttentiveConfig(num_classes=3, lr_scales=(1.0,)).build(encoder).train()
    images = torch.randn(2, 3, *encoder.image_size)
    objective({"images": images, "targets": torch.eye(3)[:2]}, 0.5)["loss"].backward()
    assert all(parameter.grad is not None for parameter in objective.probes.parameters())
    expected = objective.probes[0](encoder(images).patches)
    torch.testing.assert_close(objective.logits(images)["lr_1"], expected, rtol=1e-4, atol=1e-5)


def test_each_probe_learns_as_if_it_were_alone() -> None:
    def trained(lr_scales: tuple[float, ...]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        encoder = EncoderConfig(image_size=32, **TINY).build()
        objective = AttentiveConfig(num_classes=3, lr_scales=lr_scales).build(encoder)
        groups = [
            {"params": [p for _, p in group.params], "lr": 0.01 * group.lr_scale} for group in objective.param_groups()
        ]
        optimizer = torch.optim.AdamW(groups)
        given = batch(6)
        for _ in range(3):
            objective(given, 0.5)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        return objective.logits(given["images"])

    both, alone = trained((0.1, 1.0)), trained((1.0,))
    torch.testing.assert_close(both["lr_1"], alone["lr_1"])
    assert not torch.allclose(both["lr_0.1"], both["lr_1"])


@pytest.mark.parametrize(
    ("config", "setting", "value"),
    [
        (FineTuneConfig, "layer_decay", 0.0),
        (FineTuneConfig, "model_ema", 1.0),
        (FineTuneConfig, "head_init", 0.0),
        (AttentiveConfig, "lr_scales", ()),
        (AttentiveConfig, "lr_scales", (1.0, 1.0)),
        (AttentiveConfig, "num_heads", 0),
    ],
)
def test_settings_out_of_range_are_refused(config: type, setting: str, value) -> None:
    with pytest.raises(ValueError, match=f"^{setting}="):
        config(**{setting: value})


def test_the_defaults_are_the_papers() -> None:
    config = FineTuneConfig()
    assert (config.mixup, config.cutmix, config.label_smoothing, config.random_erasing) == (0.8, 1.0, 0.1, 0.25)
    assert (config.rand_augment, config.layer_decay, config.pool) == ("rand-m9-mstd0.5-inc1", 0.65, "mean")
    assert dataclasses.asdict(config)["head_init"] == 2e-5
