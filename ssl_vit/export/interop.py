"""Fill an objective from a checkpoint of its paper's code."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ssl_vit.models.weights.backbone import load_strictly
from ssl_vit.models.weights.layouts import merge_class_position
from ssl_vit.models.weights.papers import fit_positions, read_reference, rename_dinov2
from ssl_vit.objectives.dino import DINO
from ssl_vit.objectives.dinov2 import DINOv2
from ssl_vit.objectives.mae import MAE
from ssl_vit.objectives.objective import Objective


def load_reference(objective: Objective, path: str | Path) -> None:
    """Fill an objective from an official pre-training checkpoint, or from a safetensors copy of one.

    Layouts: MAE (`model`), DINO (`student`, `teacher`, `dino_loss`) and DINOv2 (`model` with `student.*` and
    `teacher.*`; or the teacher alone, as its training leaves it, from which student and teacher then both start).
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
