"""Recipes compared: each setting of a list trains for equal CPU time and is judged alike.

A list is a YAML file:

    objective: lejepa
    flags: {config: configs/quickstart_lejepa.yaml}    # of all settings
    settings:
      as it stands: {}
      twice the rate: {optim.base_lr: 8.0e-3}
      another: {objective: mae, config: configs/quickstart_mae.yaml}
      lightly's example: {objective: lightly_mae, config: configs/quickstart_mae.yaml}    # extra `bench`

Each setting is first timed for some steps, input and all, which gives the number of steps that fill the time. Runs take
turns, seed by seed. A killed search goes on: a run that has its scores is not repeated, an unfinished one resumes.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from benchmarks.processes import ROOT, measure_run
from benchmarks.rivals import RIVALS
from benchmarks.rounds import machine
from ssl_vit.core.front import FlagParser
from ssl_vit.core.shipped import find_config
from ssl_vit.core.writing import replace_json

HELP = "train a list of settings for equal CPU time, and judge them alike"
OBJECTIVES = ("mae", "simmim", "fcmae", "dino", "dinov2", "lejepa", *RIVALS)
TIMED_STEPS = 12
KINDS = ("knn", "linear")


def add_flags(parser: FlagParser) -> None:
    parser.add_argument("list", type=Path, help="YAML file: objective, flags of all, settings by name")
    parser.add_argument("--minutes", type=float, default=5.0, help="CPU minutes of a training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run of each setting by each (default: 0)")
    parser.add_argument("--only", nargs="+", default=[], help="only these settings of the list")
    parser.add_argument("--output_dir", type=Path, help="the runs' folder (default: runs/recipes/NAME_OF_THE_LIST)")


def check(args: argparse.Namespace, settings: list[str]) -> str | None:
    if not args.minutes > 0:
        return f"--minutes {args.minutes}: give a number above 0"
    return None


def measure(args: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    recipes = read_list(args.list)
    if unknown := [name for name in args.only if name not in recipes]:
        raise ValueError(f"--only {unknown[0]}: {args.list} has no such setting; it has {', '.join(recipes)}")
    recipes = {name: recipe for name, recipe in recipes.items() if not args.only or name in args.only}
    folder = args.output_dir or Path("runs/recipes") / args.list.stem
    runs = []
    for seed in args.seeds:
        for number, (name, recipe) in enumerate(recipes.items()):
            print(f"{name}, seed {seed} ({number + 1} of {len(recipes)})", file=sys.stderr, flush=True)
            try:
                found = run_recipe(recipe, seed, args.minutes, folder / name)
            except ChildProcessError as error:  # the others are worth having
                found = {"failed": str(error)}
            runs.append({"name": name, "seed": seed, **found})
            print(_line(runs[-1]), file=sys.stderr, flush=True)
    if all("failed" in run for run in runs):
        raise ChildProcessError(runs[0]["failed"])
    return {
        "what": f"{args.list.name}: {args.minutes:g} CPU minutes each",
        "minutes": args.minutes,
        "recipes": recipes,
        "runs": runs,
        "machine": machine(),
    }


def read_list(path: Path) -> dict[str, dict[str, Any]]:
    """Flags of each setting, those of all included; `objective` is one of `OBJECTIVES`.

    Raises:
        ValueError: the file is no such list.
    """
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict) or not found["settings"]:
        raise ValueError(f"{path}: no mapping with `settings`, a mapping of names to flags")
    for name, flags in {"flags": found.get("flags"), **found["settings"]}.items():
        if not isinstance(flags, dict | type(None)):
            raise ValueError(f"{path}: {name}: {flags!r} is no mapping of flags, such as {{optim.base_lr: 1.0e-3}}")
    common = {"objective": found.get("objective"), **(found.get("flags") or {})}
    recipes = {str(name): {**common, **(own or {})} for name, own in found["settings"].items()}
    for name, recipe in recipes.items():
        if recipe["objective"] not in OBJECTIVES:
            raise ValueError(f"{path}: {name}: objective={recipe['objective']}: use {', '.join(OBJECTIVES)}")
        if "config" in recipe:
            try:
                find_config(recipe["config"])
            except ValueError as error:
                raise ValueError(f"{path}: {name}: {error}") from error
        if wrong := {"steps", "epochs", "seed", "output_dir"} & set(recipe):
            raise ValueError(f"{path}: {name}: {min(wrong)} is set by the comparison; leave it out")
    return recipes


def run_recipe(recipe: dict[str, Any], seed: int, minutes: float, folder: Path) -> dict[str, Any]:
    """Train one setting for so many CPU minutes, and return its steps, images, CPU seconds and scores.

    Raises:
        ChildProcessError: the training failed, or gave no scores.
    """
    output = folder / f"seed{seed}"
    kept = output.with_suffix(".json")
    asked = {"recipe": recipe, "minutes": minutes, "seed": seed}
    if "config" in recipe:
        file = find_config(recipe["config"])
        asked["config"] = file.read_text() if file.is_file() else None  # an edited file is another recipe
    found = json.loads(kept.read_text()) if kept.exists() else {}
    if found.get("asked") == asked and "scores" in found:
        return found
    objective = recipe["objective"]
    flags = [*flags_of(recipe), f"--seed={seed}", "--quiet"]
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait count as CPU time otherwise
    if objective in RIVALS:
        folder.mkdir(parents=True, exist_ok=True)
        found = {"asked": asked, **_run_rival({"name": objective, "settings": flags, "seconds": 60 * minutes}, output)}
        replace_json(kept, found)
        return found
    if found.get("asked") != asked:
        with tempfile.TemporaryDirectory() as desk:
            short = [f"--steps={TIMED_STEPS + 10}", "--epochs=null", "--log_every=1000", f"--output_dir={desk}/run"]
            job = {"name": objective, "settings": [*flags, *short], "steps": TIMED_STEPS}
            timed = measure_run(job, Path(desk) / "job.json", 1)
        steps = max(1, math.floor(60 * minutes * TIMED_STEPS / timed["cpu_seconds"]))
        found = {
            "asked": asked,
            "steps": steps,
            "images": steps * timed["images"] // TIMED_STEPS,
            "cpu_seconds_per_step": timed["cpu_seconds"] / TIMED_STEPS,
        }
        folder.mkdir(parents=True, exist_ok=True)
        if output.exists():  # it was asked for something else
            output.rename(output.with_name(f"{output.name}-before-{datetime.now():%Y%m%d-%H%M%S}"))
        replace_json(kept, found)  # so a killed run resumes with as many steps
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / "scripts" / f"pretrain_{objective}.py"), *flags]
    command += [f"--steps={found['steps']}", "--epochs=null", f"--output_dir={output}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ChildProcessError(f"{output}: the run ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    results = json.loads((output / "results.json").read_text())
    if results["scores"] is None:
        raise ChildProcessError(f"{output}: no scores: the comparison needs labelled images (evaluation.source)")
    found["cpu_seconds_with_scores"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found |= results
    replace_json(kept, found)
    return found


def _run_rival(job: dict[str, Any], output: Path) -> dict[str, Any]:
    path = output.with_suffix(".job")
    path.write_text(json.dumps(job))
    command = [sys.executable, "-m", "benchmarks.rivals", str(path)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # files of a setting are relative to here
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    if done.returncode:
        raise ChildProcessError(f"{output}: {job['name']} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(path.with_suffix(".found").read_text())


def flags_of(recipe: dict[str, Any]) -> list[str]:
    """The flags of an objective's training script."""
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in recipe.items()
        if key != "objective"
    ]


def as_lines(result: dict[str, Any]) -> list[str]:
    """A line for each run, and for each setting with several seeds their mean and range."""
    lines = [f"{'accuracy, %':40} {'k-NN':>20} {'linear':>20} {'images':>9} {'images/s':>9}"]
    done = [run for run in result["runs"] if "failed" not in run]
    pixels = [run["scores"]["raw pixels"] for run in done if "raw pixels" in run["scores"]]
    lines += [f"{'raw pixels':40} {_scores(scores)}" for scores in pixels[:1]]
    for name in result["recipes"]:
        runs = [run for run in result["runs"] if run["name"] == name]
        lines += [_line(run) for run in runs]
        if len(judged := [run for run in runs if run in done]) > 1:
            values = ([100 * run["scores"]["trained"][kind]["accuracy"] for run in judged] for kind in KINDS)
            means = (f"{statistics.mean(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in values)
            lines.append(f"{name + f', {len(judged)} seeds':40} " + " ".join(f"{mean:>20}" for mean in means))
    return lines


def _line(run: dict[str, Any]) -> str:
    own = f"{run['name']} [{run['seed']}]"
    if "failed" in run:
        return f"{own:40} failed: {run['failed']}"
    rate = run["images"] / run["steps"] / run["cpu_seconds_per_step"]
    lines = f"{own:40} {_scores(run['scores']['trained'])} {run['images']:9,} {rate:9.0f}"
    return lines + "".join(
        f"  {kind} {100 * gain['difference']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
        for kind, gain in run.get("trained_minus_untrained", {}).items()
    )


def _scores(scores: dict[str, dict[str, float]]) -> str:
    return " ".join(
        f"{100 * s['accuracy']:6.1f} [{100 * s['low']:.1f}, {100 * s['high']:.1f}]"
        for s in (scores[kind] for kind in KINDS)
    )
