"""A real run, input and all, beside the same step on images that are there already."""

import argparse
import contextlib
import gc
import io
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.flags import RUN_FLAGS, add_objective, at_least, defaults_of
from benchmarks.rounds import alternate, contender, machine
from ssl_vit.core.front import FlagParser
from ssl_vit.core.settings import as_plain
from ssl_vit.data.workers import choose_num_workers
from ssl_vit.evaluation.evaluate import EvaluationConfig
from ssl_vit.runs.checkpoint import CheckpointConfig
from ssl_vit.runs.folder import METRICS_FILE
from ssl_vit.training.config import RunConfig, parse_run
from ssl_vit.training.loop import train
from ssl_vit.training.setup import set_up
from ssl_vit.training.step import prepare_step

HELP = "images per second and data wait of a run, beside its step without input"
MORE = RUN_FLAGS
MOST_WAIT = 0.1  # share of the time that waiting for data may take


def add_flags(parser: FlagParser) -> None:
    add_objective(parser)
    parser.add_argument("--data", required=True, help="the images, as data.source takes them")
    parser.add_argument("--archs", nargs="+", default=[], help="timm names, one run each (default: encoder.arch)")
    parser.add_switch("--cache", "each run with images decoded beforehand as well")
    parser.add_argument(
        "--steps_per_round", type=at_least(1), help="steps of a round (default: enough for the loader's workers)"
    )


def measure(args: argparse.Namespace, settings: list[str]) -> dict:
    config = parse_run(defaults_of(args.objective), [*settings, f"--data.source={args.data}"])
    return compare_end_to_end(
        config, archs=args.archs, cache=args.cache, steps=args.steps_per_round, rounds=args.rounds
    )


class NoEnding:
    """Nothing is judged, and nothing is written at the end."""

    def prepare(self, config: RunConfig, source: Any) -> tuple[Any, None]:
        return source, None

    def evaluate_in_training(self, *args: Any, **kwargs: Any) -> None: ...

    def finish(self, *args: Any, **kwargs: Any) -> None: ...


def compare_end_to_end(
    config: RunConfig, *, archs: Sequence[str] = (), cache: bool = False, steps: int | None = None, rounds: int = 5
) -> dict:
    """Images per second and data wait of training runs, and images per second of their steps without input.

    Args:
        config: a run's settings; its length and what it writes do not count.
        archs: one run each, instead of the config's.
        cache: each run once more, with images decoded beforehand and kept in memory.
        steps: steps of a round, after as many to warm up; None: enough to use up what loader workers have ready when
            a run begins.
    """
    runs = {}
    for arch in archs or [config.encoder.arch]:
        of_arch = replace(config, encoder=replace(config.encoder, arch=arch))
        for kind in ("none", "ram") if cache else (config.data.cache,):
            name = arch if kind == "none" else f"{arch}, cache"
            runs[name] = _measure(replace(of_arch, data=replace(config.data, cache=kind)), steps, rounds)
    kept_up = [name for name, run in runs.items() if run["data_wait"] < MOST_WAIT]
    return {
        "what": f"training run of {type(config.objective).__name__.removesuffix('Config')} on {config.data.source}, "
        f"batch {config.batch.size}, {config.encoder.image_size} px",
        "runs": runs,
        "settings": as_plain(config),
        "fastest_fed": max(kept_up, key=lambda name: runs[name]["rate"], default=None),
        "machine": machine(),
    }


def _measure(config: RunConfig, steps: int | None, rounds: int) -> dict:
    """A run in a temporary folder, and then its step alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workers = choose_num_workers(config.data.num_workers, device)
    steps = steps or max(3, 2 * workers)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            config,
            output_dir=folder,
            steps=steps * (1 + rounds),
            epochs=None,
            log_every=steps,
            tracking="none",
            profile=0,
            checkpoint=CheckpointConfig(every_steps=steps * (1 + rounds)),
            evaluation=EvaluationConfig(),
        )
        with contextlib.redirect_stdout(io.StringIO()):
            run = set_up(config, NoEnding())
            run.saves = False
            train(run)
        lines = (Path(folder) / METRICS_FILE).read_text().splitlines()
    config = replace(run.config, cuda_graphs=run.train_step.graphs.enabled)
    objective, num_micro = run.objective, run.train_step.num_micro
    records = [record for record in map(json.loads, lines) if "images_per_second" in record][1:]
    run.train_step.optimizer.state.clear()
    del run
    size = config.batch.size // num_micro
    work = _ready_steps(config, objective, size, num_micro, steps, device)
    ready = alternate({"ready": work}, rounds)["ready"]
    del work, objective
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    rates = [record["images_per_second"] for record in records]
    return {
        "rates": rates,
        "rate": statistics.median(rates),
        "data_wait": statistics.median(record["data_wait"] for record in records),
        "ready_rates": ready,
        "ready_rate": statistics.median(ready),
        "num_workers": workers,
        "steps": steps,
    }


def _ready_steps(
    config: RunConfig, objective: Any, size: int, num_micro: int, steps: int, device: torch.device
) -> Callable[[], int]:
    step = prepare_step(config, objective, size, device)

    def one_step() -> None:
        for _ in range(num_micro):
            step.forward_backward()
        step.update()

    return contender(one_step, num_micro * size, steps)


def as_lines(result: dict) -> list[str]:
    """The result as a table."""
    lines = [f"{'':36} images/s  waits for data  images ready   share  workers"]
    for name, run in result["runs"].items():
        lines.append(
            f"{name:36} {run['rate']:8.1f} {run['data_wait']:15.1%} {run['ready_rate']:13.1f} "
            f"{run['rate'] / run['ready_rate']:7.0%} {run['num_workers']:8}"
        )
    best = result["fastest_fed"]
    rate = f"{result['runs'][best]['rate']:.1f} images/s ({best})" if best else "none of these"
    return [*lines, f"highest rate that waits less than {MOST_WAIT:.0%} of the time: {rate}"]
