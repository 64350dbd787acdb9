"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
KEEP_FILE = "KEEP"


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int = 1000
    """Optimizer steps between checkpoints; the end of the run and a signal save as well."""
    keep: int = 2
    """Newest checkpoints that stay on disk. One that holds a file named KEEP is never deleted."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this many steps stay for good."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep", "keep_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r}: must be at least 1")


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first. Unfinished ones carry another name and do not count."""
    return sorted((run / "checkpoints").glob("step-[0-9]*[0-9]"))


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint whose files are all there and readable; damaged ones are left alone and passed over."""
    for folder in reversed(list_checkpoints(run)):
        problem = find_damage(folder)
        if problem is None:
            return folder
        print(f"Passing over the damaged checkpoint {folder}: {problem}")
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None where nothing is."""
    try:
        for name in (MODEL_FILE, OPTIMIZER_FILE):
            with safe_open(folder / name, framework="pt"):  # checks that the file is as long as its header says
                pass
        json.loads((folder / STATE_FILE).read_text())
    except (OSError, SafetensorError, ValueError) as error:
        return str(error)
    return None


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    is_writer: bool,
) -> Path:
    """Write model, optimizer and `state` (JSON) under the run folder.

    Every process calls this, the one with `is_writer` writes. Tensors are stored whole and by parameter name, so that
    any number of processes can read them. The folder is written under a temporary name, flushed, then renamed.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    # torch types these by what a nested state dict may hold; whole and flat, they are tensors by name.
    model_tensors = cast("dict[str, Tensor]", get_model_state_dict(model, options=options))
    optimizer_state = cast("dict[str, Any]", get_optimizer_state_dict(model, optimizer, options=options))
    folder = checkpoint_folder(run, step)
    if not is_writer or folder.exists():
        return folder
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    optimizer_tensors = {
        f"{name}/{slot}": value for name, slots in optimizer_state["state"].items() for slot, value in slots.items()
    }
    save_file({name: value.contiguous() for name, value in model_tensors.items()}, unfinished / MODEL_FILE)
    save_file({name: value.contiguous() for name, value in optimizer_tensors.items()}, unfinished / OPTIMIZER_FILE)
    (unfinished / STATE_FILE).write_text(
        json.dumps({"step": step, **state, "param_groups": optimizer_state["param_groups"]}, indent=1)
    )
    for path in (*unfinished.iterdir(), unfinished):
        flush(path)
    unfinished.rename(folder)
    flush(folder.parent)
    return folder


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fill model and optimizer from a checkpoint and return its `state`.

    Raises:
        ValueError: the checkpoint's parameters are not the model's.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = json.loads((folder / STATE_FILE).read_text())
    tensors: dict[str, Any] = load_file(folder / MODEL_FILE)
    _refuse_other_keys(folder, set(get_model_state_dict(model)), set(tensors))
    set_model_state_dict(model, tensors, options=options)
    slots: dict[str, Any] = {}
    for key, value in load_file(folder / OPTIMIZER_FILE).items():
        name, slot = key.rsplit("/", 1)
        slots.setdefault(name, {})[slot] = value
    # Parameters that are still frozen have no moments yet, which torch does not provide for: they get some to load.
    slots_of_one: dict[str, Tensor] = next(iter(slots.values()), {})
    frozen = []
    for name, parameter in model.named_parameters():
        key = name.removeprefix("module.")
        if parameter.requires_grad and key not in slots:
            frozen.append(parameter)
            slots[key] = {
                slot: torch.zeros(parameter.shape) if value.ndim else torch.zeros_like(value)
                for slot, value in slots_of_one.items()
            }
    set_optimizer_state_dict(
        model, optimizer, {"state": slots, "param_groups": state.pop("param_groups")}, options=options
    )
    for parameter in frozen:
        optimizer.state.pop(parameter)
    return state


def prune_checkpoints(run: Path, config: CheckpointConfig) -> None:
    """Delete all but the newest `keep` checkpoints and those marked to stay."""
    for folder in list_checkpoints(run)[: -config.keep]:
        step = int(folder.name.removeprefix("step-"))
        marked = (folder / KEEP_FILE).exists() or (config.keep_every_steps and step % config.keep_every_steps == 0)
        if not marked:
            shutil.rmtree(folder)


def flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_other_keys(folder: Path, wanted: set[str], found: set[str]) -> None:
    if wanted != found:
        missing, unexpected = sorted(wanted - found), sorted(found - wanted)
        raise ValueError(
            f"{folder / MODEL_FILE}: belongs to another model: {len(missing)} parameters are missing {missing[:3]}, "
            f"{len(unexpected)} are unknown {unexpected[:3]}"
        )
