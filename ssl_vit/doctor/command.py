"""Runs the doctor for scripts/doctor.py: prints the facts and writes a config."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ssl_vit.core.writing import report_error
from ssl_vit.data.sources.source import open_source
from ssl_vit.doctor.diagnose import Measure, adopt, diagnose
from ssl_vit.training.config import OF_ONE_CALL, RunConfig, as_stored, own_folder, parse_run


def examine(
    defaults: RunConfig,
    settings: Sequence[str],
    *,
    sample: int | None,
    step: Measure,
    as_json: bool,
    config_file: Path | None,
    front: str,
) -> int:
    """Print the facts of a source and a run, and write a config if one was asked for.

    Args:
        defaults: the config of the objective's script.
        settings: flags of that script, `--data.source` among them.
        sample: number of images to read; None for all.
        config_file: YAML to write: the given settings with the mean, deviation and channels that were measured. The
            run is then judged by these. None writes nothing.
        front: name of that script, for the command that the written config begins with.

    Returns:
        Exit code 0; 1 if something would stop or spoil a run; 2 if settings or source cannot be used.
    """
    try:
        if config_file is not None and config_file.exists():
            raise ValueError(f"--write_config={config_file}: is there already; name a new file")
        config = parse_run(defaults, settings)
        source = open_source(config.data)
    except ValueError as error:
        text = " ".join(str(error).split())
        if "objective." in text and "no such" in text:
            text += f". Settings were read as {type(defaults.objective).__name__}'s; --objective names another"
        return report_error(ValueError(text))
    facts = diagnose(config, source, sample=sample, step=step, adopts=config_file is not None)
    print(json.dumps(dataclasses.asdict(facts), indent=2) if as_json else facts)
    if config_file is not None and facts.settings is None:
        print(f"--write_config={config_file}: not written, since no image can be read", file=sys.stderr)
    elif config_file is not None and facts.settings is not None:
        try:
            write_settings(defaults, adopt(config, facts.settings), config_file, front)
        except ValueError as error:
            return report_error(error)
        print(f"written to {config_file}", file=sys.stderr)
    return 1 if facts.problems else 0


def write_settings(defaults: RunConfig, config: RunConfig, file: Path, front: str) -> None:
    """Write the settings that differ from the script's defaults as a config that the script takes from any folder.

    Raises:
        ValueError: the file cannot be written.
    """
    values, usual = as_stored(config), as_stored(defaults)
    if config.output_dir == own_folder(config):
        values["output_dir"] = usual["output_dir"]  # derived from the other settings again
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(getattr(config, name)):
            value = {key: entry for key, entry in value.items() if entry != usual[name].get(key, ...)}
            if value:
                changed[name] = value
        elif value != usual[name] and name not in OF_ONE_CALL:
            changed[name] = value
    text = f"# accelerate launch scripts/{front}.py --config {shlex.quote(str(file))}\n" + yaml.safe_dump(
        changed, sort_keys=False, default_flow_style=None, allow_unicode=True
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--write_config={file}: cannot be written ({error.strerror}); name another file") from error
