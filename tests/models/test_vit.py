import pytest
import torch

from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.vit import ViT, choose_attention
from tests.conftest import TINY

ARCHS = [
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",  # positions without a class token
    "vit_small_patch14_reg4_dinov2",  # registers, LayerScale
    "vit_base_patch16_siglip_224",  # no class token
    "vit_base_patch16_clip_224",  # norm before the blocks
    "vit_medium_patch16_gap_256",  # mean pooling
]


@pytest.mark.parametrize("arch", ARCHS)
def test_features_are_timms(arch: str) -> None:
    encoder = EncoderConfig(arch=arch, image_size=112, depth=2).build().eval()
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        cls, patches = encoder(images)
        tokens = encoder.vit.forward_features(images)
    num_prefix = encoder.vit.num_prefix_tokens
    torch.testing.assert_close(patches, tokens[:, num_prefix:], rtol=1e-4, atol=1e-5)
    expected = tokens[:, 0] if encoder.has_cls_token else tokens[:, num_prefix:].mean(1)
    torch.testing.assert_close(cls, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_parameter_of_a_backbone_is_used(arch: str) -> None:
    encoder = EncoderConfig(arch=arch, image_size=112, depth=2).build()
    features = encoder(torch.randn(2, 3, 112, 112), keep=torch.tensor([[0, 3], [5, 1]]))
    (features.cls.sum() + features.patches.square().sum()).backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_blocks_see_only_the_kept_tokens(tiny_encoder: ViT) -> None:
    lengths: list[int] = []
    tiny_encoder.vit.blocks[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    tiny_encoder(torch.randn(2, 3, 32, 32), keep=torch.tensor([[0, 7, 3, 9], [1, 2, 4, 5]]))
    assert lengths == [5]  # the class token and four patches of sixteen


def test_dropped_patches_leave_no_trace(tiny_encoder: ViT) -> None:
    images = torch.randn(1, 3, 32, 32)
    changed = images.clone()
    changed[:, :, :8, 8:] = 7.0  # patches 1, 2 and 3
    keep = torch.tensor([[0, 4, 15]])
    assert torch.equal(tiny_encoder(images, keep=keep).patches, tiny_encoder(changed, keep=keep).patches)
    assert not torch.equal(tiny_encoder(images).cls, tiny_encoder(changed).cls)


def test_keeping_all_patches_in_any_order_changes_only_the_order(tiny_encoder: ViT) -> None:
    images = torch.randn(2, 3, 32, 32)
    keep = torch.stack([torch.randperm(16), torch.randperm(16)])
    whole, kept = tiny_encoder(images), tiny_encoder(images, keep=keep)
    torch.testing.assert_close(kept.cls, whole.cls)
    torch.testing.assert_close(kept.patches, whole.patches.gather(1, keep[..., None].expand(-1, -1, 32)))


def test_mask_replaces_patches_before_positions_are_added(tiny_encoder: ViT) -> None:
    images = torch.randn(1, 3, 32, 32)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    token = torch.randn(32)
    seen: list[torch.Tensor] = []
    tiny_encoder.vit.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tiny_encoder(images)
    tiny_encoder(images, mask=mask, mask_token=token)
    plain, masked = (tokens[0, 1:] for tokens in seen)
    torch.testing.assert_close(masked[5], token + tiny_encoder.vit.pos_embed[0, 6])
    assert torch.equal(masked[mask[0].logical_not()], plain[mask[0].logical_not()])


def test_mask_without_a_token_is_refused(tiny_encoder: ViT) -> None:
    with pytest.raises(ValueError, match="mask_token"):
        tiny_encoder(torch.randn(1, 3, 32, 32), mask=torch.ones(1, 16, dtype=torch.bool))


@pytest.mark.parametrize("in_chans", [1, 4, 12])
def test_non_square_images_of_any_number_of_channels(in_chans: int) -> None:
    encoder = EncoderConfig(image_size=(16, 48), in_chans=in_chans, pos_embed="sincos", **TINY).build()
    assert encoder.grid_size == (2, 6)
    assert encoder(torch.randn(2, in_chans, 16, 48)).patches.shape == (2, 12, 32)
    assert encoder(torch.randn(2, in_chans, 32, 24)).patches.shape == (
        2,
        12,
        32,
    )  # not the size it was built for


def test_fixed_positions_do_not_learn_and_learned_ones_do() -> None:
    fixed = EncoderConfig(image_size=32, pos_embed="sincos", **TINY).build()
    learned = EncoderConfig(image_size=32, pos_embed="learned", **TINY).build()
    assert not fixed.vit.pos_embed.requires_grad
    assert learned.vit.pos_embed.requires_grad


def test_drop_path_grows_with_depth() -> None:
    encoder = EncoderConfig(image_size=32, drop_path_rate=0.2, **TINY).build()
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.vit.blocks]
    assert rates == pytest.approx([0.0, 0.2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "vit_smal_patch16_224"}, "did you mean vit_small_patch16_224"),
        ({"image_size": 100}, r"image_size=\(100, 100\).*96 and 112"),
        ({"image_size": 8}, "image_size"),
        ({"embed_dim": 30, "num_heads": 4}, "embed_dim=30"),
        ({"embed_dim": 100}, "embed_dim=100"),
        ({"drop_path_rate": 1.5}, "drop_path_rate=1.5"),
        ({"in_chans": 0}, "in_chans=0"),
        ({"depth": -1}, "depth=-1"),
        ({"patch_size": 0}, "patch_size=0"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**settings).build()


def test_images_of_a_wrong_size_are_refused_with_the_nearest(tiny_encoder: ViT) -> None:
    with pytest.raises(ValueError, match=r"width 36 .* 32 and 40"):
        tiny_encoder(torch.randn(1, 3, 32, 36))


def test_uniform_drop_path_is_the_same_in_all_blocks() -> None:
    encoder = EncoderConfig(image_size=32, drop_path_rate=0.3, drop_path_schedule="uniform", **TINY).build()
    rates = [path.drop_prob for block in encoder.vit.blocks for path in (block.drop_path1, block.drop_path2)]
    assert rates == [0.3] * 4
    with pytest.raises(ValueError, match="vit_small_patch16_18x2_224 has no plain blocks"):
        EncoderConfig(
            arch="vit_small_patch16_18x2_224", depth=1, drop_path_rate=0.3, drop_path_schedule="uniform"
        ).build()


def test_layer_scale_is_set() -> None:
    encoder = EncoderConfig(image_size=32, layer_scale=0.5, **TINY).build()
    assert torch.equal(encoder.vit.blocks[0].ls1.gamma, torch.full((32,), 0.5))


@pytest.mark.parametrize(
    ("device", "precision", "num_patches", "fused"),
    [("cpu", "bf16", 196, False), ("cpu", "bf16", 784, True), ("cpu", "no", 196, True), ("cuda", "bf16", 196, True)],
)
def test_attention_is_fused_but_where_that_is_slower(
    tiny_encoder: ViT, device: str, precision: str, num_patches: int, fused: bool
) -> None:
    images = torch.randn(1, 3, 32, 32)
    before = tiny_encoder(images)
    choose_attention(tiny_encoder, num_patches, torch.device(device), precision)
    assert [block.attn.fused_attn for block in tiny_encoder.vit.blocks] == [fused] * 2
    torch.testing.assert_close(tiny_encoder(images).patches, before.patches, rtol=1e-4, atol=1e-5)


def test_without_blocks_patches_are_projected_and_no_more() -> None:
    encoder = EncoderConfig(image_size=32, drop_path_rate=0.1, **(TINY | {"depth": 0})).build().eval()
    images = torch.randn(2, 3, 32, 32)
    expected = encoder.vit.norm(encoder.vit._pos_embed(encoder.vit.patch_embed(images)))
    torch.testing.assert_close(encoder(images).patches, expected[:, 1:])
