"""Provenance: facts stored with checkpoints and exports, and a record of each start of a run."""

import hashlib
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import ssl_vit
from ssl_vit.core.machine import cpu_name, device_name, num_cpus
from ssl_vit.core.privacy import without_secrets
from ssl_vit.core.reading import entry, read_json
from ssl_vit.core.settings import differences
from ssl_vit.core.text import plain
from ssl_vit.core.writing import free_space, replace_json
from ssl_vit.data.sources.source import Source
from ssl_vit.data.sources.stored import locate
from ssl_vit.data.sources.stream import Stream
from ssl_vit.objectives.frozen import hashes
from ssl_vit.objectives.objective import Objective

PROVENANCE_FILE = "provenance.json"
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "datasets", "numpy", "pillow", "safetensors", "jsonargparse")
NUM_NAMED = 256  # rows whose names and sizes go into the data's fingerprint
MATTERS = ("processes", "versions", "git.ssl_vit", "data")


def facts(objective: Objective, source: Source | Stream, device: torch.device, num_processes: int) -> dict[str, Any]:
    """JSON-serialisable facts about a run that are not in its settings."""
    return {
        "objective": objective.name,
        "pooled": objective.pooled,
        "leaves": objective.leaves,
        "reconstructs": objective.reconstructs,
        "frozen": hashes(objective.frozen),
        "num_images": source.num_samples,
        "attribution": source.attribution,
        "hardware": f"{num_processes} x {device_name(device)}",
    }


def provenance(settings: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """The facts about a run that its export holds.

    Args:
        settings: the run's settings as plain values.
        state: "step" and `facts`, completed as `read_state` does; "best" says why weights are not the run's last.
    """
    return {
        "objective": state["objective"],
        "pooled": state["pooled"],
        "objective_config": settings["objective"],
        "optim": settings["optim"],
        "source": settings["data"]["source"],
        "num_images": state.get("num_images"),
        "attribution": state.get("attribution"),
        "steps": state["step"],
        "best": state.get("best"),
        "batch_size": settings["batch"]["size"],
        "pretrained": settings["encoder"].get("pretrained"),
        "frozen": state.get("frozen") or None,
        "seed": settings["seed"],
        "feature": settings["evaluation"]["feature"],
        "hardware": state.get("hardware"),
        "collapse": state.get("faults", {}).get("collapse") or None,
    }


def note_session(
    folder: Path,
    source: Source | Stream,
    *,
    seed: int,
    start_step: int,
    num_steps: int,
    num_processes: int,
    num_micro: int,
    precision: str,
) -> None:
    """Append this start to the run's provenance.json; only the main process calls this.

    Prints differences from the previous start that may change the weights. An unwritable file does not stop the run.
    """
    path = folder / PROVENANCE_FILE
    session = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": start_step,
        "num_steps": num_steps,
        "command": without_secrets([*sys.orig_argv]),
        "working_folder": str(Path.cwd()),
        "seed": seed,
        "processes": {"count": num_processes, "micro_batches": num_micro, "precision": precision},
        "versions": versions(),
        "git": {"working_folder": git_revision(Path.cwd()), "ssl_vit": git_revision(Path(ssl_vit.__file__).parent)},
        "hardware": hardware(),
        "data": {"source": without_secrets([source.name])[0], **fingerprint(source)},
    }
    sessions = _read_sessions(path)
    if sessions:
        changed = differences(sessions[-1], session)
        changes = [
            f"{key} {old} -> {new}"
            for key, (old, new) in changed.items()
            if key.startswith(MATTERS) and key not in ("data.sha256", "data.covers") and old is not None
        ]
        if "data.sha256" in changed and "data.rows" not in changed and changed["data.sha256"][0] is not None:
            changes.append("data: as many images as before, of other names or sizes")
        if changes:
            print(f"note       changed since the last start of this run: {plain(', '.join(changes))}")
    try:
        replace_json(path, {"sessions": [*sessions, session]})
    except OSError as error:
        print(f"WARNING: {plain(path)}: {error.strerror}, {free_space(folder)}; this start is not recorded")


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python, of the packages that can change the weights, and of those in `more` that are installed."""
    found = {"python": platform.python_version(), "ssl_vit": ssl_vit.__version__}
    for name in (*PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision(folder: Path) -> dict[str, Any] | None:
    """The commit of a folder's git checkout, and whether tracked files differ from it; None outside a checkout."""
    try:
        revision = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, no commit yet, or a slow disk
        return None
    return {"revision": revision.strip(), "dirty": bool(changes.strip())}


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *words],
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    ).stdout


def hardware() -> dict[str, Any]:
    """CPU, memory and GPUs of the main process's machine."""
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "cpu": cpu_name(),
        "cores": num_cpus(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [
            {"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)}
            for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
    }
    if found["gpus"]:
        found["cuda"] = torch.version.cuda
        driver = re.search(r"\s(\d+\.[\d.]+)\s", _read(Path("/proc/driver/nvidia/version")))
        found["driver"] = driver.group(1) if driver else None
    return found


def fingerprint(source: Source | Stream) -> dict[str, Any]:
    """A hash that identifies a set of images without reading them all; it does not depend on the folder's path."""
    if isinstance(source, Stream):
        counts = None if source.counts is None else source.counts.tolist()
        digest = hashlib.sha256(repr(([Path(name).name for name in source.shards], counts)).encode())
        covers = "the names of the shards and, where known, the number of rows of each; no pixels"
        return {"rows": source.num_samples, "sha256": digest.hexdigest(), "covers": covers}
    digest = hashlib.sha256(f"{len(source)}\n".encode())
    digest.update(b"" if source.tiles is None else source.tiles.tobytes())
    root = source.root or ""
    named = np.linspace(0, len(source) - 1, min(len(source), NUM_NAMED)).round().astype(int)
    for row in named.tolist():
        stored = source.rows[row][source.image_column] or {}
        path, data = stored.get("path") or "", stored.get("bytes")
        size = _size(locate(path, source.roots[source.part(row)]) if path else "") if data is None else len(data)
        digest.update(f"{path.removeprefix(root)}\0{size}\n".encode(errors="surrogateescape"))
    return {
        "rows": len(source),
        "sha256": digest.hexdigest(),
        "covers": f"the number of rows; name and size of {len(named)} of them, evenly spaced; "
        + ("no pixels" if source.tiles is None else "the places of all tiles; no pixels"),
    }


def _size(path: str) -> int | None:
    try:
        return Path(path).stat().st_size if path else None
    except OSError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _read_sessions(path: Path) -> list[dict[str, Any]]:
    if not os.path.lexists(path):
        return []
    try:
        found = entry(read_json(path), "sessions", list[dict], path)
        return [session for session in found if isinstance(session, dict)]
    except (OSError, ValueError) as error:
        print(f"WARNING: {plain(path)}: cannot be read and is replaced: {plain(repr(error))}")
        return []
