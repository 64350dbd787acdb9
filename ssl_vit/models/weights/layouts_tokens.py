"""Distilled DeiT and DINOv3's Vision Transformers in timm and in transformers."""

from typing import Any, Literal

import torch
from timm.layers.mlp import SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva

from ssl_vit.models.weights.layouts import STEM, VIT_BLOCK, Tensors
from ssl_vit.models.weights.layouts_shared import SIZE, Layout, Names, Settings, not_whole, plain, ratio, under

_QKV = "attention.attention"
_DEIT_BLOCK = {**VIT_BLOCK, "attn.qkv": (f"{_QKV}.query", f"{_QKV}.key", f"{_QKV}.value")}
_DINOV3_STEM = {
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj": "embeddings.patch_embeddings",
    "norm": "norm",
}
_DINOV3_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.q_bias": "attention.q_proj.bias",
    "attn.v_bias": "attention.v_proj.bias",
    "attn.proj": "attention.o_proj",
    "gamma_1": "layer_scale1.lambda1",
    "gamma_2": "layer_scale2.lambda1",
    "mlp.fc2": "mlp.down_proj",
}
_PLAIN_MLP = {"mlp.fc1": "mlp.up_proj"}
_GATED_MLP = {"mlp.fc1_g": "mlp.gate_proj", "mlp.fc1_x": "mlp.up_proj"}
_DEITS = {192: "tiny", 384: "small", 768: "base"}
_DINOV3S = {
    (192, False): "tiny",
    (384, False): "small",
    (384, True): "small_plus",
    (768, False): "base",
    (1024, False): "large",
    (1280, True): "huge_plus",
    (4096, True): "7b",
}


def _describe_tokens(vit: Any) -> Settings:
    proj, block = vit.patch_embed.proj, vit.blocks[0]
    return {
        "patch_size": plain(proj.kernel_size),
        "num_channels": proj.in_channels,
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc2.in_features,
    }


def _tokens_arguments(settings: Settings) -> dict[str, Any]:
    return {
        "img_size": settings["image_size"],
        "patch_size": settings["patch_size"],
        "in_chans": settings["num_channels"],
        "embed_dim": settings["hidden_size"],
        "depth": settings["num_hidden_layers"],
        "num_heads": settings["num_attention_heads"],
        "mlp_ratio": ratio(settings["intermediate_size"], settings["hidden_size"]),
    }


def _describe_deit(deit: Any) -> Settings:
    # The pooling layer is an identity, so that the pooled output is the class token.
    bias = deit.blocks[0].attn.qkv.bias is not None
    pooler = {"pooler_act": "linear", "pooler_output_size": deit.embed_dim}
    return {**_describe_tokens(deit), "qkv_bias": bias, **pooler}


def _deit_arch(settings: Settings) -> str:
    return f"deit_{_DEITS.get(settings['hidden_size'])}_distilled_patch16_224"


def _deit_arguments(settings: Settings) -> dict[str, Any]:
    return {**_tokens_arguments(settings), "qkv_bias": settings["qkv_bias"]}


def _deit_names(settings: Settings) -> Names:
    names: Names = {name: theirs for name, theirs in STEM.items() if name != "reg_token"}
    names["dist_token"] = "embeddings.distillation_token"
    for block in range(settings["num_hidden_layers"]):
        names |= under(f"blocks.{block}", f"encoder.layer.{block}", _DEIT_BLOCK)
    return names


def _deit_pooler(settings: Settings) -> Tensors:
    width = settings["hidden_size"]
    return {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}


_TOKENS_SETTINGS = {
    "image_size": (SIZE, 224),
    "patch_size": (SIZE, 16),
    "num_channels": (int, 3),
    "hidden_size": (int, 768),
    "num_hidden_layers": (int, 12),
    "num_attention_heads": (int, 12),
    "intermediate_size": (int, 3072),
    "hidden_act": (Literal["gelu", "silu"], "gelu"),
}

DEIT = Layout(
    architecture="DeiTModel",
    model_type="deit",
    prefix="deit",
    eps=1e-6,
    settings=_TOKENS_SETTINGS
    | {"qkv_bias": (bool, True), "hidden_act": (Literal["gelu"], "gelu"), "layer_norm_eps": (float, 1e-12)},
    fits=lambda model: isinstance(model, VisionTransformerDistilled),
    describe=_describe_deit,
    arch=_deit_arch,
    near="deit_tiny_distilled_patch16_224",
    arguments=_deit_arguments,
    odd=not_whole,
    names=_deit_names,
    own=_deit_pooler,
)


def _describe_dinov3(eva: Any) -> Settings:
    attn, rope = eva.blocks[0].attn, eva.rope
    has_bias, is_gated = getattr(attn, "q_bias", None) is not None, isinstance(eva.blocks[0].mlp, SwiGLU)
    return {
        **_describe_tokens(eva),
        "hidden_act": "silu" if is_gated else "gelu",
        "use_gated_mlp": is_gated,
        "num_register_tokens": 0 if eva.reg_token is None else eva.reg_token.shape[1],
        "query_bias": has_bias,
        "value_bias": has_bias,
        "rope_theta": float(getattr(rope, "temperature", None) or 100),
        # Of positions, while transformers trains on.
        "pos_embed_shift": getattr(rope, "shift_coords", None),
        "pos_embed_jitter": getattr(rope, "jitter_coords", None),
        "pos_embed_rescale": getattr(rope, "rescale_coords", None),
    }


def _dinov3_arch(settings: Settings) -> str:
    size = _DINOV3S.get((settings["hidden_size"], settings["use_gated_mlp"]))
    return f"vit_{size}_patch16_dinov3{'_qkvb' if settings['query_bias'] else ''}"


def _dinov3_arguments(settings: Settings) -> dict[str, Any]:
    return {
        **_tokens_arguments(settings),
        "qkv_bias": settings["query_bias"],
        "swiglu_mlp": settings["use_gated_mlp"],
        "swiglu_align_to": 1,  # as wide as mlp_ratio tells
        "num_reg_tokens": settings["num_register_tokens"],
        "rope_temperature": settings["rope_theta"],
    }


def _odd_dinov3(settings: Settings) -> str | None:
    if settings["query_bias"] != settings["value_bias"]:
        return "of queries and values, one has a bias"
    act = "silu" if settings["use_gated_mlp"] else "gelu"
    if settings["hidden_act"] != act:
        return f"hidden_act={settings['hidden_act']}, and timm's MLP of this kind has {act}"
    return not_whole(settings)


def _dinov3_names(settings: Settings) -> Names:
    names: Names = dict(_DINOV3_STEM)
    if settings["num_register_tokens"]:
        names["reg_token"] = "embeddings.register_tokens"
    parts = {**_DINOV3_BLOCK, **(_GATED_MLP if settings["use_gated_mlp"] else _PLAIN_MLP)}
    for block in range(settings["num_hidden_layers"]):
        names |= under(f"blocks.{block}", f"layer.{block}", parts)
    return names


def _dinov3_tokens(settings: Settings) -> Tensors:
    """The mask token, which only pre-training uses, and a table of no registers where there are none."""
    width = settings["hidden_size"]
    own = {"embeddings.mask_token": torch.zeros(1, 1, width)}
    return own if settings["num_register_tokens"] else own | {"embeddings.register_tokens": torch.zeros(1, 0, width)}


DINOV3 = Layout(
    architecture="DINOv3ViTModel",
    model_type="dinov3_vit",
    prefix="model",
    eps=1e-5,
    settings=_TOKENS_SETTINGS
    | {
        "hidden_size": (int, 384),
        "num_attention_heads": (int, 6),
        "intermediate_size": (int, 1536),
        "layer_norm_eps": (float, 1e-5),
        "use_gated_mlp": (bool, False),
        "num_register_tokens": (int, 0),
        "rope_theta": (float, 100.0),
        "query_bias": (bool, True),
        "key_bias": (Literal[False], False),
        "value_bias": (bool, True),
        "proj_bias": (Literal[True], True),
        "mlp_bias": (Literal[True], True),
    },
    fits=lambda model: isinstance(model, Eva),
    describe=_describe_dinov3,
    arch=_dinov3_arch,
    near="vit_small_patch16_dinov3",
    arguments=_dinov3_arguments,
    odd=_odd_dinov3,
    names=_dinov3_names,
    own=_dinov3_tokens,
)
