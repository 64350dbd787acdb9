"""Checkpoints of the papers' code: MAE, DINO and DINOv2."""

import argparse
import math
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from ssl_vit.core.reading import open_regular, read_tensors
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.weights.layouts import Tensors, merge_class_position


def read_reference(path: Path) -> dict[str, Tensor]:
    """The tensors of an official checkpoint by dotted name, without a leading "model.".

    Settings, step counters and the optimizer's state, which official files also hold, are left out.

    Raises:
        ValueError: the file is damaged, or holds more than tensors and plain settings.
    """
    if path.suffix == ".safetensors":
        found = read_tensors(path, links=True)
        prefix = "model." if any(name.startswith("model.") for name in found) else ""
        return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    try:
        os.close(open_regular(path, links=True))
        # The official files also hold the command line's settings, an argparse.Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower():
            raise ValueError(f"{path}: is no whole checkpoint of torch: {error}") from error
        raise ValueError(f"{path}: holds more than tensors, and is not unpickled since that can run code") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: is no whole checkpoint of torch: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__} instead of tensors by name")
    for name in ("model", "state_dict"):
        content = content[name] if isinstance(content.get(name), dict) else content
    return dict(_flatten(content))


def _flatten(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, dict) and name != "optimizer":
            yield from _flatten(value, f"{prefix}{name}.")


def from_papers(tensors: Mapping[str, Tensor]) -> Tensors:
    """The backbone of an official MAE, DINO or DINOv2 checkpoint under timm's names.

    From a checkpoint with student and teacher, the teacher. Heads, decoder, mask token and centres are left out.
    """
    found = dict(tensors)
    for role in ("teacher.", "student."):
        if any(name.startswith(role) for name in found):
            found = {name.removeprefix(role): value for name, value in found.items() if name.startswith(role)}
            break
    found = {name.removeprefix("module."): value for name, value in found.items()}
    if any(name.startswith("backbone.") for name in found):
        found = {name.removeprefix("backbone."): v for name, v in found.items() if name.startswith("backbone.")}
    found = {
        rename_dinov2(name): value
        for name, value in found.items()
        if not re.match(r"(decoder_|lm_head\.|head(_dist)?\.(?!norm\.)|mask_token$)", name)
    }
    return merge_class_position(found)


def rename_dinov2(name: str) -> str:
    """Rename a parameter of DINOv2's code (chunks of blocks, registers, SwiGLU) to timm's name."""
    name = re.sub(r"blocks\.\d+\.(\d+\.)", r"blocks.\1", name)
    name = re.sub(r"(^|\.)register_tokens$", r"\1reg_token", name)
    return name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")


def fit_positions(
    encoder: Encoder, table: Float[Tensor, "1 n d"], grid: tuple[int, int] | None, *, antialias: bool
) -> Float[Tensor, "1 m d"]:
    """A position table of another image size, resized (bicubic) to the encoder's grid.

    Args:
        grid: rows and columns that the table was made for; None = those of a square.
        antialias: when shrinking, as timm and DINOv2's code with registers do; the other code of the papers does not.

    Raises:
        ValueError: no grid is given and the table's is not square.
    """
    vit: Any = encoder.model
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    num_positions = table.shape[1] - prefix
    if grid is None or grid[0] * grid[1] != num_positions:
        if num_positions == encoder.num_patches:
            return table
        side = math.isqrt(max(num_positions, 0))
        if side * side != num_positions:
            raise ValueError(f"pos_embed {tuple(table.shape)}: is of no square grid and cannot be resized")
        grid = (side, side)
    return resample_abs_pos_embed(
        table.float(),
        new_size=list(encoder.grid_size),
        old_size=list(grid),
        num_prefix_tokens=prefix,
        antialias=antialias,
    )
