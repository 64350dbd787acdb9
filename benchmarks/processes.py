"""What more processes cost: real runs under torchrun, measured from inside, between steps.

python -m torch.distributed.run ... -m benchmarks.processes JOB.json    is one of them
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.end_to_end import NoEnding
from benchmarks.flags import defaults_of
from benchmarks.rounds import synchronize, turns
from ssl_vit.core.distributed import end_processes, process_index
from ssl_vit.training.config import parse_run
from ssl_vit.training.loop import set_up, train

WARMUP = 3
ROOT = Path(__file__).parents[1]


def measure_processes(
    name: str, settings: list[str], counts: Sequence[int], steps: int, rounds: int = 1
) -> dict[int, list[dict[str, Any]]]:
    """Time and CPU time of the same run in each number of processes, from one step to another; numbers take turns.

    The threads are the same in all: each process has its share of the CPUs.

    Args:
        name: mae | dino | dinov2.
        settings: of that script.
        counts: numbers of processes.
        steps: steps that are measured, after a few to warm up.
        rounds: how often each number is measured.

    Returns:
        By number of processes, of each round: `seconds`, `cpu_seconds` and `system_seconds` of all of them, `images`,
        and `threads` of each.

    Raises:
        ChildProcessError: a run failed.
    """
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as desk:
        _write_images(Path(desk) / "images")
        flags = [f"--data.source={desk}/images", "--quiet", "--data.label_column=none", "--fresh"]
        flags += [f"--steps={WARMUP + steps + 1}", "--log_every=10", "--epochs=null"]
        for count in turns(counts, rounds):
            own = [f"--output_dir={desk}/run{count}"]
            job = {"name": name, "settings": [*settings, *flags, *own], "steps": steps}
            found[count].append(measure_run(job, Path(desk) / f"{count}.json", count))
    return found


def measure_run(job: dict[str, Any], path: Path, count: int) -> dict[str, Any]:
    """One run in so many processes; `path` is where they find what to do, and leave what they found.

    Args:
        job: `name` of the objective, `settings` of its script, and the number of `steps` that are measured.
    """
    path.write_text(json.dumps(job))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "-m", "benchmarks.processes", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    if done.returncode:
        found = re.search(r"^(?:\[rank\d+\]: )?(?:error|\w*Error): (.+)$", done.stderr, re.MULTILINE)
        why = found[1] if found else done.stderr.strip()[-500:]
        raise ChildProcessError(f"a run in {count} processes failed: {why}")
    parts = [json.loads(path.with_suffix(f".{rank}").read_text()) for rank in range(count)]
    return {
        "seconds": parts[0]["seconds"],
        "cpu_seconds": sum(part["cpu_seconds"] for part in parts),
        "system_seconds": sum(part["system_seconds"] for part in parts),
        "images": parts[0]["images"],
        "threads": parts[0]["threads"],
    }


def _write_images(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(64):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        coarse.resize((256, 256)).save(folder / f"{number}.jpg")


def run_one(job: Path) -> None:
    """Train, and write what lies between two steps beside the job, in a file of this process."""
    asked = json.loads(job.read_text())
    sys.path.insert(0, str(ROOT))
    run = set_up(parse_run(defaults_of(asked["name"]), asked["settings"]), NoEnding())
    run.saves = False
    calls = 0
    marks: list[tuple[float, float, float]] = []

    def note(*_: Any) -> None:
        nonlocal calls
        if calls in (WARMUP * run.train_step.num_micro, (WARMUP + asked["steps"]) * run.train_step.num_micro):
            synchronize()
            used = resource.getrusage(resource.RUSAGE_SELF)
            marks.append((time.perf_counter(), used.ru_utime + used.ru_stime, used.ru_stime))
        calls += 1

    run.train_step.model.register_forward_pre_hook(note)
    train(run)
    (start, cpu_start, system_start), (end, cpu_end, system_end) = marks
    found = {
        "seconds": end - start,
        "cpu_seconds": cpu_end - cpu_start,
        "system_seconds": system_end - system_start,
        "images": asked["steps"] * run.config.batch.size,
        "threads": torch.get_num_threads(),
    }
    job.with_suffix(f".{process_index()}").write_text(json.dumps(found))


if __name__ == "__main__":
    try:
        run_one(Path(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"error: {error}")
    end_processes()
