"""`model_args`: arguments of timm's factories that have no setting of their own."""

import pytest
import torch

from ssl_vit.models import EncoderConfig
from ssl_vit.models.encoder import Encoder

SWIN = {"depths": [1, 1], "embed_dim": 16, "num_heads": [1, 2], "window_size": 4}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}


@pytest.mark.parametrize(
    ("config", "stride"),
    [
        (EncoderConfig("swin_tiny_patch4_window7_224", 32, model_args={**SWIN, "patch_size": 2}), 4),
        (EncoderConfig("swinv2_tiny_window8_256", 32, model_args={**SWIN, "patch_size": 2}), 4),
        (EncoderConfig("convnext_tiny", 32, model_args={**CONVNEXT, "patch_size": 1}), 8),
        (
            EncoderConfig(
                "vit_tiny_r_s16_p8_224", 32, depth=1, embed_dim=32, num_heads=2, model_args={"patch_size": 2}
            ),
            8,
        ),
    ],
    ids=lambda value: value.arch if isinstance(value, EncoderConfig) else "",
)
def test_patch_size_sets_the_stride_of_a_backbone_with_a_stem(config: EncoderConfig, stride: int) -> None:
    encoder: Encoder = config.build().eval()
    assert encoder.stride == (stride, stride)
    with torch.no_grad():
        assert encoder(torch.randn(2, 3, 32, 16)).patches.shape[1] == (32 // stride) * (16 // stride)
    again = EncoderConfig.from_plain({"arch": config.arch, "image_size": 32, "model_args": encoder.config.model_args})
    assert again.model_args["patch_size"] == config.model_args["patch_size"]


@pytest.mark.parametrize(
    "arch", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch16_dinov3"]
)
def test_patch_size_of_a_plain_vit_is_a_setting(arch: str) -> None:
    with pytest.raises(ValueError, match=r"model_args=\{'patch_size': 8\}: patch_size is set by encoder.patch_size"):
        EncoderConfig(arch, 64, model_args={"patch_size": 8}).build()


def test_a_hybrid_of_timm_keeps_the_patch_of_its_cnns_outputs() -> None:
    arguments = {"patch_size": 4, "embed_dim": 48, "num_heads": 4, "depth": 1}
    config = EncoderConfig.from_timm("vit_tiny_r_s16_p8_224", (3, 64, 64), arguments)
    assert (config.model_args, config.embed_dim) == ({"patch_size": 4}, 48)
    assert config.build().stride == (16, 16)
