"""Which architectures are taken, which are refused, and what is said."""

import pytest
import timm
import torch

from ssl_vit.models import EncoderConfig
from tests.families import CONVOLUTIONS, FAMILIES, STAGES


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(EncoderConfig.FAMILIES))
def test_every_architecture_of_a_family_is_a_backbone(module: str) -> None:
    """All but those with BatchNorm."""
    refused = {}
    for arch in timm.list_models(module=module.rpartition(".")[2]):
        plain = module in ("timm.models.vision_transformer", "timm.models.deit")
        size = timm.get_pretrained_cfg(arch).input_size[1]
        with torch.device("meta"):
            try:
                EncoderConfig(arch, size, **({"depth": 1} if plain else {})).build()
            except ValueError as error:
                refused[arch] = str(error)
    reasons = {arch: error for arch, error in refused.items() if "BatchNorm" not in error}
    assert reasons == {}, module
    assert len(refused) == {"timm.models.vision_transformer_hybrid": 5}.get(module, 0)


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("resnet50", "has BatchNorm.* accumulation .*use convnext_tiny$"),
        ("vit_small_resnet26d_224", "has BatchNorm.*use vit_small_r26_s32_224$"),
        ("hiera_tiny_224", "timm.models.hiera, a family that is not supported; use swin_tiny_patch4_window7_224$"),
        ("beit_large_patch16_224", "timm.models.beit, .*use vit_large_patch16_224$"),
        ("swinv2_cr_small_224", "use swinv2_small_window8_256$"),
        ("davit_base", "use convnext_base$"),
        ("swin_tiny_patch4_window9", "no model of that name; did you mean swin_tiny_patch4_window7_224"),
    ],
)
def test_other_architectures_are_refused_with_the_nearest(arch: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^arch='{arch}': .*{said}") as raised:
        EncoderConfig(arch).build()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"depth": 3}, "depth=3: swin_.* is no Vision Transformer; .*model_args, such as {depths:"),
        ({"pos_embed": "sincos"}, "pos_embed='sincos': swin_"),
        ({"drop_path_rate": 0.1, "drop_path_schedule": "uniform"}, "drop_path_schedule='uniform': swin_"),
        ({"image_size": 100}, r"image_size=\(100, 100\): .* 96 and 128$"),
        ({"model_args": {"depth": [1, 1]}}, "arch='swin_.*depth=.*: timm cannot build it: .*unexpected keyword.*depth"),
        ({"model_args": {"img_size": 64}}, "model_args=.*: img_size is set by encoder.image_size"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path is set by encoder.pretrained"),
        ({"model_args": {"pretrained_cfg": {}}}, "model_args=.*pretrained_cfg"),
        ({"model_args": {"global_pool": "max"}}, "global_pool is no argument of an architecture"),
        ({"model_args": {"embed_dim": 65_536}}, "would be .* billion parameters, and 25 billion"),
        ({"model_args": {"depths": [900] * 4}}, "depths.*is larger than that of any backbone"),
        ({"model_args": {"depths": [1] * 2_000}}, "a list of 2000 values"),
        ({"arch": "convnext_atto", "model_args": {"dims": [16, 32, 64]}}, "dims.*has four stages, not 3, such as"),
    ],
)
def test_settings_of_hierarchical_encoders_that_cannot_work_are_named(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        EncoderConfig(**{"arch": "swin_tiny_patch4_window7_224", **settings}).build()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"arch": "vit_small_r26_s32_224", "image_size": 100}, r"image_size=\(100, 100\): .* 96 and 128$"),
        ({"arch": "vit_small_r26_s32_224", "image_size": 64, "patch_size": 2}, "patch_size=2: .*CNN for a stem"),
        ({"arch": "vit_small_patch16_dinov3", "pos_embed": "sincos"}, "has no position table"),
        ({"arch": "vit_small_patch16_224", "model_args": {"patch_size": 8}}, "patch_size is set by encoder.patch_size"),
        ({"arch": "vit_small_patch16_224", "model_args": {"patch_drop_rate": 0.5}}, "patch_drop_rate is no argument"),
    ],
)
def test_settings_of_vits_that_cannot_work_are_named(config: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EncoderConfig(**config).build()


def test_plain_values_build_the_same_encoder() -> None:
    for name, config in FAMILIES.items():
        values = {"arch": config.arch, "image_size": config.image_size, "model_args": config.model_args}
        assert EncoderConfig.from_plain(values).model_args == config.model_args, name
    assert EncoderConfig("swin_tiny_patch4_window7_224", model_args={"depths": (1, 1)}).model_args == {"depths": [1, 1]}


def test_sizes_are_those_of_the_settings() -> None:
    swin = EncoderConfig("swin_tiny_patch4_window7_224", (64, 128), in_chans=4, model_args=STAGES).build()
    assert (swin.stride, swin.grid_size, swin.embed_dim, swin.mask_dim) == ((16, 16), (4, 8), 64, 16)
    convnext = EncoderConfig("convnext_tiny", 96, model_args=CONVOLUTIONS).build()
    assert (convnext.stride, convnext.grid_size, convnext.embed_dim, convnext.mask_dim) == ((32, 32), (3, 3), 40, 8)
    hybrid = EncoderConfig("vit_base_r50_s16_224", 96, depth=1).build()
    assert (hybrid.stride, hybrid.grid_size) == ((16, 16), (6, 6))
