"""Reference checkpoints in: the official layouts of the papers' code."""

import argparse
import math
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from ssl_vit.core.reading import open_regular, read_tensors
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.weights.backbone import load_strictly
from ssl_vit.models.weights.layouts import merge_class_position, rename_dinov2
from ssl_vit.objectives.dino import DINO
from ssl_vit.objectives.dinov2 import DINOv2
from ssl_vit.objectives.mae import MAE
from ssl_vit.objectives.objective import Objective


def load_reference(objective: Objective, path: str | Path) -> None:
    """Fill an objective from an official pre-training checkpoint, or from a safetensors copy of one.

    Takes the layouts of MAE (`model`), DINO (`student`, `teacher`, `dino_loss`) and DINOv2 (`model` with `student.*`
    and `teacher.*`, or its teacher alone, which is what its training leaves: student and teacher both start from it).
    Position tables are resized to the encoder's. Nothing is unpickled but tensors.

    Raises:
        ValueError: the file does not have exactly the objective's parameters, an encoder without its head included.
    """
    path = Path(path)
    if type(objective) not in _READERS:
        raise ValueError(f"load_reference knows no official layout for {type(objective).__name__}")
    tensors = _READERS[type(objective)](objective, read_reference(path))
    for name, value in tensors.items():
        if name.endswith("vit.pos_embed"):
            with_registers = name.replace("pos_embed", "reg_token") in tensors
            tensors[name] = fit_positions(objective.encoder, value, None, antialias=with_registers)
    load_strictly(objective, tensors, path)


def fit_positions(
    encoder: Encoder, table: Float[Tensor, "1 n d"], grid: tuple[int, int] | None, *, antialias: bool
) -> Float[Tensor, "1 m d"]:
    """A position table of another image size, resized (bicubic) to the encoder's grid.

    Args:
        grid: rows and columns that the table was made for; None = those of a square.
        antialias: where it gets smaller, as timm and DINOv2's code with registers do; MAE's, DINO's and DINOv2's other
            code does not.

    Raises:
        ValueError: the table is of no square grid, so what it was made for is not known.
    """
    vit: Any = encoder.get_submodule("vit")
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


def read_reference(path: Path) -> dict[str, Tensor]:
    """The tensors of an official checkpoint by dotted name, without a leading "model.".

    Settings, step counters and the optimizer's state, which official files also hold, are left out.

    Raises:
        ValueError: the file is damaged, or holds more than tensors.
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


def _read_mae(objective: Objective, found: dict[str, Tensor]) -> dict[str, Tensor]:
    def rename(name: str) -> str:
        decoder = name.startswith("decoder_") or name == "mask_token"
        return name if decoder else f"encoder.vit.{name}"

    return {rename(name): value for name, value in found.items()}


def _read_dino(objective: Objective, found: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {
        "student.backbone.": "encoder.vit.",
        "student.head.": "head.",
        "teacher.backbone.": "teacher_encoder.vit.",
        "teacher.head.": "teacher_head.",
    }
    tensors = {
        _swap_prefix(name.replace(".module.", "."), parts): value
        for name, value in found.items()
        if name.startswith(("student.", "teacher."))
    }
    center = found.get("dino_loss.center", found.get("center"))
    return tensors if center is None else {**tensors, "center": center}


def _read_dinov2(objective: Objective, found: dict[str, Tensor]) -> dict[str, Tensor]:
    if not any(name.startswith("student.") for name in found):
        found |= {name.replace("teacher.", "student.", 1): value for name, value in found.items()}
    parts = {}
    for role, prefix in (("student", ""), ("teacher", "teacher_")):
        parts |= {
            f"{role}.backbone.": f"{prefix}encoder.vit.",
            f"{role}.dino_head.": f"{prefix}head.",
            f"{role}.ibot_head.": f"{prefix}patch_head.",
        }
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
        tensors[rename_dinov2(_swap_prefix(name, parts))] = value
    own = objective.state_dict()
    for role in ("encoder.vit.", "teacher_encoder.vit."):
        token = tensors.pop(f"{role}mask_token", None)
        if role == "encoder.vit." and token is not None and "mask_token" in own:
            tensors["mask_token"] = token
        tensors = merge_class_position(tensors, role)
    # Centres are part of the losses there; Sinkhorn-Knopp has none.
    for name, key in (("center", "dino_loss.center"), ("patch_center", "ibot_patch_loss.center")):
        center = tensors.pop(key, own.get(name))
        if center is not None and name in own:
            tensors[name] = center.reshape(own[name].shape)
    return tensors


def _swap_prefix(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


_READERS: dict[type, Callable[[Objective, dict[str, Tensor]], dict[str, Tensor]]] = {
    MAE: _read_mae,
    DINO: _read_dino,
    DINOv2: _read_dinov2,
}
