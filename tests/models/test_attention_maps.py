import pytest
import torch

from ssl_vit.models.attention_maps import attention_maps, attention_weights, has_cls_attention
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.vit import ViT, set_fused_attention
from tests.conftest import TINY
from tests.families import FAMILIES

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


@pytest.mark.parametrize("arch", ["distilled", "hybrid", "dinov3", "eva02", "eva02_base_patch14_224", "rope_mixed"])
def test_weighted_values_are_what_timms_attention_returns(arch: str) -> None:
    """softmax(QK) V, normed and projected, is the output of the block's own attention: with rotations, without biases
    of keys, and with projections of their own for queries and keys."""
    small = {"depth": 2, "embed_dim": 48, "num_heads": 4}
    more = {"rope_mixed": EncoderConfig("vit_small_patch16_rope_mixed_224", 64, **small)}
    config = {**FAMILIES, **more}.get(arch) or EncoderConfig(arch, 56, **small)
    encoder = config.build().eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(("q_bias", "v_bias", "gamma_1")):
                parameter.normal_()
    images = torch.randn(2, 3, encoder.image_size[0], 2 * encoder.image_size[1])
    for layer, weights in enumerate(attention_weights(encoder, images, layers=range(2))):
        attn, seen = encoder.vit.blocks[layer].attn, []
        hook = attn.register_forward_hook(lambda module, args, output, seen=seen: seen.extend([args[0], output]))
        with torch.no_grad():
            encoder(images)
            hook.remove()
            tokens, expected = seen
            value = attn.qkv(tokens).chunk(3, dim=-1)[2] if attn.qkv is not None else attn.v_proj(tokens)
            if getattr(attn, "v_bias", None) is not None:
                value = value + attn.v_bias
            values = value.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
            found = attn.proj(attn.norm((weights @ values).transpose(1, 2).flatten(2)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["vit_dwee_patch16_reg1_gap_256", "vit_small_patch16_18x2_224"])
def test_blocks_with_another_kind_of_attention_show_none(arch: str) -> None:
    """Such as the difference of two attentions, whose queries and keys are packed alike."""
    assert not EncoderConfig(arch, 64, depth=1).build().has_attention_maps


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
