"""heartbeat.json in a run's folder: what the run was doing when, for whoever watches it."""

import json
import os
import platform
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from ssl_vit.core.reading import read_json
from ssl_vit.core.writing import replace_text

HEARTBEAT_FILE = "heartbeat.json"
State = Literal["starting", "training", "evaluating", "finishing", "finished", "stopped", "failed"]


def beat(folder: Path, state: State, step: int, num_steps: int, images_per_second: float | None = None) -> None:
    """Rewrite the heartbeat; a reader finds the old one or the new one, never a part. Only the main process calls this.

    Args:
        step: optimizer steps done.
        images_per_second: of all processes, over the last log interval.
    """
    values = {
        "state": state,
        "step": step,
        "num_steps": num_steps,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "images_per_second": images_per_second,
        "host": platform.node(),
        "pid": os.getpid(),
    }
    with suppress(OSError):  # a watcher's convenience must not end a run
        replace_text(folder / HEARTBEAT_FILE, json.dumps(values) + "\n", flushed=False)


def end_of_start(folder: Path, error: BaseException) -> None:
    """Note that this process was stopped, or failed, while it was starting a run; not where it never had the folder."""
    with suppress(OSError, ValueError, KeyError):
        found = read_json(folder / HEARTBEAT_FILE)
        if (found["state"], found["pid"]) == ("starting", os.getpid()):
            state: State = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            beat(folder, state, found["step"], found["num_steps"])
