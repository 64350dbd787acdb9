import pytest
import torch

from ssl_vit.models.attention_maps import attention_maps, attention_weights, has_cls_attention
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.vit import ViT, set_fused_attention
from tests.conftest import TINY

ARCHS = {
    "plain": EncoderConfig(image_size=32, **TINY),
    "registers, LayerScale": EncoderConfig(arch="vit_small_patch14_reg4_dinov2", image_size=42, depth=2),
    "SwiGLU": EncoderConfig(arch="vit_giant_patch14_dinov2", image_size=42, depth=2, embed_dim=96, num_heads=4),
}


@pytest.mark.parametrize("config", ARCHS.values(), ids=ARCHS)
def test_equals_what_unfused_attention_computes(config: EncoderConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = config.build().train()
    patch = encoder.stride[0]
    images = torch.randn(2, 3, 3 * patch, 5 * patch)
    last = encoder.vit.blocks[-1].attn
    assert last.fused_attn
    attention = attention_maps(encoder, images)
    assert attention.shape == (2, last.num_heads, 3, 5)
    assert encoder.training
    assert last.training

    set_fused_attention(encoder, False)
    seen: list[torch.Tensor] = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, *a, **k: seen.append(softmax(self, *a, **k)) or seen[-1])
    with torch.no_grad():
        encoder.eval()(images)
    monkeypatch.undo()
    prefix = encoder.vit.num_prefix_tokens
    expected = seen[-1][:, :, 0, prefix:].reshape(2, last.num_heads, 3, 5)
    torch.testing.assert_close(attention, expected, rtol=1e-4, atol=1e-6)
    # From a patch, and in another block; fused or not.
    expected = seen[0][:, :, prefix + 7, prefix:].reshape(2, last.num_heads, 3, 5)
    for fused in (False, True):
        set_fused_attention(encoder, fused)
        attention = attention_maps(encoder, images, patch=7, layer=0)
        torch.testing.assert_close(attention, expected, rtol=1e-4, atol=1e-6)
    whole = attention_weights(encoder, images, layers=range(encoder.num_layers))
    assert len(whole) == len(seen) == 2
    for found, direct in zip(whole, seen, strict=True):
        torch.testing.assert_close(found, direct, rtol=1e-4, atol=1e-6)


def test_blocks_and_patches_that_are_not_there_are_refused(tiny_encoder: ViT) -> None:
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="layer=2: there are 2 blocks, numbered 0 to 1"):
        attention_maps(tiny_encoder, images, layer=2)
    with pytest.raises(ValueError, match="patch=16: there are 4 x 4 patches, numbered 0 to 15"):
        attention_maps(tiny_encoder, images, patch=16)


def test_an_encoder_without_a_class_token_is_refused() -> None:
    encoder = EncoderConfig(arch="vit_medium_patch16_gap_256", image_size=32, depth=1).build()
    with pytest.raises(ValueError, match="no class token"):
        attention_maps(encoder, torch.randn(1, 3, 32, 32))
    assert not has_cls_attention(encoder)
    assert not has_cls_attention(EncoderConfig(arch="vit_small_patch16_18x2_224", image_size=32, depth=1).build())


def test_the_encoder_type_is_checked(tiny_encoder: ViT) -> None:
    assert attention_maps(tiny_encoder, torch.randn(1, 3, 32, 32)).sum().item() <= 4.0  # four heads, each at most one
