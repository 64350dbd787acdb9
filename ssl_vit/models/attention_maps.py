"""Attention maps of a Vision Transformer: softmax(QK / sqrt(d)) of any block, head by head."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn

from ssl_vit.models.encoder import Encoder, eval_mode


def has_cls_attention(encoder: Encoder) -> bool:
    """Whether `attention_maps` supports this encoder without a query: a Vision Transformer with a class token."""
    return encoder.has_attention_maps and encoder.has_cls_token


def attention_maps(
    encoder: Encoder, images: Float[Tensor, "b c h w"], *, patch: int | None = None, layer: int = -1
) -> Float[Tensor, "b heads rows columns"]:
    """Attention from one token to every patch in one block (DINO, arXiv:2104.14294, figure 1).

    Maps are computed from the block's input, since fused attention stores none. Attention to the class token and to
    registers is left out; the rest is not rescaled.

    Args:
        images: normalised, of any size that the patch size divides.
        patch: row-major index of the query patch; None = the class token.
        layer: index of the block, from 0; negative numbers count from the end.

    Raises:
        ValueError: the encoder does not support attention maps, or has no such block or patch.
    """
    if patch is None and not has_cls_attention(encoder):
        raise ValueError(f"{encoder.config.arch}: has no class token, or its blocks have no attention to show")
    _check(encoder, layer)
    rows, columns = encoder.grid_of(*images.shape[-2:])
    if patch is not None and not 0 <= patch < rows * columns:
        raise ValueError(f"patch={patch}: there are {rows} x {columns} patches, numbered 0 to {rows * columns - 1}")
    vit: Any = encoder.get_submodule("vit")
    query = 0 if patch is None else vit.num_prefix_tokens + patch
    (weights,) = attention_weights(encoder, images, layers=[layer], queries=slice(query, query + 1))
    return rearrange(weights[:, :, 0, -rows * columns :], "b h (r c) -> b h r c", r=rows)


@torch.inference_mode()
def attention_weights(
    encoder: Encoder,
    images: Float[Tensor, "b c h w"],
    *,
    layers: Sequence[int],
    queries: slice = slice(None),
) -> list[Float[Tensor, "b heads q t"]]:
    """softmax(QK / sqrt(d)) of the chosen blocks; `queries` picks rows of [class, registers, patches].

    Raises:
        ValueError: the encoder does not support attention maps, or has no such block.
    """
    for layer in layers:
        _check(encoder, layer)
    blocks: Any = encoder.get_submodule("vit.blocks")
    modules = [blocks[layer].attn for layer in layers]
    inputs: dict[int, tuple[Tensor, Tensor | None]] = {}
    with ExitStack() as stack:
        for place, module in enumerate(modules):

            def note(_: nn.Module, args: tuple[Tensor, ...], given: dict[str, Any], place: int = place) -> None:
                inputs[place] = args[0], given.get("rope")

            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        with eval_mode(encoder):
            encoder(images)
    found = []
    for place, module in enumerate(modules):
        query, key = _queries_and_keys(module, *inputs[place])
        query = query[:, :, queries]
        found.append((query * module.scale @ key.transpose(-2, -1)).softmax(dim=-1))
    return found


def _queries_and_keys(
    attn: Any, tokens: Float[Tensor, "b t d"], rope: Float[Tensor, "*_ n e"] | None
) -> tuple[Float[Tensor, "b h t k"], Float[Tensor, "b h t k"]]:
    """Queries and keys of timm's attention, rotated by `rope` but for prefix tokens."""
    if attn.qkv is None:  # as in EVA-02 of base size
        query, key = (
            rearrange(one(tokens), "b t (h d) -> b h t d", h=attn.num_heads) for one in (attn.q_proj, attn.k_proj)
        )
    else:
        packed = attn.qkv(tokens)
        if getattr(attn, "q_bias", None) is not None:
            packed = packed + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        query, key, _ = rearrange(packed, "b t (three h d) -> three b h t d", three=3, h=attn.num_heads)
    query, key = attn.q_norm(query), attn.k_norm(key)
    if rope is None:
        return query, key
    first, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
    query, key = (
        torch.cat([one[:, :, :first], apply_rot_embed_cat(one[:, :, first:], rope, half=half)], dim=2)
        for one in (query, key)
    )
    return query, key


def _check(encoder: Encoder, layer: int) -> None:
    if not encoder.has_attention_maps:
        raise ValueError(f"{encoder.config.arch}: its blocks have no attention to show; choose a Vision Transformer")
    if not -encoder.num_layers <= layer < encoder.num_layers:
        raise ValueError(
            f"layer={layer}: there are {encoder.num_layers} blocks, numbered 0 to {encoder.num_layers - 1}; "
            "-1 is the last"
        )
