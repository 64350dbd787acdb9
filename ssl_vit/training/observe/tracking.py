"""A tracker beside metrics.jsonl, through Accelerate: the same numbers under the same names, and the same figures.

All of them write into the run's folder and send nothing, unless their own environment variables say otherwise
(WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID).
"""

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from ssl_vit.core.reading import open_regular, read_json
from ssl_vit.core.text import plain
from ssl_vit.core.writing import own_folder, replace_json
from ssl_vit.training.faults import by_product

TrackerName = Literal["none", "tensorboard", "wandb", "mlflow", "trackio"]
_IDS_FILE = "tracking.json"
_PROJECT = "ssl_vit"


class Tracker:
    """One of Accelerate's trackers, started; only the main process has one."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any], start_step: int) -> None:
        self.name, self.folder = name, folder
        self._tracker: Any = LOGGER_TYPE_TO_CLASS[name](**_arguments(name, folder, start_step))
        self._tracker.start()
        _note_id(name, folder, self._tracker.tracker)
        # TensorBoard would keep a second copy, MLflow refuses one.
        if start_step == 0:
            self._tracker.store_init_configuration(dict(_flat(settings)))

    def log(self, record: Mapping[str, float | None]) -> None:
        """Send a line of metrics.jsonl without its values that are no numbers, such as an infinite gradient."""
        values = {name: value for name, value in record.items() if name != "step" and value is not None}
        self._tracker.log(values, step=record["step"])

    def figure(self, path: Path, step: int) -> None:
        """Send a figure that was drawn at a step."""
        if self.name == "mlflow":
            self._tracker.log_artifact(str(path), "pictures")
        elif self.name == "trackio":
            import trackio  # pyright: ignore[reportMissingImports]

            with Image.open(path) as figure:
                self._tracker.log({"pictures": trackio.Image(figure.convert("RGB"))}, step=step)
        else:
            with Image.open(path) as opened:
                pixels = np.asarray(opened.convert("RGB"))
            more = {"dataformats": "NHWC"} if self.name == "tensorboard" else {}
            self._tracker.log_images({"pictures": pixels[None]}, step=step, **more)

    def finish(self) -> None:
        self._tracker.finish()


def check_tracker(name: TrackerName) -> None:
    """Refuse a tracker whose package is missing.

    Raises:
        ValueError: names the extra to install.
    """
    if name != "none" and find_spec(name) is None:
        raise ValueError(f'tracking={name!r}: its package is missing: pip install "ssl-vit[{name}]"')


def start_tracker(
    name: TrackerName, folder: Path, settings: Mapping[str, Any], start_step: int, *, is_writer: bool
) -> Tracker | None:
    """The tracker of a run, continued if the run continues; None on other processes and if no tracker is set.

    A tracker that cannot be started, for example without a network, is left out with a warning.

    Args:
        settings: the run's, as plain values.
        start_step: what was tracked after it is done again.
    """
    if name != "none" and is_writer:
        with by_product(f"tracker {name} cannot be started and is"):
            return Tracker(name, folder, settings, start_step)
    return None


def _arguments(name: str, folder: Path, start_step: int) -> dict[str, Any]:
    """Arguments of Accelerate's tracker class."""
    own_folder(folder / name)
    known = _read_ids(folder).get(name) if start_step else None
    if name == "tensorboard":
        # Hides what was written after the checkpoint.
        purge = {"purge_step": start_step + 1} if start_step else {}
        return {"run_name": "tensorboard", "logging_dir": str(folder), **purge}
    if name == "wandb":
        mode = os.environ.get("WANDB_MODE", "offline")
        resumed = {"id": known, "resume": "allow"} if known else {}
        return {"run_name": _PROJECT, "dir": str(folder), "name": plain(folder.resolve().name), "mode": mode, **resumed}
    if name == "mlflow":
        place = own_folder(folder.resolve() / "mlflow")
        place.mkdir(exist_ok=True)
        own_folder(place / "files")
        if os.path.lexists(place / "mlflow.db"):
            os.close(open_regular(place / "mlflow.db"))
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        local = os.environ["MLFLOW_TRACKING_URI"].startswith("sqlite:")
        # A server keeps files where it wants to.
        where = {"logging_dir": (place / "files").as_uri()} if local else {}
        return {"experiment_name": _PROJECT, "run_name": plain(folder.resolve().name), "run_id": known, **where}
    os.environ.setdefault("TRACKIO_DIR", str(folder.resolve() / "trackio"))
    return {"run_name": _PROJECT, "name": plain(folder.resolve().name), "resume": "allow" if start_step else "never"}


def _note_id(name: str, folder: Path, started: Any) -> None:
    """Store the name by which a continued run is found again."""
    found = {"wandb": lambda: started.id, "mlflow": lambda: started.info.run_id}
    if name in found:
        ids = {**_read_ids(folder), name: found[name]()}
        replace_json(folder / _IDS_FILE, ids)


def _read_ids(folder: Path) -> dict[str, str]:
    try:
        found = read_json(folder / _IDS_FILE)
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | float]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, int | float) else str(value)
