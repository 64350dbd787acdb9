"""The folder of a run: new, resumed, refused or moved aside; never overwritten silently."""

import os
from dataclasses import fields, is_dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ssl_vit.core.paths import path_to_text
from ssl_vit.core.reading import read_json, read_yaml
from ssl_vit.core.setting_paths import PATHS, is_same
from ssl_vit.core.text import plain
from ssl_vit.core.writing import UNFINISHED, own_folder, replace_json
from ssl_vit.data.config import bytes_of_pixels
from ssl_vit.data.outputs import MARKER, mark
from ssl_vit.runs.checkpoint import STATE_FILE, newest_checkpoint, remove_unfinished
from ssl_vit.runs.lock import LOCK_FILE, lock_folder
from ssl_vit.training.config import RunConfig, as_plain, differences, write_config

CONFIG_FILE, METRICS_FILE, RESULTS_FILE = "config.yaml", "metrics.jsonl", "results.json"
PICTURES_FOLDER = "pictures"

# May change when a run goes on, since they do not change what is learned, unless the objective says so.
FREE_SETTINGS = (
    "output_dir",
    "fresh",
    "extend",  # and extended, which is the run's own
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
    "data.num_workers",
    "data.cache_dir",
    "data.on_bad_image",  # a run that went on past a picture has decoded or replaced it either way
    "data.max_bad_share",
    "checkpoint.",
    "evaluation.",
)


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
    if config.fresh or not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"output_dir={config.output_dir!r}: is a file; name a folder")
    saved = folder / CONFIG_FILE
    if not os.path.lexists(saved):
        if _holds_anything(folder):
            raise ValueError(
                f"output_dir={config.output_dir!r}: holds files but no run ({CONFIG_FILE} is missing); "
                "choose another --output_dir, or --fresh to move it aside"
            )
        return
    bound = getattr(config.objective, "decides_data", ())
    before, after = _read_config(saved, config), as_plain(config)
    for section, name in PATHS:
        if is_same(before[section].get(name), after[section][name]):
            before[section][name] = after[section][name]
    length = ("steps", "epochs") if config.extend else ()
    changed = {
        key: values
        for key, values in differences(before, after).items()
        if key not in length
        and (key in bound or not key.startswith(FREE_SETTINGS))
        and not (key == "data.cache" and "none" not in values)  # memory and disk hold the same
        and values[1] != "auto"  # not yet known; checked again once it is
    }
    if changed:
        listed = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changed.items())
        raise ValueError(
            f"output_dir={config.output_dir!r}: holds a run with other settings: {listed}. Go on with its own "
            f"(--config {saved}), choose another --output_dir, or start anew with --fresh (the old run is moved aside)"
            + ("; --extend true lengthens it" if set(changed) <= {"steps", "epochs"} else "")
        )


def go_on_as_before(config: RunConfig, num_samples: int | None) -> tuple[RunConfig, int | None]:
    """What the run in the folder, if there is one, decides for a start that goes on with it.

    A run that is or was lengthened keeps the numbers that its `auto` settings had become.

    Returns:
        The settings, and where the run is to be lengthened now the steps that it had.

    Raises:
        ValueError: `extend` with fewer steps than it has.
    """
    path = Path(config.output_dir) / CONFIG_FILE
    if config.fresh or not path.exists():
        return config, None
    saved = _read_config(path, config)
    extended = tuple((step, length) for step, length in saved.get("extended") or ())
    config = replace(config, extended=extended)
    if not (config.extend or extended):
        return config, None
    for name in ("objective", "optim", "data"):
        section = getattr(config, name)
        known = {key: saved[name][key] for key in vars(section) if vars(section)[key] == "auto" and key in saved[name]}
        config = replace(config, **{name: replace(section, **known)})
    before = replace(config, steps=saved["steps"], epochs=saved["epochs"]).num_steps(num_samples)
    after = config.num_steps(num_samples)
    if config.extend and after < before:
        raise ValueError(f"extend=True: {after:,} steps are fewer than the {before:,} that the run has; give more")
    return config, before if config.extend and after > before else None


def open_run_folder(config: RunConfig, lengthened: int | None = None) -> tuple[RunConfig, Path | None]:
    """Take the folder for this process, create it or find where its run goes on; only the main process calls this.

    Args:
        lengthened: the steps that the run had, where it is to have more from here on.

    Returns:
        The settings, as written; the checkpoint to go on from, None for a run that starts.

    Raises:
        ValueError: another run works in it.
    """
    folder = Path(config.output_dir)
    if folder.exists():
        lock_folder(folder)
    if config.fresh and folder.exists() and _holds_anything(folder):
        aside = folder.with_name(f"{folder.name}-before-{datetime.now():%Y%m%d-%H%M%S}")
        folder.rename(aside)
        print(f"Moved the existing run aside: {plain(aside)}")
    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder)
    own_folder(folder / PICTURES_FOLDER)
    remove_unfinished(folder)
    checkpoint = newest_checkpoint(folder)
    if lengthened is not None and checkpoint is not None:
        state, extended = read_json(checkpoint / STATE_FILE), config.extended
        # Lengthened again before it took a step, it has a new end and no more.
        if not extended or extended[-1][0] != state["step"]:
            extended = (*extended, (state["step"], state.get("num_steps", lengthened)))
            config = replace(config, extended=extended)
    write_config(config, folder / CONFIG_FILE)
    mark(folder)
    return config, checkpoint


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json, which marks a run as finished and therefore comes last.

    Args:
        results: for `json.dump`; its "step" is the one the run ends at.
    """
    replace_json(folder / RESULTS_FILE, results)


def is_finished(folder: Path, num_steps: int) -> bool:
    """Whether a run of so many steps has written everything it ends with."""
    try:
        return read_json(folder / RESULTS_FILE).get("step") == num_steps
    except (OSError, ValueError):
        return False


def _holds_anything(folder: Path) -> bool:
    """Whether there is more than a run leaves that was killed before it wrote its settings."""
    names = (path.name for path in folder.iterdir())
    return any(name not in (LOCK_FILE, MARKER) and not name.startswith(UNFINISHED) for name in names)


def _read_config(path: Path, config: RunConfig) -> dict[str, Any]:
    """A run's settings; those that are newer than the run stand at their defaults, by which it ran."""
    try:
        saved = read_yaml(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    for item in fields(config):
        own = getattr(config, item.name)
        if is_dataclass(own) and isinstance(saved.get(item.name), dict):
            saved[item.name] = as_plain(type(own)()) | saved[item.name]
    data = saved.get("data")
    if isinstance(data, dict) and isinstance(data.get("max_pixels"), int):
        data |= {"max_pixels": None, "max_image_bytes": bytes_of_pixels(data["max_pixels"])}
    return saved
