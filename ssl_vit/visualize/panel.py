"""What the report's panel shows, computed ahead: attention between all tokens, similarities, and MAE's steps."""

import base64
import io
import json
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.data.augment.masking import draw_keep
from ssl_vit.models.attention_maps import attention_weights
from ssl_vit.objectives.objective import Reconstructs
from ssl_vit.runs.trained import Trained
from ssl_vit.visualize.grid import to_rgb
from ssl_vit.visualize.inputs import ShownImages
from ssl_vit.visualize.patches import patch_pca
from ssl_vit.visualize.reconstructions import reconstruction_panels

_SIDE = 512  # pixels; larger images are made smaller


def panel_data(trained: Trained, inputs: ShownImages, *, most_bytes: int = 6_000_000, seed: int = 0) -> dict[str, Any]:
    """Everything that the panel looks up, for `json.dump`.

    Args:
        most_bytes: of all of it as JSON. Attention gets what the rest leaves: where all blocks and heads would take
            more, the last block stays and others are left out evenly; where even that is too much, heads are averaged,
            and where one map is too much, there is no attention.

    Raises:
        ValueError: it takes more without any attention.
    """
    encoder, images = trained.encoder, inputs.images
    grid = encoder.grid_of(*images.shape[-2:])
    num_patches = grid[0] * grid[1]
    _check_size(_base64_bytes(len(images) * num_patches**2), most_bytes)
    with torch.inference_mode():
        tokens = encoder(images).patches
    unit = F.normalize(tokens.float(), dim=-1)
    similarity = _bytes(torch.einsum("bnd,bmd->bnm", unit, unit).clamp(0, 1))
    shown = to_rgb(images, trained.normalization)
    data: dict[str, Any] = {
        "grid": list(grid),
        "has_cls": encoder.has_cls_token,
        "layers": [],
        "heads": 0,
        "images": [
            {"name": name, "picture": data_uri(image), "similarity": _pack(values)}
            for name, image, values in zip(inputs.names, shown, similarity, strict=True)
        ],
    }
    if trained.objective is not None and trained.objective.drops_tokens:
        _add_steps(data, trained, trained.objective, images, grid, seed)
    used = len(json.dumps(data))
    _check_size(used, most_bytes)
    if encoder.has_attention_maps:
        _add_attention(data, trained, images, num_patches, (most_bytes - used) * 3 // 4 - 1000)
    return data


def choose_layers(num_layers: int, num_heads: int, map_bytes: int, most_bytes: int) -> tuple[list[int], bool]:
    """Which blocks fit into so many bytes, the last one always among them, and whether heads fit one by one.

    Nothing where the mean of one block's heads is too much.

    Args:
        map_bytes: of one head's attention in one block.
    """
    fit = most_bytes // (map_bytes * num_heads)
    single = fit >= 1
    if not single:
        fit = max(0, most_bytes // map_bytes)
    if fit >= num_layers:
        return list(range(num_layers)), single
    return sorted({num_layers - 1 - round(place * num_layers / fit) for place in range(fit)}), single


def _add_attention(
    data: dict[str, Any], trained: Trained, images: Float[Tensor, "b c h w"], num_patches: int, most_bytes: int
) -> None:
    encoder: Any = trained.encoder
    prefix, num_heads = encoder.vit.num_prefix_tokens, encoder.vit.blocks[-1].attn.num_heads
    queries = num_patches + int(encoder.has_cls_token)
    layers, single = choose_layers(encoder.num_layers, num_heads, len(images) * queries * num_patches, most_bytes)
    if not layers:
        return
    data["layers"], data["heads"] = layers, num_heads if single else 0
    per_image: list[list[Tensor]] = [[] for _ in images]
    for weights in attention_weights(encoder, images, layers=layers):
        # Class token first, where there is one; registers do not look and are not looked at here.
        rows = torch.cat([weights[:, :, : int(encoder.has_cls_token)], weights[:, :, prefix:]], dim=2)[..., prefix:]
        rows = rows if single else rows.mean(dim=1, keepdim=True)
        # One scale for all heads of a token, so that their mean can be taken on the page.
        scaled = _bytes(rows / rows.amax(dim=(1, 3), keepdim=True).clamp_min(1e-12))
        for place, values in enumerate(scaled):
            per_image[place].append(values)
    for item, maps in zip(data["images"], per_image, strict=True):
        item["attention"] = _pack(torch.stack(maps))  # layers, heads, queries, patches


def _add_steps(
    data: dict[str, Any], trained: Trained, objective: Reconstructs, images: Tensor, grid: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    num_patches = grid[0] * grid[1]
    keep = torch.stack([draw_keep(num_patches, objective.config.mask_ratio, rng) for _ in images])
    with torch.inference_mode():
        visible = objective.encoder(images, keep=keep).patches
        reconstruction = objective.fill_in(images, keep)
    panels = reconstruction_panels(images, reconstruction, trained.normalization)
    data["steps"] = {
        "num_kept": keep.shape[1],
        "num_patches": num_patches,
        "embed_dim": objective.encoder.embed_dim,
        "depth": objective.encoder.num_layers,
        "decoder_depth": objective.config.decoder_depth,
        "decoder_embed_dim": objective.config.decoder_embed_dim,
        "pixels": reconstruction.patches.shape[-1],
        "norm_pix_loss": objective.config.norm_pix_loss,
    }
    enough = visible.shape[0] * visible.shape[1] >= 4
    colours = patch_pca(visible, (1, keep.shape[1])).colours if enough else torch.full((*keep.shape, 3), 0.5)
    for place, item in enumerate(data["images"]):
        tokens = torch.full((num_patches, 3), 0.85).scatter(0, keep[place][:, None].expand(-1, 3), colours[place])
        _, masked, filled = panels[place]
        item["masked"], item["filled"] = data_uri(masked), data_uri(filled)
        item["tokens"] = data_uri(rearrange(tokens, "(r c) k -> r c k", r=grid[0]))


def data_uri(rgb: Float[Tensor, "h w 3"]) -> str:
    """An RGB image in [0, 1] as a PNG within an address; it is enlarged on the page, not here."""
    buffer = io.BytesIO()
    image = Image.fromarray(_bytes(rgb).numpy())
    if max(image.size) > _SIDE:
        image.thumbnail((_SIDE, _SIDE))
        image.save(buffer, "WEBP", quality=85)
        return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _check_size(needed: int, most_bytes: int) -> None:
    if needed > most_bytes:
        raise ValueError(f"takes {needed / 1e6:.1f} MB, {most_bytes / 1e6:.1f} MB are left for it in the page")


def _base64_bytes(number: int) -> int:
    return -(-number // 3) * 4


def _bytes(values: Float[Tensor, "*s"]) -> UInt8[Tensor, "*s"]:
    return (values.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def _pack(values: UInt8[Tensor, "*s"]) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()
