"""Fill an objective from a checkpoint of its paper's code."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from ssl_vit.models.weights.backbone import load_strictly
from ssl_vit.models.weights.layouts import merge_class_position
from ssl_vit.models.weights.papers import fit_positions, read_reference, rename_dinov2
from ssl_vit.objectives.dino import DINO
from ssl_vit.objectives.dinov2 import DINOv2
from ssl_vit.objectives.fcmae import FCMAE
from ssl_vit.objectives.mae import MAE
from ssl_vit.objectives.objective import Objective
from ssl_vit.objectives.simmim import SimMIM


def load_reference(objective: Objective, path: str | Path) -> None:
    """Fill an objective from an official pre-training checkpoint, or from a safetensors copy of one.

    Layouts: MAE (`model`), DINO (`student`, `teacher`, `dino_loss`), DINOv2 (`model` with `student.*` and `teacher.*`;
    or the teacher alone, as its training leaves it, from which student and teacher then both start), SimMIM (`model` on
    Swin, Swin V2 and ViT) and FCMAE (`model` with sparse kernels).
    Position tables are resized to the encoder's grid. Only tensors are unpickled.

    Raises:
        ValueError: the file does not hold exactly the objective's parameters, heads included.
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


def _read_mae(objective: Objective, found: dict[str, Tensor]) -> dict[str, Tensor]:
    def rename(name: str) -> str:
        decoder = name.startswith("decoder_") or name == "mask_token"
        return name if decoder else f"encoder.vit.{name}"

    return {rename(name): value for name, value in found.items()}


def _read_dino(objective: Objective, found: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {
        "student.backbone.": f"encoder.{objective.encoder.model_name}.",
        "student.head.": "head.",
        "teacher.backbone.": f"teacher_encoder.{objective.encoder.model_name}.",
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


def _read_simmim(objective: Objective, found: dict[str, Tensor]) -> dict[str, Tensor]:
    encoder, tensors = objective.encoder, {}
    for name, value in found.items():
        own = name.removeprefix("encoder.")
        if own.endswith(("attn_mask", "relative_position_index", "relative_coords_table")):
            continue  # computed from the sizes
        if name.startswith("decoder.0."):
            tensors[name.replace("decoder.0.", "decoder.")] = value.flatten(1) if value.ndim == 4 else value
        elif own == "mask_token":
            tensors[own] = value
        else:
            # The official code merges tokens at a stage's end, timm at the next one's start.
            own = re.sub(r"^layers\.(\d+)\.downsample", lambda at: f"layers.{int(at[1]) + 1}.downsample", own)
            own = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", own)
            tensors[f"encoder.{encoder.model_name}.{own}"] = value
    if encoder.has_cls_token:
        tensors = _join_biases(tensors)
    return tensors


def _join_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Biases of queries, keys and values in one, as in timm's plain ViTs; that of keys is 0."""
    joined = dict(tensors)
    for name in [name for name in tensors if name.endswith(".attn.q_bias")]:
        query, value = joined.pop(name), joined.pop(name.replace("q_bias", "v_bias"))
        joined[name.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])
    return joined


def _read_fcmae(objective: Objective, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sparse layout of the paper's pre-training: kernels [volume, in, out] or, in depth-wise convolutions, [volume,
    channels], whose places count columns first."""
    tensors = {}
    for name, value in found.items():
        if name.startswith("encoder."):
            part, _, kind = name.removeprefix("encoder.").replace(".ln.", ".").replace(".linear.", ".").rpartition(".")
            if kind == "kernel":
                kind, side = "weight", math.isqrt(len(value))
                pattern = "(w h) i o -> o i h w" if value.ndim == 3 else "(w h) o -> o 1 h w"
                value = rearrange(value, pattern, h=side)
            elif part.endswith("grn") or kind == "bias":
                value = value.flatten()
            part = re.sub(r"^downsample_layers\.0\.", "stem.", part)
            part = re.sub(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample.", part)
            part = re.sub(r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", part)
            tensors[f"encoder.net.{_convnext_block(f'{part}.{kind}')}"] = value
        elif name.startswith("decoder."):
            value = value.flatten() if ".grn." in name else value
            tensors[_convnext_block(name.replace("decoder.", "decoder_blocks.", 1))] = value
        else:
            tensors[name] = value
    own = objective.state_dict()  # pre-training has no final norm
    return tensors | {name: value for name, value in own.items() if name.startswith("encoder.net.head.norm")}


def _convnext_block(name: str) -> str:
    """Rename a parameter of the paper's block to timm's name."""
    pairs = {"dwconv": "conv_dw", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2", "grn": "mlp.grn"}
    parts = [pairs.get(part, part) for part in name.split(".")]
    if "mlp.grn" in parts:
        parts[-1] = {"gamma": "weight", "beta": "bias"}[parts[-1]]
    return ".".join(parts)


def _swap_prefix(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


_READERS: dict[type, Callable[[Objective, dict[str, Tensor]], dict[str, Tensor]]] = {
    MAE: _read_mae,
    DINO: _read_dino,
    DINOv2: _read_dinov2,
    SimMIM: _read_simmim,
    FCMAE: _read_fcmae,
}
