"""Checkpoints: safetensors and JSON in a folder that appears complete or not at all."""

import json
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ssl_vit.core.distributed import on_main_process
from ssl_vit.core.manifest import MANIFEST_FILE, find_difference, write_manifest
from ssl_vit.core.reading import check_header, read_json, read_tensors
from ssl_vit.core.settings import check_ranges
from ssl_vit.core.text import plain
from ssl_vit.core.writing import UNFINISHED, error_number, flush, free_space, own_folder, remove

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
KEEP_FILE = "KEEP"
DAMAGED = "damaged-"
KeepBest = Literal["none", "knn", "linear", "rankme", "loss"]

_known_whole: set[Path] = set()  # written or verified by this process; pruning does not read them again


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save checkpoints, and which to keep."""

    every_steps: int = 1000
    """Optimizer steps between checkpoints; a run also saves at its end and on a signal."""
    keep: int = 2
    """Number of newest checkpoints to keep. A checkpoint that holds a file named KEEP is never deleted."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this many steps are never deleted."""
    keep_best: KeepBest = "none"
    """Keep the best checkpoint too, and export it at the end: by k-NN or linear probe (evaluation.every_steps), or
    without labels by RankMe or loss where a checkpoint is saved."""

    def __post_init__(self) -> None:
        check_ranges(self, every_steps="[1, inf)", keep="[1, inf)", keep_every_steps="[1, inf)")


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first. Unfinished ones have another name and do not count.

    Raises:
        ValueError: the checkpoints' folder is a link.
    """
    found = own_folder(run / "checkpoints").glob("step-[0-9]*")
    return sorted(path for path in found if path.name.removeprefix("step-").isdecimal())


def step_of(folder: Path) -> int:
    """Optimizer steps done at a checkpoint, from its folder's name."""
    return int(folder.name.removeprefix("step-"))


def newest_checkpoint(run: Path) -> Path | None:
    """The newest undamaged checkpoint; damaged ones are reported, left as they are and skipped."""
    for folder in reversed(list_checkpoints(run)):
        problem = find_damage(folder)
        if problem is None:
            return folder
        print(f"Skipping the damaged checkpoint {plain(folder)}: {plain(problem)}")
    return None


def find_damage(folder: Path, *, contents: bool = True) -> str | None:
    """Describe the damage of a checkpoint's files; None if there is none.

    Files are compared with the manifest that was written with them. Checkpoints of early versions have no manifest and
    are only checked for missing and shortened files.

    Args:
        contents: whether to compare hashes too, which reads everything.
    """
    if folder.is_symlink():
        return "is a link, which is not followed here"
    if os.path.lexists(folder / MANIFEST_FILE) and (problem := find_difference(folder, contents=contents)) is not None:
        return problem
    try:
        for name in (MODEL_FILE, OPTIMIZER_FILE):
            check_header(folder / name)
            with safe_open(folder / name, framework="pt"):  # checks that the file is as long as its header says
                pass
        read_json(folder / STATE_FILE)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"
    except (SafetensorError, ValueError) as error:
        return str(error)
    if contents:
        _known_whole.add(folder.resolve())
    return None


def save_checkpoint(
    run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write model, optimizer and `state` (JSON) under the run folder.

    Every process calls this; the main one writes. Tensors are stored unsharded and by parameter name, so that any
    number of processes can read them. The folder is written under a temporary name, flushed, then renamed.

    Raises:
        OSError: the main process could not write, for example on a full disk; every process raises it. The incomplete
            checkpoint is removed; earlier ones are unchanged.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    # torch's type covers nested state dicts; a full, flat one holds tensors by name.
    model_tensors = cast("dict[str, Tensor]", get_model_state_dict(model, options=options))
    untouched = not optimizer.state  # all steps so far were skipped
    optimizer_state = cast("dict[str, Any]", get_optimizer_state_dict(model, optimizer, options=options))
    if untouched:
        optimizer.state.clear()  # torch created moments and counted a step in order to save them
    folder = checkpoint_folder(run, step)

    def write() -> None:
        if folder.exists() and find_damage(folder) is None:
            return
        if untouched:
            for slots in optimizer_state["state"].values():
                slots["step"] = torch.zeros_like(slots["step"])
        optimizer_tensors = {
            f"{name}/{slot}": value for name, slots in optimizer_state["state"].items() for slot, value in slots.items()
        }
        description = {"step": step, **state, "param_groups": optimizer_state["param_groups"]}
        _write_whole(folder, {MODEL_FILE: model_tensors, OPTIMIZER_FILE: optimizer_tensors}, description)

    on_main_process(write)
    return folder


def _write_whole(folder: Path, tensors: dict[str, dict[str, Tensor]], description: dict[str, Any]) -> None:
    unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")
    try:
        remove(unfinished)
        unfinished.mkdir(parents=True)
        for name, values in tensors.items():
            save_file({key: value.contiguous() for key, value in values.items()}, unfinished / name)
        (unfinished / STATE_FILE).write_text(json.dumps(description, indent=1))
        write_manifest(unfinished)
        for path in (*unfinished.iterdir(), unfinished):
            flush(path)
        if folder.exists():  # damaged, and skipped when the run resumed
            folder.rename(_free_name(folder.with_name(f"{DAMAGED}{folder.name}")))
        unfinished.rename(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        number = error_number(error)
        if number is None:
            raise
        reason = f"{os.strerror(number)}, {free_space(folder.parents[1])}"
        raise OSError(f"{folder}: cannot be saved: {reason}") from error
    _known_whole.add(folder.resolve())


def _free_name(path: Path) -> Path:
    """The path, or its first numbered variant that does not exist."""
    names = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in range(1, 1000))
    return next(name for name in names if not os.path.lexists(name))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load model and optimizer from a checkpoint and return its `state`.

    Raises:
        ValueError: the checkpoint has other parameters than the model.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = read_json(folder / STATE_FILE)
    tensors: dict[str, Any] = dict(read_tensors(folder / MODEL_FILE))
    _refuse_other_keys(folder, set(get_model_state_dict(model)), set(tensors))
    set_model_state_dict(model, tensors, options=options)
    slots: dict[str, Any] = {}
    for key, value in read_tensors(folder / OPTIMIZER_FILE).items():
        name, slot = key.rsplit("/", 1)
        slots.setdefault(name, {})[slot] = value
    # `set_optimizer_state_dict` needs state for every parameter: give frozen ones zeros, drop them afterwards.
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


def prune_checkpoints(run: Path, config: CheckpointConfig, spared: Collection[Path] = ()) -> None:
    """Delete all checkpoints except the newest `keep`, those marked to stay and those `spared`.

    Damaged ones are neither counted nor deleted, so that newer damaged ones never displace a good one. A checkpoint
    that cannot be deleted is reported.
    """
    num_whole = 0
    for folder in reversed(list_checkpoints(run)):
        if num_whole < config.keep:
            num_whole += _is_whole(folder)
            continue
        step = step_of(folder)
        marked = (folder / KEEP_FILE).exists() or (config.keep_every_steps and step % config.keep_every_steps == 0)
        if not marked and folder not in spared and _is_whole(folder):
            # Rename first: an interrupted deletion must not leave what looks like a damaged checkpoint.
            unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")
            try:
                remove(unfinished)
                folder.rename(unfinished)
                remove(unfinished)
            except OSError as error:
                print(f"WARNING: {plain(folder)}: cannot be deleted: {error.strerror}")


def remove_unfinished(run: Path) -> None:
    """Remove checkpoints that a killed run half wrote or half deleted; only the holder of the run's lock may."""
    for path in own_folder(run / "checkpoints").glob(f"{UNFINISHED}step-*"):
        with suppress(OSError):
            remove(path)


def _is_whole(folder: Path) -> bool:
    is_known = not folder.is_symlink() and folder.resolve() in _known_whole
    return find_damage(folder, contents=not is_known) is None


def _refuse_other_keys(folder: Path, wanted: set[str], found: set[str]) -> None:
    if wanted != found:
        missing, unexpected = sorted(wanted - found), sorted(found - wanted)
        raise ValueError(
            f"{folder / MODEL_FILE}: belongs to another model: {len(missing)} parameters are missing {missing[:3]}, "
            f"{len(unexpected)} are unknown {unexpected[:3]}"
        )
