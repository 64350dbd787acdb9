from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from ssl_vit.models.vit import ViT, ViTConfig, set_fused_attention
from ssl_vit.visualize.attention import (
    attention_from,
    attention_weights,
    cls_attention,
    draw_attention,
    frame,
    keep_mass,
    shows_attention,
)
from tests.conftest import TINY
from tests.specs import grey

ARCHS = {
    "plain": ViTConfig(image_size=32, **TINY),
    "registers, LayerScale": ViTConfig(arch="vit_small_patch14_reg4_dinov2", image_size=42, depth=2),
    "SwiGLU": ViTConfig(arch="vit_giant_patch14_dinov2", image_size=42, depth=2, embed_dim=96, num_heads=4),
}


@pytest.mark.parametrize("config", ARCHS.values(), ids=ARCHS)
def test_equals_what_unfused_attention_computes(config: ViTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = config.build().train()
    patch = encoder.patch_size[0]
    images = torch.randn(2, 3, 3 * patch, 5 * patch)
    last = encoder.vit.blocks[-1].attn
    assert last.fused_attn
    attention = cls_attention(encoder, images)
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
        attention = attention_from(encoder, images, patch=7, layer=0)
        torch.testing.assert_close(attention, expected, rtol=1e-4, atol=1e-6)
    whole = attention_weights(encoder, images, layers=range(encoder.num_layers))
    assert len(whole) == len(seen) == 2
    for found, direct in zip(whole, seen, strict=True):
        torch.testing.assert_close(found, direct, rtol=1e-4, atol=1e-6)


def test_blocks_and_patches_that_are_not_there_are_refused(tiny_encoder: ViT) -> None:
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="layer=2: there are 2 blocks, numbered 0 to 1"):
        attention_from(tiny_encoder, images, layer=2)
    with pytest.raises(ValueError, match="patch=16: there are 4 x 4 patches, numbered 0 to 15"):
        attention_from(tiny_encoder, images, patch=16)


def test_a_frame_surrounds_its_patch() -> None:
    framed = frame(torch.zeros(1, 1, 32, 48, 3), 7, (8, 8))[0, 0]  # second row, second column of six
    red = (framed == torch.tensor([0.85, 0.1, 0.1])).all(dim=-1)
    assert red[8, 8:16].all()
    assert red[15, 8:16].all()
    assert red[8:16, 8].all()
    assert red[8:16, 15].all()
    assert not red[9:15, 9:15].any()
    assert red.sum() == 28


def test_an_encoder_without_a_class_token_is_refused() -> None:
    encoder = ViTConfig(arch="vit_medium_patch16_gap_256", image_size=32, depth=1).build()
    with pytest.raises(ValueError, match="no class token"):
        cls_attention(encoder, torch.randn(1, 3, 32, 32))
    assert not shows_attention(encoder)
    assert not shows_attention(ViTConfig(arch="vit_small_patch16_18x2_224", image_size=32, depth=1).build())


def test_kept_patches_are_the_fewest_that_hold_the_mass() -> None:
    attention = torch.tensor([[0.1, 0.4], [0.3, 0.2]])
    assert keep_mass(attention, 0.6).tolist() == [[False, True], [True, False]]
    assert keep_mass(attention, 0.4).tolist() == [[False, True], [False, False]]
    assert keep_mass(attention, 1.0).all()
    maps = torch.rand(3, 2, 7, 7)
    kept = keep_mass(maps, 0.6)
    mass = (maps * kept).sum(dim=(-2, -1)) / maps.sum(dim=(-2, -1))
    assert (mass >= 0.6 - 1e-6).all()
    smallest = torch.where(kept, maps, torch.inf).amin(dim=(-2, -1))
    assert ((maps * kept).sum(dim=(-2, -1)) - smallest < 0.6 * maps.sum(dim=(-2, -1))).all()
    with pytest.raises(ValueError, match=r"mass=0.0: must lie in \(0, 1\]"):
        keep_mass(attention, 0.0)


@pytest.mark.parametrize("mass", [None, 0.6])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_picture_shows_image_mean_and_heads(tmp_path: Path, channels: int, mass: float | None) -> None:
    images, attention = torch.zeros(2, channels, 16, 24), torch.rand(2, 3, 2, 3)
    path = tmp_path / "new" / "attention.png"
    draw_attention(images, attention, normalization=grey(channels, std=0.25), path=path, mass=mass)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[1] > 5 * 280
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_every_map_is_scaled_to_its_own_maximum(tmp_path: Path) -> None:
    attention = torch.tensor([[[[1e-3, 0.0]], [[0.5, 0.0]]]])
    path = tmp_path / "attention.png"
    draw_attention(torch.zeros(1, 3, 8, 16), attention, normalization=grey(std=0.25), path=path)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    top, bottom = (np.round(np.array(colormaps["inferno"](end)[:3]) * 255) for end in (1.0, 0.0))
    maps = (pixels == bottom).all(axis=-1).sum(axis=1) > 100  # rows of the maps, and not of the scale below
    brightest, darkest = ((pixels[maps] == colour).all(axis=-1).sum() for colour in (top, bottom))
    assert brightest == darkest > 0


def test_the_encoder_type_is_checked(tiny_encoder: ViT) -> None:
    assert cls_attention(tiny_encoder, torch.randn(1, 3, 32, 32)).sum().item() <= 4.0  # four heads, each at most one
