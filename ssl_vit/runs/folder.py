"""The folder of a run: new, taken by one process at a time, or moved aside; never overwritten silently."""

from datetime import datetime
from pathlib import Path
from typing import Any

from ssl_vit.core.reading import read_json
from ssl_vit.core.text import plain
from ssl_vit.core.writing import UNFINISHED, own_folder, replace_json
from ssl_vit.data.outputs import MARKER
from ssl_vit.runs.checkpoint import remove_unfinished
from ssl_vit.runs.lock import LOCK_FILE, lock_folder

CONFIG_FILE, METRICS_FILE, RESULTS_FILE = "config.yaml", "metrics.jsonl", "results.json"
PICTURES_FOLDER = "pictures"


def take_folder(folder: Path, *, fresh: bool) -> None:
    """Lock a run's folder for this process and create what is missing; only the main process calls this.

    Args:
        fresh: whether a run that the folder holds is moved aside first.

    Raises:
        ValueError: another run works in it.
    """
    if folder.exists():
        lock_folder(folder)
    if fresh and folder.exists() and holds_anything(folder):
        aside = folder.with_name(f"{folder.name}-before-{datetime.now():%Y%m%d-%H%M%S}")
        folder.rename(aside)
        print(f"Moved the existing run aside: {plain(aside)}")
    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder)
    own_folder(folder / PICTURES_FOLDER)
    remove_unfinished(folder)


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


def holds_anything(folder: Path) -> bool:
    """Whether there is more than a run leaves that was killed before it wrote its settings."""
    names = (path.name for path in folder.iterdir())
    return any(name not in (LOCK_FILE, MARKER) and not name.startswith(UNFINISHED) for name in names)
