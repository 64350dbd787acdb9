"""Reference checkpoints in: the official layouts of the papers' code."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ssl_vit.export.backbone import load_strictly
from ssl_vit.objectives.mae import MAE
from ssl_vit.objectives.objective import Objective


def load_reference(objective: Objective, path: str | Path) -> None:
    """Fill an objective from an official pre-training checkpoint, or from a safetensors copy of one.

    Takes MAE's layout (`{"model": state_dict}` or `model.*` keys). Nothing is unpickled but tensors.

    Raises:
        ValueError: the file does not have exactly the objective's parameters, an encoder without its decoder included.
    """
    path = Path(path)
    if not isinstance(objective, MAE):
        raise ValueError(f"load_reference knows no official layout for {type(objective).__name__}")
    tensors = {_mae_name(name): value for name, value in read_reference(path).items()}
    load_strictly(objective, tensors, path)


def read_reference(path: Path) -> dict[str, Tensor]:
    """The tensors of an official checkpoint, without their "model." prefix."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            prefix = "model." if any(name.startswith("model.") for name in names) else ""
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)}
    try:
        # The official files also hold the command line's settings, an argparse.Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: holds more than tensors, and is not unpickled since that can run code") from error
    return content.get("model", content)


def _mae_name(name: str) -> str:
    decoder = name.startswith("decoder_") or name == "mask_token"
    return name if decoder else f"encoder.vit.{name}"
