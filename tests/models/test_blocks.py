"""Packed crops: the features and gradients of one call for each size, whatever the block."""

import dataclasses

import pytest
import torch

from ssl_vit.models.blocks import Block, make_packable
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.vit import set_fused_attention

SMALL = {"image_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 4}
ARCHS = {
    "plain": EncoderConfig("vit_small_patch16_224", **SMALL),
    "layer scale": EncoderConfig("vit_small_patch16_224", layer_scale=0.1, **SMALL),
    "registers": EncoderConfig("vit_small_patch14_reg4_dinov2", **{**SMALL, "patch_size": 16}),
    "parallel blocks": EncoderConfig("vit_small_patch16_18x2_224", **SMALL),
    "checkpointing": EncoderConfig("vit_small_patch16_224", grad_checkpointing=True, **SMALL),
}


def groups() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 3, size, size, generator=generator) for count, size in ((4, 64), (6, 32))]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", list(ARCHS))
def test_packed_groups_have_the_features_and_gradients_of_single_calls(name: str, fused: bool) -> None:
    torch.manual_seed(0)
    encoder = ARCHS[name].build()
    set_fused_attention(encoder, fused)
    mask = torch.rand(4, 16) < 0.4
    token = torch.randn(encoder.embed_dim)

    def run(together: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        encoder.zero_grad()
        large, small = groups()
        if together:
            found = encoder.forward_groups([large, small], mask=mask, mask_token=token)
        else:
            found = [encoder(large, mask=mask, mask_token=token), encoder(small)]
        outputs = [tensor for features in found for tensor in features]
        torch.stack([output.square().sum() for output in outputs]).sum().backward()
        return outputs, [parameter.grad.clone() for parameter in encoder.parameters() if parameter.grad is not None]

    assert encoder._packs == (name != "parallel blocks")
    for kind, packed, single in zip(("features", "gradients"), run(True), run(False), strict=True):
        assert len(packed) == len(single) > 0
        for ours, theirs in zip(packed, single, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4), kind


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", [*ARCHS, "no blocks", "no class token"])
def test_class_tokens_alone_are_those_of_all_tokens_with_their_gradients(
    name: str, together: bool, fused: bool
) -> None:
    """Of one group and several; drop path draws alike."""
    more = {
        "no blocks": EncoderConfig("vit_small_patch16_224", **{**SMALL, "depth": 0}),
        "no class token": EncoderConfig("vit_base_patch16_siglip_gap_224", **SMALL),
    }
    torch.manual_seed(0)
    encoder = dataclasses.replace({**ARCHS, **more}[name], drop_path_rate=0.3).build().train()
    set_fused_attention(encoder, fused)
    found = []
    for cls_only in (False, True):
        encoder.zero_grad()
        torch.manual_seed(1)
        features = encoder.forward_groups(groups() if together else groups()[:1], cls_only=cls_only)
        torch.stack([one.cls.square().sum() for one in features]).sum().backward()
        gradients = {key: value.grad for key, value in encoder.named_parameters() if value.grad is not None}
        found.append({f"group {number}": one.cls for number, one in enumerate(features)} | gradients)
    saves = name not in ("parallel blocks", "no class token")
    assert [one.patches.shape[1] for one in features] == ([0] * len(features) if saves else [16, 4][: len(features)])
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-4, msg=key)


def test_the_last_block_looks_at_class_tokens_alone() -> None:
    encoder = ARCHS["plain"].build()
    counts: list[int] = []
    for block in encoder.vit.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[1]))
    encoder.forward_groups(groups(), cls_only=True)
    assert counts == [4 * 17 + 6 * 5, 4 + 6]


def test_drop_path_of_packed_groups_drops_whole_sequences() -> None:
    torch.manual_seed(0)
    encoder = EncoderConfig("vit_small_patch16_224", drop_path_rate=0.5, drop_path_schedule="uniform", **SMALL).build()
    block = encoder.vit.blocks[0].train()
    with torch.no_grad():
        block.attn.proj.weight.zero_()
        block.attn.proj.bias.fill_(1.0)
        block.mlp.fc2.weight.zero_()
        block.mlp.fc2.bias.fill_(10.0)
    shapes = ((200, 5), (300, 2))
    found = block(torch.zeros(1, 1600, 32), shapes=shapes)
    assert sorted(found.unique().tolist()) == [0.0, 2.0, 20.0, 22.0]
    parts = found.split([1000, 600], dim=1)
    for part, (count, length) in zip(parts, shapes, strict=True):
        sequences = part.reshape(count, length, 32)
        assert (sequences == sequences[:, :1, :1]).all()
        assert 0.35 < (sequences[:, 0, 0] >= 20).float().mean() < 0.65


def test_blocks_of_another_kind_are_left_alone() -> None:
    encoder = ARCHS["parallel blocks"].build()
    assert not make_packable(encoder.vit.blocks)
    assert not any(isinstance(block, Block) for block in encoder.vit.blocks)
