"""Whether a run goes on in a folder that holds one, with which settings, and from which checkpoint."""

import os
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ssl_vit.core.paths import PATHS, is_same, path_to_text
from ssl_vit.core.reading import read_json, read_yaml, readable
from ssl_vit.core.settings import as_plain, differences
from ssl_vit.core.text import plain
from ssl_vit.core.writing import mark
from ssl_vit.data.config import bytes_of_pixels
from ssl_vit.objectives.frozen import Frozen, check_frozen
from ssl_vit.runs.checkpoint import STATE_FILE, newest_checkpoint, step_of
from ssl_vit.runs.folder import CONFIG_FILE, holds_anything, read_results, take_folder
from ssl_vit.training.config import RunConfig, write_config

# A run may continue with other values of these (and of all in a section that is named with its dot): they do not change
# what is learned, unless the objective says so.
FREE_SETTINGS = (
    "output_dir",
    "fresh",
    "extend",
    "extended",  # the run's own
    "log_every",
    "quiet",
    "tracking",
    "on_collapse",
    "max_skipped_steps",
    "rewind_on_spike",
    "profile",
    "max_hours",
    "max_wait",
    "batch.per_device",
    "batch.auto",
    "compile",
    "cuda_graphs",
    "encoder.grad_checkpointing",
    "objective.teacher",  # a path; its weights are compared with those that the checkpoint noted
    "data.num_workers",
    "data.cache_dir",
    "data.on_bad_image",  # an image was decoded or replaced either way
    "data.max_bad_share",
    "checkpoint.",
    "evaluation.",
)

DECIDED = ("objective.", "optim.", "data.")
"""Sections whose `auto` settings become numbers, which a run keeps."""


def check_run_folder(config: RunConfig) -> None:
    """Refuse to go on with a run under other settings.

    Raises:
        ValueError: the folder holds a run that differs, or files that are no run.
    """
    if not config.output_dir:
        raise ValueError("output_dir='': name the folder of the run")
    if path_to_text(config.output_dir) != config.output_dir:
        raise ValueError(f"output_dir={config.output_dir!r}: safetensors reads UTF-8 names alone; name another folder")
    folder = Path(config.output_dir)
    if config.extend and not (folder / CONFIG_FILE).exists():
        raise ValueError(f"extend=True: output_dir={config.output_dir!r} holds no run to lengthen; name its folder")
    if not folder.exists():
        return
    if config.fresh:
        teacher = getattr(config.objective, "teacher", None)
        for name, path in (("encoder.pretrained", config.encoder.pretrained), ("objective.teacher", teacher)):
            if path is None or not Path(path).exists():  # none, or a name of published weights
                continue
            if Path(path).resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"fresh=True: would move away output_dir={config.output_dir!r}, and {name}={path!r} is read from "
                    "there; choose another --output_dir"
                )
        return
    if not folder.is_dir():
        raise ValueError(f"output_dir={config.output_dir!r}: is a file; name a folder")
    saved = folder / CONFIG_FILE
    if not os.path.lexists(saved):
        if holds_anything(folder):
            raise ValueError(
                f"output_dir={config.output_dir!r}: holds files but no run ({CONFIG_FILE} is missing); "
                "choose another --output_dir, or --fresh to move it aside"
            )
        return
    bound = getattr(config.objective, "decides_data", ())
    before, after = _read_config(saved, config), as_plain(config)
    if any(not isinstance(before.get(section), dict) for section in ("encoder", *(section for section, _ in PATHS))):
        raise ValueError(
            f"output_dir={config.output_dir!r}: its {CONFIG_FILE} was written by no run; choose another --output_dir, "
            "or --fresh to move it aside"
        )
    for section, name in PATHS:
        if name in after[section] and is_same(before[section].get(name), after[section][name]):
            before[section][name] = after[section][name]
    length = ("steps", "epochs") if config.extend else ()
    changed = {
        key: values
        for key, values in differences(before, after).items()
        if key not in length
        and (key in bound or not _is_free(key))
        and not (key == "data.cache" and "none" not in values)  # memory and disk hold the same
        and not (values[1] == "auto" and key.startswith(DECIDED))  # not yet known; checked again once it is
    }
    if changed:
        listed = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changed.items())
        raise ValueError(
            f"output_dir={config.output_dir!r}: holds a run with other settings: {listed}. Go on with its own "
            f"(--config {saved}), choose another --output_dir, or start anew with --fresh (the old run is moved aside)"
            + ("; --extend true lengthens it" if set(changed) <= {"steps", "epochs"} else "")
        )


def go_on_as_before(config: RunConfig, num_samples: int | None) -> tuple[RunConfig, int | None, list[str]]:
    """Take over what an existing run in the folder has decided.

    It keeps what its `auto` settings became, also where it was lengthened, or begun by a version with other rules.

    Returns:
        The settings; if the run is lengthened now, the number of steps that it had, else None; a line for each `auto`
        setting that was taken over.

    Raises:
        ValueError: `extend` with fewer steps than it has, or a length that cannot be.
    """
    path = Path(config.output_dir) / CONFIG_FILE
    if config.fresh or not path.exists():
        if config.extended and (steps := config.num_steps(num_samples)) <= config.extended[-1][0]:
            raise ValueError(
                f"extended={config.extended!r}: is of a run that was lengthened at step {config.extended[-1][0]:,}, "
                f"and this one has {steps:,}; give it more, or leave this setting out"
            )
        return config, None, []
    saved = _read_config(path, config)
    extended = tuple((step, length) for step, length in saved.get("extended") or ())
    config, reasons = replace(config, extended=extended), []
    for name in (section.removesuffix(".") for section in DECIDED):
        section = getattr(config, name)
        known = {key: saved[name][key] for key in vars(section) if vars(section)[key] == "auto" and key in saved[name]}
        # YAML gives lists, settings are tuples.
        known = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
        config = replace(config, **{name: replace(section, **known)})
        reasons += [f"{name}.{key} {value}: as this run has it" for key, value in known.items() if value != "auto"]
    before = replace(config, steps=saved["steps"], epochs=saved["epochs"]).num_steps(num_samples)
    after = config.num_steps(num_samples)
    if config.extend and after < before:
        raise ValueError(f"extend=True: {after:,} steps are fewer than the {before:,} that the run has; give more")
    if config.extend and config.steps == saved["steps"] is not None and config.epochs != saved["epochs"]:
        raise ValueError(f"extend=True: steps={config.steps} wins over epochs={config.epochs}; give more steps")
    return config, before if config.extend and after > before else None, reasons


def _is_free(key: str) -> bool:
    return key in FREE_SETTINGS or key.startswith(tuple(name for name in FREE_SETTINGS if name.endswith(".")))


def open_run_folder(
    config: RunConfig, lengthened: int | None = None, frozen: Sequence[Frozen] = ()
) -> tuple[RunConfig, Path | None]:
    """Take the folder for this process, create it or find where its run goes on; only the main process calls this.

    Args:
        lengthened: the number of steps that the run had, if it is lengthened now.
        frozen: models that are read from elsewhere; they must be those that the checkpoint was trained with.

    Returns:
        The settings, as written; the checkpoint to go on from, None for a run that starts.

    Raises:
        ValueError: another run works in it, or a frozen model has changed.
    """
    folder = Path(config.output_dir)
    take_folder(folder, fresh=config.fresh)
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        check_frozen(frozen, read_json(checkpoint / STATE_FILE).get("frozen", {}), str(checkpoint))
    if lengthened is not None and checkpoint is not None:
        state, extended = read_json(checkpoint / STATE_FILE), config.extended
        # If it took no step since it was lengthened before, only its end changes.
        if not extended or extended[-1][0] != state["step"]:
            extended = (*extended, (state["step"], state.get("num_steps", lengthened)))
            config = replace(config, extended=extended)
    if lengthened is None and checkpoint is not None:
        config = _as_scored(config, folder, step_of(checkpoint))
    write_config(config, folder / CONFIG_FILE)
    mark(folder)
    return config, checkpoint


def _as_scored(config: RunConfig, folder: Path, step: int) -> RunConfig:
    """Keep the evaluation settings by which a finished run was scored, and name others that were asked for."""
    saved = _read_config(folder / CONFIG_FILE, config)
    results = read_results(folder, saved)
    if results is None or results["step"] != step:
        return config
    own, asked = saved["evaluation"], as_plain(config)["evaluation"]
    kept = {key: own[key] for key in asked if key in own and not is_same(own[key], asked[key])}
    if not kept:
        return config
    listed = ", ".join(f"evaluation.{key} {value!r} -> {asked[key]!r}" for key, value in kept.items())
    how = "`ssl-vit probe` scores it by others, --fresh starts it anew"
    print(f"note       this run is finished, so that its scores stay and these are not applied: {plain(listed)}; {how}")
    kept = {key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()}
    return replace(config, evaluation=replace(config.evaluation, **kept))


def _read_config(path: Path, config: RunConfig) -> dict[str, Any]:
    """A run's settings; settings that did not exist when it was written have their defaults, by which it ran."""
    with readable(path):
        saved = read_yaml(path)
    for item in fields(config):
        own = getattr(config, item.name)
        if is_dataclass(own) and isinstance(saved.get(item.name), dict):
            saved[item.name] = as_plain(type(own)()) | saved[item.name]
    data = saved.get("data")
    if isinstance(data, dict) and isinstance(data.get("max_pixels"), int):
        data |= {"max_pixels": None, "max_image_bytes": bytes_of_pixels(data["max_pixels"])}
    return saved


def length_of(config: RunConfig, checkpoint: Path, num_steps: int) -> int:
    """Steps of a run that goes on: those it began with, also where images came or went since.

    Args:
        config: as `open_run_folder` returned it.
        num_steps: the length by the settings and today's images.

    Raises:
        ValueError: the run is lengthened to fewer steps than it has done.
    """
    state = read_json(checkpoint / STATE_FILE)
    step, own = state["step"], state.get("num_steps", num_steps)
    was_lengthened = bool(config.extended) and config.extended[-1][0] >= step
    if not config.extend and not was_lengthened:
        return own
    if num_steps < step:
        of_today = f"epochs={config.epochs}: are {num_steps:,} steps of today's images"
        raise ValueError(f"{of_today}, fewer than the {step:,} that the run has done; give more")
    return num_steps
