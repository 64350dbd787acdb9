"""Parameter names of a plain Vision Transformer: timm's, which are ours, transformers' and torchvision's."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.mlp import GluMlp, Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

Tensors = dict[str, Tensor]

# timm's name of a part, and transformers' name of it.
STEM = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
VIT_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_DINOV2_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SWIGLU_BLOCK = {**_DINOV2_BLOCK, "mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
_QKV = ("query", "key", "value")
_TORCHVISION_STEM = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj": "conv_proj",
    "norm": "encoder.ln",
}
_TORCHVISION_BLOCK = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.proj": "self_attention.out_proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a plain Vision Transformer, as other libraries' constructors take them."""

    width: int
    depth: int
    num_heads: int
    hidden: int
    """Width of the MLP's hidden layer."""
    eps: float
    """Of every norm."""
    has_layer_scale: bool
    has_swiglu: bool
    num_registers: int


def plain_shape(vit: nn.Module) -> Shape:
    """The sizes of a plain ViT.

    Raises:
        ValueError: it has a part that the ViTs of MAE, DINO and DINOv2 do not have; names the part.
    """
    reason = _not_plain(vit)
    if not isinstance(vit, VisionTransformer) or reason is not None:
        raise ValueError(f"only plain Vision Transformers can leave for this library, and {reason}; export to timm")
    first: Any = vit.blocks[0]
    return Shape(
        width=vit.embed_dim,
        depth=len(vit.blocks),
        num_heads=first.attn.num_heads,
        hidden=first.mlp.fc2.in_features,
        eps=first.norm1.eps,
        has_layer_scale=not isinstance(first.ls1, nn.Identity),
        has_swiglu=isinstance(first.mlp, GluMlp),
        num_registers=vit.num_reg_tokens,
    )


def _not_plain(vit: Any) -> str | None:
    if not isinstance(vit, VisionTransformer) or not isinstance(vit.patch_embed, PatchEmbed):
        return "it is of another family"
    if vit.num_prefix_tokens > 1 + vit.num_reg_tokens:
        return "it has a distillation token"
    if len(vit.blocks) == 0 or not vit.has_class_token or vit.pos_embed is None:
        return "it has no class token, no position table or no blocks"
    if not isinstance(vit.norm_pre, nn.Identity) or not isinstance(vit.patch_embed.norm, nn.Identity):
        return "it normalises the patches before the first block"
    if vit.patch_embed.proj.bias is None:
        return "the patch projection has no bias"
    for block in vit.blocks:
        if not isinstance(block, Block) or type(block.attn).__name__ != "Attention":
            return f"the blocks are of another kind ({type(block).__name__})"
    norms = [vit.norm, *(norm for block in vit.blocks for norm in (block.norm1, block.norm2))]
    if any(not isinstance(norm, nn.LayerNorm) or norm.eps != norms[0].eps for norm in norms):
        return "the norms are no layer norms that are all alike"
    return next(filter(None, map(_odd_block, vit.blocks)), None)


def _odd_block(block: Any) -> str | None:
    attn, mlp = block.attn, block.mlp
    norms = (attn.q_norm, attn.k_norm, getattr(attn, "norm", None), getattr(mlp, "norm", None))
    if any(norm is not None and not isinstance(norm, nn.Identity) for norm in norms):
        return "attention or MLP have norms of their own"
    if attn.qkv.bias is None or attn.proj.bias is None:
        return "the attention has no biases"
    is_plain = type(mlp) is Mlp and isinstance(mlp.act, nn.GELU)
    is_swiglu = type(mlp) is GluMlp and isinstance(mlp.act, nn.SiLU) and not mlp.gate_last
    if not is_plain and not is_swiglu:
        return f"the MLP is neither one with GELU nor SwiGLU ({type(mlp).__name__}, {type(mlp.act).__name__})"
    return None


def plain_tensors(vit: Any) -> Tensors:
    """The weights on the CPU. The class token has a position in the table; registers' positions are added to them."""
    tensors = {name: value.detach().float().cpu().clone() for name, value in vit.state_dict().items()}
    positions = tensors["pos_embed"]
    if vit.no_embed_class:
        tensors["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    elif vit.num_reg_tokens:
        end = 1 + vit.num_reg_tokens
        tensors["reg_token"] += positions[:, 1:end]
        tensors["pos_embed"] = torch.cat([positions[:, :1], positions[:, end:]], dim=1)
    return tensors


def fold_layer_scale(tensors: Tensors) -> Tensors:
    """The same function without LayerScale, whose factors are multiplied into the layers before it."""
    folded = {name: value for name, value in tensors.items() if not name.endswith(".gamma")}
    for name, gamma in tensors.items():
        if name.endswith(".gamma"):
            layer = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
            folded[f"{layer}.weight"] = folded[f"{layer}.weight"] * gamma[:, None]
            folded[f"{layer}.bias"] = folded[f"{layer}.bias"] * gamma
    return folded


def to_transformers(tensors: Mapping[str, Tensor], *, dinov2: bool = False, swiglu: bool = False) -> Tensors:
    """Rename timm's tensors to those of transformers' ViTModel or Dinov2Model, as in files on the hub."""
    table = _SWIGLU_BLOCK if swiglu else _DINOV2_BLOCK if dinov2 else VIT_BLOCK
    return _to_transformers(tensors, "blocks", "encoder.layer", lambda name: _swap(name, STEM), table)


def decoder_to_transformers(tensors: Mapping[str, Tensor]) -> Tensors:
    """Rename the tensors of MAE's decoder to those of transformers' ViTMAEForPreTraining."""
    return _to_transformers(
        tensors, "decoder_blocks", "decoder.decoder_layers", lambda name: f"decoder.{name}", VIT_BLOCK
    )


def _to_transformers(
    tensors: Mapping[str, Tensor], blocks: str, layers: str, rename: Callable[[str], str], table: Mapping[str, str]
) -> Tensors:
    """Rename tensors, those of blocks by a table; timm's joint queries, keys and values become three tensors."""
    renamed: Tensors = {}
    for name, value in tensors.items():
        block = re.match(rf"{blocks}\.(\d+)\.(.*)", name)
        if block is None:
            renamed[rename(name)] = value
        elif block[2].startswith("attn.qkv."):
            kind = name.rpartition(".")[2]
            for role, part in zip(_QKV, value.chunk(3), strict=True):
                renamed[f"{layers}.{block[1]}.attention.attention.{role}.{kind}"] = part.contiguous()
        else:
            renamed[f"{layers}.{block[1]}.{_swap(block[2], table)}"] = value
    return renamed


def to_torchvision(tensors: Mapping[str, Tensor]) -> Tensors:
    """Rename timm's tensors to those of torchvision's VisionTransformer without its heads."""
    renamed: Tensors = {}
    for name, value in tensors.items():
        block = re.match(r"blocks\.(\d+)\.(.*)", name)
        if block is None:
            renamed[_swap(name, _TORCHVISION_STEM)] = value
        else:
            part = block[2].replace("attn.qkv.", "self_attention.in_proj_")
            renamed[f"encoder.layers.encoder_layer_{block[1]}.{_swap(part, _TORCHVISION_BLOCK)}"] = value
    return renamed


def is_transformers(names: set[str]) -> bool:
    """Whether these are names of transformers' ViTModel, Dinov2Model or ViTMAE models."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names)


def from_transformers(tensors: Mapping[str, Tensor]) -> Tensors:
    """The backbone of a ViTModel, Dinov2Model or ViTMAE model under timm's names.

    What belongs to no backbone (pooler, heads, mask token, decoder) is left out.
    """
    names = {name: re.sub(r"^(vit|dinov2|dinov2_with_registers|backbone)\.", "", name) for name in tensors}
    dinov2 = any("layer_scale1" in name for name in tensors)
    block_table = {theirs: ours for ours, theirs in (_DINOV2_BLOCK if dinov2 else VIT_BLOCK).items()}
    block_table |= {"mlp.weights_in": "mlp.fc1", "mlp.weights_out": "mlp.fc2"}
    stem_table = {theirs: ours for ours, theirs in STEM.items()}
    found: Tensors = {}
    roles: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        plain = names[name]
        if re.match(r"(pooler|decoder|classifier|head)\.", plain) or plain in ("embeddings.mask_token", "mask_token"):
            continue
        block = re.match(r"encoder\.layer\.(\d+)\.(.*)", plain)
        if block is None:
            found[_swap(plain, stem_table)] = value
            continue
        role = re.match(r"attention\.attention\.(query|key|value)\.(.*)", block[2])
        if role is None:
            found[f"blocks.{block[1]}.{_swap(block[2], block_table)}"] = value
        else:
            roles.setdefault(f"blocks.{block[1]}.attn.qkv.{role[2]}", {})[role[1]] = value
    for name, parts in roles.items():
        if set(parts) == set(_QKV):
            found[name] = torch.cat([parts[role] for role in _QKV])
    return merge_class_position(found)


def merge_class_position(tensors: Tensors, prefix: str = "") -> Tensors:
    """Add the class token's position to it where there are registers.

    timm's architectures with registers give the class token no position of its own.
    """
    if f"{prefix}reg_token" not in tensors or f"{prefix}pos_embed" not in tensors:
        return tensors
    positions = tensors[f"{prefix}pos_embed"]
    merged = {f"{prefix}cls_token": tensors[f"{prefix}cls_token"] + positions[:, :1]}
    return {**tensors, **merged, f"{prefix}pos_embed": positions[:, 1:]}


def _swap(name: str, table: Mapping[str, str]) -> str:
    """Replace a whole name, or its part before the last dot, by the table's entry."""
    if name in table:
        return table[name]
    part, _, kind = name.rpartition(".")
    return f"{table[part]}.{kind}" if part in table else name
