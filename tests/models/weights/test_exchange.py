"""Backbones of timm in transformers and back: same features, same tensors, and refusals where there are none."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssl_vit.models.weights.exchange import LAYOUTS, Found, timm_to_transformers, transformers_to_timm

SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
SWIN_4 = {"embed_dim": 8, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 4}
CONVNEXT = {"dims": (8, 12, 16, 24), "depths": (1, 2, 2, 1)}
TOKENS = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8}
SWIN_T, SWIN_V2, DEIT = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "deit_tiny_distilled_patch16_224"
DINOV3 = "vit_small_patch16_dinov3"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


def timm_model(arch: str, image_size: tuple[int, int], in_chans: int = 3, **arguments: Any) -> nn.Module:
    sizes = {} if arch.startswith("convnext") else {"img_size": image_size}
    return perturbed(timm.create_model(arch, num_classes=0, in_chans=in_chans, **sizes, **arguments))


def perturbed(model: nn.Module) -> nn.Module:
    """All parameters moved, so that none is zero or one as it was made."""
    with torch.no_grad():
        for value in model.parameters():
            value += torch.randn_like(value) / 8
    return model.eval()


@torch.no_grad()
def timm_features(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """The image's feature [b d] and the patches' [b n d]."""
    tokens = model.forward_features(images)
    if hasattr(model, "stages"):
        patches = model.head.norm(tokens).flatten(2).transpose(1, 2)
        return model.head.norm(tokens.mean((2, 3), keepdim=True)).flatten(1), patches
    if hasattr(model, "layers"):
        return tokens.mean((1, 2)), tokens.flatten(1, 2)
    return tokens[:, 0], tokens[:, model.num_prefix_tokens :]


@torch.no_grad()
def transformers_features(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    outputs = model(images)
    tokens = outputs.last_hidden_state
    if model.config.model_type.startswith("convnext"):
        return outputs.pooler_output, model.layernorm(tokens.flatten(2).transpose(1, 2))
    if model.config.model_type.startswith("swin"):
        return tokens.mean(1) if outputs.pooler_output is None else outputs.pooler_output, tokens
    prefix = 2 if model.config.model_type == "deit" else 1 + model.config.num_register_tokens
    return tokens[:, 0], tokens[:, prefix:]


def assert_equal_features(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert mine.abs().max() > 0.1
        assert (mine - other).abs().max() < 1e-5 * mine.abs().max()


def written(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Any:
    """The model that transformers reads from a folder, in which it finds all that it wants and nothing else."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(keys for keys in report.values()), report
    assert type(model).__name__ == config["architectures"][0]
    return model.eval()


def rebuilt(found: Found) -> nn.Module:
    model = timm.create_model(found.arch, num_classes=0, **found.model_args)
    model.load_state_dict(found.tensors, strict=True)
    return model.eval()


@pytest.mark.parametrize(
    ("arch", "image_size", "arguments"),
    [
        (SWIN_T, (32, 32), SWIN),
        (SWIN_T, (64, 96), {**SWIN, "in_chans": 4, "qkv_bias": False, "mlp_ratio": 2.0}),
        (SWIN_T, (128, 128), {**SWIN_4, "in_chans": 1, "strict_img_size": False}),
        (SWIN_T, (24, 24), {**SWIN, "depths": (2, 1), "window_size": 3, "always_partition": True}),
        (SWIN_T, (48, 48), {**SWIN, "depths": (2, 1)}),
        (SWIN_V2, (32, 64), {**SWIN, "in_chans": 4, "patch_size": (2, 4)}),
        (SWIN_V2, (64, 64), {**SWIN_4, "in_chans": 1, "pretrained_window_sizes": (3, 3, 3, 2)}),
        (SWIN_V2, (48, 48), {**SWIN, "window_size": 6, "qkv_bias": False, "strict_img_size": False}),
        ("convnext_atto", (64, 96), {**CONVNEXT, "in_chans": 4}),
        ("convnext_tiny", (50, 70), {**CONVNEXT, "in_chans": 1, "dims": (8, 8, 12, 12)}),
        ("convnext_large_mlp", (32, 32), {**CONVNEXT, "head_hidden_size": 16}),
        ("convnextv2_tiny", (64, 64), {**CONVNEXT, "patch_size": 3}),
        ("convnextv2_atto", (64, 96), {**CONVNEXT, "in_chans": 4}),
        (DEIT, (32, 32), TOKENS),
        (DEIT, (16, 48), {**TOKENS, "in_chans": 4, "qkv_bias": False, "mlp_ratio": 2.7}),
        (DINOV3, (32, 32), TOKENS),
        ("vit_small_patch16_dinov3_qkvb", (16, 48), {**TOKENS, "in_chans": 4, "num_reg_tokens": 0}),
        ("vit_small_plus_patch16_dinov3", (40, 40), {**TOKENS, "in_chans": 1, "rope_temperature": 50}),
        ("vit_7b_patch16_dinov3", (32, 32), {**TOKENS, "use_fc_norm": True, "use_post_transformer_norm": True}),
    ],
)
def test_what_leaves_is_the_same_function(
    tmp_path: Path, arch: str, image_size: tuple[int, int], arguments: dict[str, Any]
) -> None:
    model = timm_model(arch, image_size, **arguments)
    images = torch.randn(2, arguments.get("in_chans", 3), *image_size)

    config, tensors = timm_to_transformers(model, image_size)

    theirs = written(config, tensors, tmp_path)
    cls, patches = timm_features(model, images)
    assert_equal_features((cls, patches), transformers_features(theirs, images))
    assert_equal_features((cls,), (theirs(images).pooler_output.detach(),))
    found = transformers_to_timm(config, tensors)
    assert found.image_size == image_size
    assert_equal_features((cls, patches), timm_features(rebuilt(found), images))
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(("head.pre", "fc_norm"))}
    assert own.keys() == found.tensors.keys()
    assert all(torch.equal(own[name].squeeze(), value.squeeze()) for name, value in found.tensors.items())


SWIN_CONFIG = {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
CONVNEXT_CONFIG = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 2, 1, 1], "image_size": 64}
TOKENS_CONFIG = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}


@pytest.mark.parametrize(
    ("kind", "settings", "arch"),
    [
        ("SwinModel", SWIN_CONFIG, SWIN_T),
        ("SwinForImageClassification", {**SWIN_CONFIG, "num_channels": 1, "qkv_bias": False}, SWIN_T),
        ("SwinForMaskedImageModeling", {**SWIN_CONFIG, "image_size": [64, 96], "encoder_stride": 8}, SWIN_T),
        ("Swinv2Model", {**SWIN_CONFIG, "pretrained_window_sizes": [0, 3]}, SWIN_V2),
        (
            "Swinv2ForImageClassification",
            {**SWIN_CONFIG, "image_size": 64, "window_size": 16, "pretrained_window_sizes": [0, 0]},
            SWIN_V2,
        ),
        ("ConvNextModel", CONVNEXT_CONFIG, "convnext_tiny"),
        ("ConvNextForImageClassification", {**CONVNEXT_CONFIG, "patch_size": 3}, "convnext_tiny"),
        (
            "ConvNextModel",
            {**CONVNEXT_CONFIG, "hidden_sizes": [40, 80, 16, 8], "depths": [2, 2, 6, 2]},
            "convnext_atto",
        ),
        ("ConvNextV2Model", {**CONVNEXT_CONFIG, "num_channels": 4, "layer_norm_eps": 1e-6}, "convnextv2_tiny"),
        ("ConvNextV2ForImageClassification", CONVNEXT_CONFIG, "convnextv2_tiny"),
        ("DeiTModel", TOKENS_CONFIG, DEIT),
        ("DeiTForImageClassificationWithTeacher", {**TOKENS_CONFIG, "qkv_bias": False}, DEIT),
        ("DeiTForMaskedImageModeling", {**TOKENS_CONFIG, "intermediate_size": 70, "encoder_stride": 8}, DEIT),
        ("DINOv3ViTModel", {**TOKENS_CONFIG, "num_register_tokens": 4}, DINOV3),
        (
            "DINOv3ViTModel",
            {**TOKENS_CONFIG, "use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False},
            DINOV3,
        ),
    ],
)
def test_what_comes_in_is_the_same_function(tmp_path: Path, kind: str, settings: dict[str, Any], arch: str) -> None:
    saved = getattr(transformers, kind)
    saved = perturbed(saved(saved.config_class(**settings)))
    saved.save_pretrained(tmp_path)
    base = getattr(saved, saved.base_model_prefix, saved) if "For" in kind else saved

    found = transformers_to_timm(
        json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    )

    assert found.arch == arch
    images = torch.randn(2, saved.config.num_channels, *found.image_size)
    assert_equal_features(timm_features(rebuilt(found), images), transformers_features(base, images))


@pytest.mark.parametrize(
    ("arch", "arguments"),
    [
        (SWIN_T, {"img_size": 224}),
        ("convnextv2_atto", {}),
        (DEIT, {"img_size": 224}),
        ("vit_tiny_patch16_dinov3_qkvb", {"img_size": 256}),
    ],
)
def test_architectures_of_timm_come_in_under_their_names(arch: str, arguments: dict[str, int]) -> None:
    model = timm.create_model(arch, num_classes=0, in_chans=1, **arguments)
    found = transformers_to_timm(*timm_to_transformers(model, arguments.get("img_size", 224)))
    assert (found.arch, found.model_args) == (arch, {"in_chans": 1, **arguments})
    model.load_state_dict(found.tensors, strict=True)


@pytest.mark.parametrize(
    ("arch", "image_size", "arguments", "reason"),
    [
        (
            SWIN_T,
            32,
            {**SWIN_4, "depths": (1, 1, 1, 1)},
            "stage 3, whose grid is 2 x 2 .* smaller than the window of 4",
        ),
        (
            SWIN_T,
            32,
            {**SWIN, "window_size": (4, 2)},
            r"window_size=\(4, 2\).* would be .*window_size=\(4, 4\)",
        ),
        (SWIN_T, 32, {**SWIN, "head_dim": 4}, r"layers\.0\.blocks\.0\.attn is .*scale=0\.5, .* would be .*scale=0\.35"),
        (SWIN_T, (32, 64), SWIN, "stage 2, whose grid is 4 x 8 .* has windows of 4 that .* shift differently"),
        (SWIN_T, 56, {**SWIN, "window_size": 5}, "stage 1, whose grid is 14 x 14 .* is padded to whole windows of 5"),
        (
            SWIN_T,
            64,
            {**SWIN, "strict_img_size": False, "img_size": 32},
            r"layers\.1\.blocks\.1 is .*shift_size=\(0, 0\).*shift_size=\(2, 2\)",
        ),
        (SWIN_V2, (32, 64), SWIN, "stage 2, whose grid is 4 x 8 .* has windows of 4 that .* shift differently"),
        (SWIN_V2, 72, SWIN, "stage 2, whose grid is 9 x 9 .* is padded to whole windows of 4"),
        (SWIN_V2, 32, {**SWIN, "pretrained_window_sizes": (1, 0)}, "a window of 1"),
        ("swinv2_cr_tiny_224", 32, SWIN, "timm's SwinTransformerV2Cr"),
        ("convnext_tiny_hnf", 64, CONVNEXT, "norm_pre is LayerNorm"),
        ("convnext_atto_rms", 64, CONVNEXT, "stem.1 is RmsNorm2d"),
        ("convnext_atto_ols", 64, CONVNEXT, r"stem\.0 is Conv2d.*stride=\(2, 2\).*, and would be"),
        ("convnext_tiny", 64, {**CONVNEXT, "norm_eps": 1e-5}, "stem.1 is .*eps=1e-05, .* would be .*eps=1e-06"),
        ("convnext_tiny", 64, {**CONVNEXT, "output_stride": 16}, r"stages\.3\.downsample\.1 is Conv2d"),
        ("convnext_tiny", 64, {**CONVNEXT, "patch_size": 8}, "patch_size=8 makes timm choose other strides"),
        ("convnextv2_tiny", 64, {**CONVNEXT, "ls_init_value": 1.0}, r"blocks\.0\.gamma is of shape \(8,\)"),
        (DEIT, 32, {**TOKENS, "init_values": 1.0}, r"blocks\.0\.ls1 is LayerScale"),
        (DEIT, 32, {**TOKENS, "img_size": (16, 64)}, r"pos_embed is .* for a grid of \(2, 8\), .* \(4, 4\)"),
        (DINOV3, 32, {**TOKENS, "rope_rotate_half": False}, "rope is RotaryEmbeddingDinoV3.*rotate_half=False"),
        (DINOV3, 32, {**TOKENS, "use_rot_pos_emb": False}, "rope is missing"),
        (DINOV3, 32, {**TOKENS, "use_abs_pos_emb": True}, "pos_embed is of shape"),
        (DINOV3, 32, {**TOKENS, "class_token": False}, r"num_prefix_tokens=4\), and would be .*=5\)"),
        (DINOV3, 36, {**TOKENS, "img_size": 32}, "patches of 8 x 8 do not divide images of 36 x 36"),
        ("eva02_tiny_patch14_224", 32, TOKENS, "rope is RotaryEmbeddingCat"),
        ("vit_tiny_patch16_224", 32, TOKENS, "timm's VisionTransformer"),
    ],
)
def test_what_transformers_cannot_be_stays(
    arch: str, image_size: int | tuple[int, int], arguments: dict[str, Any], reason: str
) -> None:
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    own = arguments.get("img_size", size)
    model = timm_model(arch, own, **{name: value for name, value in arguments.items() if name != "img_size"})
    with pytest.raises(ValueError, match=f"^[^\n]*{reason}[^\n]*; export to timm$"):
        timm_to_transformers(model, image_size)


def test_augmentation_of_positions_goes_along() -> None:
    model = timm_model(DINOV3, (32, 32), **TOKENS, rope_shift_coords=0.1, rope_rescale_coords=2.0)
    config, _ = timm_to_transformers(model, 32)
    assert [config[f"pos_embed_{name}"] for name in ("shift", "jitter", "rescale")] == [0.1, None, 2.0]


def test_a_model_is_described_without_drawing_random_numbers() -> None:
    model = timm_model(SWIN_T, (32, 32), **SWIN)
    before = torch.get_rng_state()
    timm_to_transformers(model, 32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def swin() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return timm_to_transformers(timm_model(SWIN_T, (32, 32), **SWIN), 32)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model_type": "resnet"}, "model_type=resnet: is not known; take one of swin, swinv2, convnext"),
        ({"model_type": ["swin"]}, r"model_type=\['swin'\]: expected str"),
        ({"hidden_act": "relu"}, "hidden_act='relu': expected .*gelu"),
        ({"use_absolute_embeddings": True}, "use_absolute_embeddings=True: expected .*False"),
        ({"layer_norm_eps": 1e-3}, r"layer_norm_eps=0\.001: timm's 1e-05 is the most"),
        ({"depths": [2, 10**6]}, "tells of 1,000,002 blocks, and the weights have"),
        ({"depths": [2, 10**30]}, "depths=.*: expected numbers above 0"),
        ({"depths": [2, 0]}, "depths=.*: expected numbers above 0"),
        ({"depths": [2, "2"]}, "depths=.*: expected list"),
        ({"depths": [2, 1]}, r"no place for encoder\.layers\.1\.blocks\.1"),
        ({"num_heads": [2, 64]}, "timm builds no swin_tiny_patch4_window7_224"),
        ({"num_heads": [2]}, "are not of as many stages"),
        ({"patch_size": 0}, "patch_size=0: expected numbers above 0"),
        ({"patch_size": 3}, "patches of 3 x 3 do not divide images of 32 x 32"),
        ({"patch_size": [4, 4, 4]}, "patch_size=.*: expected"),
        ({"embed_dim": 32}, r"patch_embed.proj.weight has shape \(16, 3, 4, 4\), and \(32, 3, 4, 4\) is what"),
        ({"embed_dim": 2**20}, r"patch_embed.proj.weight has shape"),
        ({"window_size": 2}, "relative_position_bias_table has shape"),
        ({"window_size": 8}, "stage 2, .* is smaller than the window of 8"),
        ({"qkv_bias": False}, "no place for encoder.layers.0.blocks.0.attention.self.query.bias"),
    ],
)
def test_settings_that_do_not_fit_are_refused(swin: Any, changed: dict[str, Any], reason: str) -> None:
    config, tensors = swin
    with pytest.raises(ValueError, match=f"^[^\n]*{reason}[^\n]*$"):
        transformers_to_timm({**config, **changed}, tensors, Path("folder/config.json"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("encoder.extra", r"timm's swin_tiny_patch4_window7_224 has no place for encoder\.extra"),
        ("encoder.layers.0.blocks.1.attention.self.key.weight", r"no place for .*\.1\.attention\.self\.query\.weight"),
        ("layernorm.weight", r"norm\.weight is missing, and \(32,\) is what the settings tell"),
    ],
)
def test_weights_that_do_not_fit_are_refused(swin: Any, name: str, reason: str) -> None:
    config, tensors = swin[0], {**swin[1]}
    if tensors.pop(name, None) is None:
        tensors[name] = torch.ones(1)
    with pytest.raises(ValueError, match=f"^config.json: [^\n]*{reason}[^\n]*$"):
        transformers_to_timm(config, tensors)


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("convnext", {"depths": [1, 1, 1]}, "are not of 4 stages"),
        ("convnext", {"patch_size": 2}, "patch_size=2 makes timm choose other strides"),
        ("convnextv2", {"patch_size": [4, 4]}, "expected int"),
        ("convnext", {"layer_scale_init_value": 0.0}, "expected numbers above 0"),
        ("deit", {"image_size": 30}, "patches of 16 x 16 do not divide"),
        ("dinov3_vit", {"key_bias": True}, "key_bias=True: expected"),
        ("dinov3_vit", {"query_bias": False}, "of queries and values, one has a bias"),
        ("dinov3_vit", {"use_gated_mlp": True}, "hidden_act=gelu, and timm's MLP of this kind has silu"),
    ],
)
def test_architectures_that_timm_lacks_are_refused(model_type: str, settings: dict[str, Any], reason: str) -> None:
    tensors = {str(number): torch.ones(1) for number in range(20)}
    with pytest.raises(ValueError, match=f"^config.json: [^\n]*{reason}[^\n]*$"):
        transformers_to_timm({"model_type": model_type, **settings}, tensors)


def test_defaults_are_those_of_transformers() -> None:
    for layout in LAYOUTS.values():
        config = getattr(transformers, layout.architecture).config_class()
        for name, (_, default) in layout.settings.items():
            value = getattr(config, name)
            assert (list(value) if isinstance(value, tuple) else value) == default, (layout.architecture, name)
