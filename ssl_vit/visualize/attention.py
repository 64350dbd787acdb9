"""What tokens look at: attention of any block, from the class token or from a patch, head by head."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from matplotlib import colormaps
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.data.transform import Normalization
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.vit import ViT
from ssl_vit.visualize.grid import Scale, channel_caption, draw_grid, enlarge, to_rgb

_DIMMED = 0.3  # brightness of what is left out in an overlay


def has_plain_attention(encoder: Encoder) -> bool:
    """Whether attention between tokens can be shown: a Vision Transformer with plain blocks."""
    if not isinstance(encoder, ViT) or len(encoder.vit.blocks) == 0:
        return False
    return hasattr(getattr(encoder.vit.blocks[-1], "attn", None), "qkv")


def shows_attention(encoder: Encoder) -> bool:
    """Whether `cls_attention` knows this encoder: a Vision Transformer with a class token and plain blocks."""
    return has_plain_attention(encoder) and encoder.has_cls_token


def cls_attention(encoder: Encoder, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads rows columns"]:
    """Attention from the class token to every patch in the last block (DINO, arXiv:2104.14294, figure 1).

    It is computed from the block's input, so it works where attention is fused and never stored. What the class token
    pays to itself and to registers is left out, the rest is not rescaled. Images of any size that the patch size
    divides.

    Raises:
        ValueError: the encoder is no Vision Transformer with a class token and plain blocks.
    """
    return attention_from(encoder, images)


def attention_from(
    encoder: Encoder, images: Float[Tensor, "b c h w"], *, patch: int | None = None, layer: int = -1
) -> Float[Tensor, "b heads rows columns"]:
    """Attention from one token to every patch in one block; see `cls_attention`.

    Args:
        patch: row-major index of the patch that looks; None = the class token.
        layer: number of the block, from 0; negative ones count from the end.

    Raises:
        ValueError: the encoder has no such attention, or no such block or patch.
    """
    if patch is None and not shows_attention(encoder):
        raise ValueError(
            f"{type(encoder).__name__}: has no class token, or its blocks no attention that could be shown"
        )
    _check(encoder, layer)
    rows, columns = (side // size for side, size in zip(images.shape[-2:], encoder.patch_size, strict=True))
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
    """softmax(QK / sqrt(d)) of some blocks, for the tokens that `queries` takes out of [class, registers, patches].

    Raises:
        ValueError: the encoder has no such attention, or no such block.
    """
    for layer in layers:
        _check(encoder, layer)
    blocks: Any = encoder.get_submodule("vit.blocks")
    modules = [blocks[layer].attn for layer in layers]
    inputs: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for place, module in enumerate(modules):

            def note(_: nn.Module, args: tuple[Tensor, ...], place: int = place) -> None:
                inputs[place] = args[0]

            stack.callback(module.register_forward_pre_hook(note).remove)
        with _eval_mode(encoder):
            encoder(images)
    found = []
    for place, module in enumerate(modules):
        packed = module.qkv(inputs[place])
        query, key, _ = rearrange(packed, "b t (three h d) -> three b h t d", three=3, h=module.num_heads)
        query, key = module.q_norm(query[:, :, queries]), module.k_norm(key)
        found.append((query * module.scale @ key.transpose(-2, -1)).softmax(dim=-1))
    return found


def _check(encoder: Encoder, layer: int) -> None:
    if not has_plain_attention(encoder):
        raise ValueError(f"{type(encoder).__name__}: its blocks have no attention that could be shown")
    if not -encoder.num_layers <= layer < encoder.num_layers:
        raise ValueError(
            f"layer={layer}: there are {encoder.num_layers} blocks, numbered 0 to {encoder.num_layers - 1}; "
            "-1 is the last"
        )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout; each module is put back into the mode that it had."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


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
    normalization: Normalization,
    path: Path,
    mass: float | None = None,
    max_heads: int = 6,
    patch: int | None = None,
    title: str = "Attention of the class token in the last block",
) -> None:
    """Write a picture with a row for each image: the image, the mean over heads, and the first heads.

    Args:
        images: normalised by `normalization`.
        path: PNG or WebP by its suffix.
        mass: lay the maps over the image, and dim all but the patches that hold this share of a map's attention;
            None shows the maps alone, all of them.
        patch: row-major index of the patch that looks, to be framed; None where it is the class token.
    """
    images = images.detach().float().cpu()
    maps = torch.cat([attention.mean(dim=1, keepdim=True), attention[:, :max_heads]], dim=1).float().cpu()
    shown = to_rgb(images, normalization)[:, None]
    scaled = maps / maps.amax(dim=(-2, -1), keepdim=True).clamp_min(1e-12)  # each map has its own scale
    colours = colour(F.interpolate(scaled, size=images.shape[-2:], mode="nearest"), "inferno")
    if mass is None:
        panels = colours
        sentences = ["Each map is scaled to its own maximum."]
    else:
        kept = F.interpolate(keep_mass(maps, mass).float(), size=images.shape[-2:], mode="nearest")[..., None]
        panels = torch.where(kept > 0, 0.45 * shown + 0.55 * colours, _DIMMED * shown)
        sentences = [
            f"Lit are the fewest patches that hold {mass:.0%} of a map's attention; each map is scaled to its own "
            "maximum."
        ]
    if patch is not None:
        shown, panels = enlarge(shown), enlarge(panels)
        size = shown.shape[2] // attention.shape[-2], shown.shape[3] // attention.shape[-1]
        shown = frame(shown, patch, size)
        sentences.append("The patch that looks is framed.")
    columns = ["image", "mean", *(f"head {head + 1}" for head in range(maps.shape[1] - 1))]
    if attention.shape[1] > max_heads:
        sentences.append(f"The first {max_heads} of {attention.shape[1]} heads are shown.")
    draw_grid(
        torch.cat([shown, panels], dim=1),
        columns,
        path,
        title=title,
        caption=" ".join([*sentences, *channel_caption(images.shape[1])]),
        scale=Scale("inferno", "no attention", "most"),
    )


def colour(values: Float[Tensor, "*b h w"], name: str) -> Float[Tensor, "*b h w 3"]:
    """Values in [0, 1] in the colours of one of matplotlib's maps."""
    table = torch.tensor(colormaps[name](np.arange(256))[:, :3], dtype=torch.float32)
    return table[(values.clamp(0, 1) * 255).round().long()]


def frame(panels: Float[Tensor, "b v h w 3"], patch: int, patch_size: tuple[int, int]) -> Float[Tensor, "b v h w 3"]:
    """The same pictures with a frame about one patch, red within white, so that it is seen on any ground."""
    height, width = panels.shape[2:4]
    row, column = divmod(patch, width // patch_size[1])
    thick = max(1, height // 96)
    framed = panels.clone()
    for shade, inset in (((1.0, 1.0, 1.0), -thick), ((0.85, 0.1, 0.1), 0)):
        top, left = max(row * patch_size[0] + inset, 0), max(column * patch_size[1] + inset, 0)
        bottom = min((row + 1) * patch_size[0] - inset, height)
        right = min((column + 1) * patch_size[1] - inset, width)
        for area in (
            (slice(top, top + thick), slice(left, right)),
            (slice(bottom - thick, bottom), slice(left, right)),
            (slice(top, bottom), slice(left, left + thick)),
            (slice(top, bottom), slice(right - thick, right)),
        ):
            framed[:, :, area[0], area[1]] = torch.tensor(shade)
    return framed
