"""What the class token looks at: attention of the last block, head by head."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from matplotlib import colormaps
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.models.encoder import Encoder
from ssl_vit.models.vit import ViT
from ssl_vit.visualize.grid import channel_caption, draw_grid, to_rgb


def shows_attention(encoder: Encoder) -> bool:
    """Whether `cls_attention` knows this encoder: a Vision Transformer with a class token and plain blocks."""
    if not isinstance(encoder, ViT) or not encoder.has_cls_token:
        return False
    return hasattr(getattr(encoder.vit.blocks[-1], "attn", None), "qkv")


@torch.inference_mode()
def cls_attention(encoder: Encoder, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads rows columns"]:
    """Attention from the class token to every patch in the last block (DINO, arXiv:2104.14294, figure 1).

    It is computed from the block's input, so it works where attention is fused and never stored. What the class token
    pays to itself and to registers is left out, the rest is not rescaled. Images of any size that the patch size
    divides.

    Raises:
        ValueError: the encoder is no Vision Transformer with a class token and plain blocks.
    """
    if not shows_attention(encoder):
        raise ValueError(
            f"{type(encoder).__name__}: has no class token, or its blocks no attention that could be shown"
        )
    blocks: Any = encoder.get_submodule("vit.blocks")
    attention = blocks[-1].attn
    inputs: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    training = {module: module.training for module in encoder.modules()}
    try:
        encoder.eval()
        features = encoder(images)
    finally:
        handle.remove()
        for module, mode in training.items():
            module.training = mode
    heads = attention.num_heads
    query, key, _ = rearrange(attention.qkv(inputs[0]), "b t (three h d) -> three b h t d", three=3, h=heads)
    query, key = attention.q_norm(query[:, :, :1]), attention.k_norm(key)
    weights = (query * attention.scale @ key.transpose(-2, -1)).softmax(dim=-1)[:, :, 0]
    rows = images.shape[-2] // encoder.patch_size[0]
    return rearrange(weights[:, :, -features.patches.shape[1] :], "b h (r c) -> b h r c", r=rows)


def keep_mass(attention: Float[Tensor, "*b rows columns"], mass: float) -> Bool[Tensor, "*b rows columns"]:
    """True for the fewest patches that together hold at least `mass` of a map's attention; DINO's usual value is 0.6.

    Raises:
        ValueError: `mass` is not in (0, 1].
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass={mass!r}: must lie in (0, 1]; the usual value is 0.6")
    flat = attention.flatten(-2)
    shares, order = (flat / flat.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True)
    kept = shares.cumsum(dim=-1) - shares < mass  # the patch that crosses the threshold is the last one in
    return torch.zeros_like(kept).scatter(-1, order, kept).reshape(attention.shape)


def draw_attention(
    images: Float[Tensor, "b c h w"],
    attention: Float[Tensor, "b heads rows columns"],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    path: Path,
    mass: float | None = None,
    max_heads: int = 6,
) -> None:
    """Write a PNG with a row for each image: the image, the mean over heads, and the first heads.

    Args:
        images: normalised by `mean` and `std`.
        mass: leave only the patches that hold this share of a map's attention; None shows all.
    """
    images = images.detach().float().cpu()
    maps = torch.cat([attention.mean(dim=1, keepdim=True), attention[:, :max_heads]], dim=1).float().cpu()
    if mass is not None:
        maps = maps * keep_mass(maps, mass)
    maps = maps / maps.amax(dim=(-2, -1), keepdim=True).clamp_min(1e-12)  # each map has its own scale
    maps = F.interpolate(maps, size=images.shape[-2:], mode="nearest")
    colours = torch.tensor(colormaps["inferno"](np.arange(256))[:, :3], dtype=torch.float32)
    panels = torch.cat([to_rgb(images, mean, std)[:, None], colours[(maps * 255).round().long()]], dim=1)
    columns = ["image", "mean", *(f"head {head + 1}" for head in range(maps.shape[1] - 1))]
    sentences = ["Each map is scaled to its own maximum: dark is none, bright is most."]
    if mass is not None:
        sentences.append(f"Only the patches that hold {mass:.0%} of the attention are shown.")
    draw_grid(
        panels,
        columns,
        path,
        title="Attention of the class token in the last block",
        caption=" ".join([*sentences, *channel_caption(images.shape[1])]),
    )
