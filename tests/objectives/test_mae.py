import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ssl_vit.export.interop import load_reference
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.patches import patchify
from ssl_vit.models.vit import ViT, set_fused_attention
from ssl_vit.objectives.mae import MAE, MAEConfig, normalize_patches
from tests.conftest import GOLDEN, TINY
from tests.families import FAMILIES
from tests.specs import grey, spec

SMALL_DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


def build(encoder: Encoder, **settings) -> MAE:
    return MAEConfig(**{**SMALL_DECODER, **settings}).build(encoder)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "mae_reference.safetensors")


@pytest.fixture
def reference(tiny_encoder: ViT) -> MAE:
    objective = build(tiny_encoder)
    load_reference(objective, GOLDEN / "mae_reference.safetensors")
    return objective


def keep_of(golden: dict[str, torch.Tensor]) -> torch.Tensor:
    return golden["noise"].argsort(dim=1)[:, :4]


class TestAgainstThePapersCode:
    def test_position_tables(self, golden: dict[str, torch.Tensor]) -> None:
        fresh = build(EncoderConfig(image_size=32, pos_embed="sincos", **TINY).build())
        assert torch.equal(fresh.decoder_pos_embed, golden["model.decoder_pos_embed"])
        assert torch.equal(fresh.encoder.vit.pos_embed, golden["model.pos_embed"])

    def test_latent(self, reference: MAE, golden: dict[str, torch.Tensor]) -> None:
        cls, patches = reference.encoder(golden["images"], keep=keep_of(golden))
        latent = torch.cat([cls[:, None], patches], dim=1)
        torch.testing.assert_close(latent, golden["latent"], rtol=1e-4, atol=1e-5)

    def test_prediction(self, reference: MAE, golden: dict[str, torch.Tensor]) -> None:
        prediction = reference.reconstruct(golden["images"], keep_of(golden))
        torch.testing.assert_close(prediction, golden["pred"], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("norm_pix_loss", "key"), [(True, "loss_norm_pix"), (False, "loss_raw")])
    def test_losses(self, tiny_encoder: ViT, golden: dict[str, torch.Tensor], norm_pix_loss: bool, key: str) -> None:
        objective = build(tiny_encoder, norm_pix_loss=norm_pix_loss)
        load_reference(objective, GOLDEN / "mae_reference.safetensors")
        loss = objective({"images": golden["images"], "keep": keep_of(golden)}, 0.0)["loss"]
        assert loss.item() == pytest.approx(golden[key].item(), rel=1e-4)

    def test_gradient_norm(self, reference: MAE, golden: dict[str, torch.Tensor]) -> None:
        reference({"images": golden["images"], "keep": keep_of(golden)}, 0.0)["loss"].backward()
        norm = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()
        assert norm.item() == pytest.approx(golden["grad_norm_norm_pix"].item(), rel=1e-4)


class TestInitialisation:
    @pytest.fixture
    def objective(self) -> MAE:
        encoder = EncoderConfig(arch="vit_small_patch16_224", image_size=32, patch_size=8, depth=1, pos_embed="sincos")
        return MAEConfig(decoder_embed_dim=256, decoder_depth=1, decoder_num_heads=4).build(encoder.build())

    def test_linear_layers_are_xavier_uniform(self, objective: MAE) -> None:
        for name, module in objective.named_modules():
            if isinstance(module, torch.nn.Linear):
                bound = math.sqrt(6 / (module.in_features + module.out_features))
                assert 0.97 * bound < module.weight.abs().max() <= bound, name
                assert torch.equal(module.bias, torch.zeros_like(module.bias)), name

    def test_the_patch_projection_is_xavier_as_a_linear_layer(self, objective: MAE) -> None:
        weight = objective.encoder.vit.patch_embed.proj.weight
        bound = math.sqrt(6 / (3 * 8 * 8 + 384))
        assert 0.97 * bound < weight.abs().max() <= bound

    def test_tokens_are_normal(self, objective: MAE) -> None:
        assert objective.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
        assert objective.encoder.vit.cls_token.std().item() == pytest.approx(0.02, rel=0.2)


class TestLoss:
    def test_only_removed_patches_count(self, tiny_encoder: ViT) -> None:
        objective = build(tiny_encoder, norm_pix_loss=False)
        images, keep = torch.randn(2, 3, 32, 32), torch.tensor([[0, 3, 9], [15, 7, 1]])
        loss = objective({"images": images, "keep": keep}, 0.0)["loss"]
        prediction = objective.reconstruct(images, keep)
        errors = [
            (prediction[row, patch] - patchify(images, (8, 8))[row, patch]).square().mean()
            for row in range(2)
            for patch in range(16)
            if patch not in keep[row]
        ]
        assert len(errors) == 26
        torch.testing.assert_close(loss, torch.stack(errors).mean())

    def test_is_a_function_of_parameters_and_batch(self, tiny_encoder: ViT) -> None:
        objective = build(tiny_encoder)
        batch = {"images": torch.randn(2, 3, 32, 32), "keep": torch.tensor([[0, 3], [5, 7]])}
        assert torch.equal(objective(batch, 0.0)["loss"], objective(batch, 0.7)["loss"])

    def test_order_of_the_kept_patches_does_not_matter(self, tiny_encoder: ViT) -> None:
        objective = build(tiny_encoder)
        images, keep = torch.randn(2, 3, 32, 32), torch.tensor([[0, 3, 9], [15, 7, 1]])
        forward, backward = (objective.reconstruct(images, order) for order in (keep, keep.flip(1)))
        torch.testing.assert_close(forward, backward)

    def test_normalised_patches_have_unit_unbiased_variance(self) -> None:
        patches = normalize_patches(torch.randn(2, 4, 48) * 3 + 5)
        torch.testing.assert_close(patches.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
        torch.testing.assert_close(patches.var(-1), torch.ones(2, 4), atol=1e-4, rtol=0)

    def test_a_flat_patch_stays_finite(self) -> None:
        assert torch.equal(normalize_patches(torch.full((1, 1, 12), 0.5)), torch.zeros(1, 1, 12))


def test_other_image_sizes_can_be_reconstructed(tiny_encoder: ViT) -> None:
    objective = build(tiny_encoder)
    prediction = objective.reconstruct(torch.randn(1, 3, 16, 64), torch.tensor([[0, 3, 9]]))
    assert prediction.shape == (1, 16, 192)


@pytest.mark.parametrize("in_chans", [1, 5])
def test_non_square_multi_channel_images_without_a_class_token(in_chans: int) -> None:
    encoder = EncoderConfig(
        arch="vit_medium_patch16_gap_256", image_size=(16, 48), patch_size=(8, 16), in_chans=in_chans, depth=1
    ).build()
    objective = build(encoder)
    losses = objective({"images": torch.randn(2, in_chans, 16, 48), "keep": torch.tensor([[0, 3], [5, 1]])}, 0.0)
    losses["loss"].backward()
    assert objective.decoder_pred.out_features == 8 * 16 * in_chans
    assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []


def test_decay_groups_are_the_papers(tiny_encoder: ViT) -> None:
    decayed, undecayed = build(tiny_encoder).param_groups()
    names = {name for name, _ in decayed.params}
    assert {"mask_token", "encoder.vit.cls_token", "decoder_embed.weight"} <= names
    assert all(name.endswith((".weight", "_token")) for name in names)
    assert undecayed.weight_decay_scale == 0
    assert {"encoder.vit.norm.weight", "decoder_pred.bias"} <= {name for name, _ in undecayed.params}
    assert not any("pos_embed" in name for group in (decayed, undecayed) for name, _ in group.params)


def test_transform_draws_crop_flip_and_mask_from_the_samples_generator() -> None:
    transform = MAEConfig(mask_ratio=0.8).build_transform(spec(160, stride=16, normalization=grey(std=0.25)))
    image = torch.randint(0, 256, (3, 200, 300), dtype=torch.uint8)
    first, again, other = (transform(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first["images"].shape == (3, 160, 160)
    assert first["images"].dtype == torch.uint8
    assert len(first["keep"]) == 20  # int() would truncate 19.999
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["keep"], other["keep"])
    batch = transform.on_device({name: torch.stack([first[name], other[name]]) for name in first}, torch.device("cpu"))
    mirrored = first["images"].flip(-1) if first["flip"] else first["images"]
    torch.testing.assert_close(batch["images"][0], (mirrored / 255 - 0.5) / 0.25)


def test_images_without_an_up_are_turned_before_they_are_masked() -> None:
    image = torch.zeros(1, 64, 64, dtype=torch.uint8)
    image[:, :32, :32] = 255
    config = MAEConfig(crop_scale=(1.0, 1.0), flip_prob=0.0, quarter_turn_prob=0.75, flip_vertical_prob=0.5)
    transform = config.build_transform(spec(32, normalization=grey(1)))
    samples = [transform(image, np.random.default_rng(seed)) for seed in range(40)]
    corners = {sample["images"][0].float().view(2, 16, 2, 16).mean(dim=(1, 3)).argmax().item() for sample in samples}
    assert corners == {0, 1, 2, 3}
    assert all(len(sample["keep"]) == 4 for sample in samples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 1.2}, "mask_ratio=1.2"),
        ({"mask_ratio": 0.0}, "mask_ratio=0.0"),
        ({"decoder_embed_dim": 30, "decoder_num_heads": 4}, "decoder_num_heads=4"),
        ({"decoder_depth": 0}, "decoder_depth=0"),
        ({"crop_scale": (0.9, 0.2)}, "crop_scale"),
        ({"flip_prob": -0.1}, "flip_prob=-0.1"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAEConfig(**settings)


def test_a_ratio_that_leaves_nothing_to_see_is_refused(tiny_encoder: ViT) -> None:
    with pytest.raises(ValueError, match=r"mask_ratio=0.99: keeps 0 of 16"):
        build(tiny_encoder, mask_ratio=0.99)


def test_an_encoder_that_cannot_drop_tokens_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"encoder.arch='convnext_tiny': MAE drops tokens before the first block, which this backbone cannot",
    ):
        build(FAMILIES["convnext"].build())


class TestCrossDecoder:
    def batch(self) -> dict[str, torch.Tensor]:
        transform = MAEConfig(decoder="cross", predict_ratio=0.25).build_transform(spec(32))
        rng = np.random.default_rng(0)
        samples = [transform(torch.randint(0, 255, (3, 40, 50), dtype=torch.uint8), rng) for _ in range(3)]
        return transform.on_device(
            {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}, torch.device("cpu")
        )

    def test_predicts_a_share_of_the_removed_patches(self) -> None:
        batch = self.batch()
        assert batch["keep"].shape == (3, 4)
        assert batch["predict"].shape == (3, 4)
        for keep, predict in zip(batch["keep"], batch["predict"], strict=True):
            assert not set(keep.tolist()) & set(predict.tolist())

    def test_the_transform_draws_the_same_crop_and_mask_with_either_decoder(self) -> None:
        image = torch.randint(0, 255, (3, 40, 50), dtype=torch.uint8)
        samples = [
            MAEConfig(**settings).build_transform(spec(32))(image, np.random.default_rng(3))
            for settings in ({}, {"decoder": "cross", "predict_ratio": 0.5})
        ]
        for name in ("images", "flip", "keep"):
            assert torch.equal(samples[0][name], samples[1][name])

    def test_the_loss_is_that_of_the_same_patches_of_a_whole_reconstruction(self, tiny_encoder: ViT) -> None:
        objective, batch = build(tiny_encoder, decoder="cross", predict_ratio=0.25).eval(), self.batch()
        whole = objective.reconstruct(batch["images"], batch["keep"])
        target = normalize_patches(patchify(batch["images"], (8, 8)))
        rows = torch.arange(3)[:, None]
        wanted = (whole[rows, batch["predict"]] - target[rows, batch["predict"]]).square().mean()
        torch.testing.assert_close(objective(batch, 0.0)["loss"], wanted)

    def test_without_a_ratio_all_removed_patches_are_predicted(self, tiny_encoder: ViT) -> None:
        objective = build(tiny_encoder, decoder="cross")
        batch = {name: value for name, value in self.batch().items() if name != "predict"}
        removed = ~torch.zeros(3, 16, dtype=torch.bool).scatter(1, batch["keep"], True)
        error = objective.reconstruct(batch["images"], batch["keep"]) - normalize_patches(
            patchify(batch["images"], (8, 8))
        )
        counts: list[int] = []
        objective.decoder_blocks[0].register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[1]))
        torch.testing.assert_close(objective(batch, 0.0)["loss"], error[removed].square().mean())
        assert counts == [12]  # and none of the kept ones

    def test_checkpointing_computes_blocks_again_with_the_same_gradients(self, tiny_encoder: ViT) -> None:
        objective, batch = build(tiny_encoder, decoder="cross", predict_ratio=0.25), self.batch()
        passes: list[int] = []
        objective.decoder_blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
        found = []
        for again in (False, True):
            objective.encoder.grad_checkpointing = again
            objective.zero_grad()
            objective(batch, 0.0)["loss"].backward()
            found.append({name: value.grad for name, value in objective.named_parameters() if value.requires_grad})
        assert len(passes) == 3
        for name, gradient in found[0].items():
            assert torch.equal(gradient, found[1][name]), name

    def test_a_prediction_depends_on_visible_patches_and_not_on_what_else_is_predicted(self, tiny_encoder: ViT) -> None:
        objective, batch = build(tiny_encoder, decoder="cross").eval(), self.batch()
        features = objective.encoder(batch["images"], keep=batch["keep"])
        both = objective._predict(features, batch["predict"], (4, 4))
        one = objective._predict(features, batch["predict"][:, 2:3], (4, 4))
        torch.testing.assert_close(both[:, 2:3], one)

    def test_every_parameter_learns_and_plain_attention_is_fused_attention(self, tiny_encoder: ViT) -> None:
        objective, batch = build(tiny_encoder, decoder="cross", predict_ratio=0.25), self.batch()
        loss = objective(batch, 0.0)["loss"]
        loss.backward()
        assert all(parameter.grad is not None for parameter in objective.parameters() if parameter.requires_grad)
        set_fused_attention(objective, False)
        assert not objective.decoder_blocks[0].attn.fused_attn
        torch.testing.assert_close(objective(batch, 0.0)["loss"], loss)

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"predict_ratio": 0.25}, "decoder='cross'"),
            ({"decoder": "cross", "predict_ratio": 0.8}, "at most mask_ratio"),
        ],
    )
    def test_settings_that_cannot_work(self, settings: dict, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            MAEConfig(**settings)
