"""A small encoder of every family of backbones, and the pairs with objectives that cannot work."""

import json
from dataclasses import replace
from typing import Any

from ssl_vit.models import EncoderConfig

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 4}
STAGES: dict[str, Any] = {"depths": [1, 1, 2], "embed_dim": 16, "num_heads": [1, 2, 4], "window_size": 4}
CONVOLUTIONS: dict[str, Any] = {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 40]}

FAMILIES = {
    "distilled": EncoderConfig("deit_tiny_distilled_patch16_224", 64, **SMALL),
    "hybrid": EncoderConfig("vit_tiny_r_s16_p8_224", 64, **SMALL),
    "dinov3": EncoderConfig("vit_small_patch16_dinov3", 64, **SMALL),
    "eva02": EncoderConfig("eva02_tiny_patch14_224", 56, **SMALL),
    "swin": EncoderConfig("swin_tiny_patch4_window7_224", 64, model_args=STAGES),
    "swinv2": EncoderConfig("swinv2_tiny_window8_256", (64, 32), in_chans=1, model_args=STAGES),
    "convnext": EncoderConfig("convnext_tiny", 64, drop_path_rate=0.2, model_args=CONVOLUTIONS),
    "convnextv2": EncoderConfig("convnextv2_atto", (64, 96), model_args=CONVOLUTIONS),
    "convnext, overlapping stem": EncoderConfig("convnext_atto_ols", 64, model_args=CONVOLUTIONS),
}
"""By name. The strides differ: 16 and 14 in Vision Transformers and Swin of three stages, 32 in the others."""

CANNOT_DROP = ("hybrid", "swin", "swinv2", "convnext", "convnextv2", "convnext, overlapping stem")
CANNOT_MASK = ("hybrid", "convnext, overlapping stem")


def flags_of(objective: str, name: str, drop_path_rate: float = 0.0) -> list[str]:
    """What makes of `conftest`'s small runs one of a family."""
    config = FAMILIES[name]
    arguments, layer_scale = dict(config.model_args), None
    if name == "convnext":  # its own 1e-6 would leave the features of all images the same
        arguments["ls_init_value"] = 1.0
    if name == "dinov3":
        layer_scale = 1.0
    found = replace(config, model_args=arguments, layer_scale=layer_scale, drop_path_rate=drop_path_rate)
    flags = [
        f"--encoder.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in vars(found).items()
    ]
    flags += ["--data.label_column=none", "--checkpoint.every_steps=1"]
    flags += [f"--data.{key}={[0.5] * config.in_chans}" for key in ("mean", "std")]
    if objective in ("mae", "simmim", "fcmae", "distill"):
        return flags
    return [*flags, f"--objective.local_crop_size={28 if name == 'eva02' else 32}"]
