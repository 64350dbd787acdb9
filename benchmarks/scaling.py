"""Cost against what a run grows by: image size, crops, batch, processes and data."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.flags import AS_WRITTEN, RUN_FLAGS, add_number, add_objective, at_least, defaults_of
from benchmarks.processes import measure_processes
from benchmarks.rounds import alternate, contender, machine, ratios, synchronize
from ssl_vit.core.machine import resolve_precision
from ssl_vit.core.settings import as_plain
from ssl_vit.core.writing import mark
from ssl_vit.data.config import DataConfig
from ssl_vit.data.loader import Batches
from ssl_vit.data.sampler import StepSampler
from ssl_vit.data.sources.source import open_source
from ssl_vit.data.transform import pair
from ssl_vit.models.vit import choose_attention
from ssl_vit.training.config import RunConfig, parse_run
from ssl_vit.training.device.memory import build_on_meta
from ssl_vit.training.step import prepare_step

HELP = "what a step, more processes and more data cost"
MORE = f"{RUN_FLAGS} {AS_WRITTEN}"
AXES = ("image_size", "local_crops", "batch", "processes", "data")
PLOTS = (".png", ".webp", ".svg", ".pdf")
# What a scaling begins with; settings that are given win.
SMALL_BASE = ["--encoder.arch=vit_tiny_patch16_224", "--encoder.image_size=96", "--batch.size=8"]
SIZE_FACTORS = (0.5, 1, 1.5, 2, 3, 4)
LOCAL_CROPS = (0, 2, 4, 8)
BATCH_FACTORS = (0.25, 0.5, 1, 2, 4)
ROWS = (1_000, 10_000, 100_000, 1_000_000)


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_objective(parser)
    parser.add_argument("--axes", nargs="+", choices=AXES, help="which (default: all that the objective has)")
    parser.add_argument("--plot", type=Path, help=f"draw them in this file ({', '.join(PLOTS)})")
    add_number(parser, "--steps_per_round", 1, 2, "steps of a round")
    of_processes = "of the axis processes"
    parser.add_argument(
        "--process_counts", type=at_least(1), nargs="+", default=[1, 2], help=f"{of_processes} (default: 1 2)"
    )
    add_number(parser, "--process_steps", 1, 20, f"{of_processes}: steps measured")
    rows = "of the axis data (default: 1000 to a million)"
    parser.add_argument("--rows", type=at_least(1), nargs="+", default=list(ROWS), help=rows)


def check(args: argparse.Namespace, settings: list[str]) -> str | None:
    """What is wrong with the flags."""
    if args.plot and args.plot.suffix not in PLOTS:
        return f"--plot {args.plot}: ends in none of {', '.join(PLOTS)}"
    return None


def measure(args: argparse.Namespace, settings: list[str]) -> dict:
    has_crops = args.objective != "mae"
    settings = [*(["--objective.local_crop_size=48"] if has_crops else []), *SMALL_BASE, *settings]
    config, _ = parse_run(defaults_of(args.objective), settings).resolve(100_000)
    steps, rounds = args.steps_per_round, args.rounds
    by_axis = {
        "image_size": lambda: scale_image_size(config, steps, rounds),
        "local_crops": lambda: scale_local_crops(config, steps, rounds),
        "batch": lambda: scale_batch(config, steps, rounds),
        "processes": lambda: scale_processes(args.objective, settings, args.process_counts, args.process_steps, rounds),
        "data": lambda: scale_data(config, args.rows),
    }
    axes = args.axes or [axis for axis in AXES if axis != "local_crops" or has_crops]
    return as_result(config, [by_axis[axis]() for axis in axes])


@dataclass
class Series:
    """One axis: a cost at some points, and the line on which it would lie if it were proportional."""

    axis: str
    x_label: str
    y_label: str
    x: list[float]
    y: list[float]
    line: list[float]
    line_label: str = "proportional"
    is_logarithmic: bool = False
    more: Any = None


def through_origin(x: Sequence[float], y: Sequence[float], base: int) -> list[float]:
    """The line from the origin through a point, at each x."""
    return [y[base] * value / x[base] for value in x]


def through_ends(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """The line through the first and the last point, at each x."""
    slope = (y[-1] - y[0]) / (x[-1] - x[0])
    return [y[0] + slope * (value - x[0]) for value in x]


def _seconds(configs: Sequence[RunConfig], steps: int, rounds: int) -> list[float]:
    """Seconds of a step of each config, measured in turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def work_of(config: RunConfig) -> Callable[[], int]:
        objective = config.build_objective().to(device)
        precision = resolve_precision(config.precision, device)
        choose_attention(objective, objective.encoder.attention_length, device, precision)
        step = prepare_step(config, objective, config.batch.size, device)

        def one_step() -> None:
            step.forward_backward()
            step.update()

        return contender(one_step, 1, steps)

    rates = alternate({str(number): work_of(config) for number, config in enumerate(configs)}, rounds)
    return [1 / statistics.median(values) for values in rates.values()]


def scale_image_size(config: RunConfig, steps: int, rounds: int) -> Series:
    """Milliseconds of a step against the patches of an image."""
    (side, _), (stride, _) = pair(config.encoder.image_size), build_on_meta(config).encoder.stride
    sides = sorted({max(stride, stride * round(side * factor / stride)) for factor in SIZE_FACTORS})
    smallest = max(pair(getattr(config.objective, "local_crop_size", 0)))  # no larger than the image
    sides = [size for size in sides if size >= smallest]
    configs = [replace(config, encoder=replace(config.encoder, image_size=size)) for size in sides]
    x = [float((size // stride) ** 2) for size in sides]
    y = [1000 * seconds for seconds in _seconds(configs, steps, rounds)]
    base = sides.index(stride * round(side / stride))
    return Series("image_size", "patches of an image", "ms a step", x, y, through_origin(x, y, base), more=sides)


def scale_local_crops(config: RunConfig, steps: int, rounds: int) -> Series:
    """Milliseconds of a step against the number of local crops.

    Raises:
        ValueError: the objective takes none.
    """
    objective: Any = config.objective
    if not hasattr(objective, "num_local_crops"):
        raise ValueError("--axes local_crops: this objective takes none; use dino or dinov2, or leave it out")
    configs = [replace(config, objective=replace(objective, num_local_crops=count)) for count in LOCAL_CROPS]
    x = [float(count) for count in LOCAL_CROPS]
    y = [1000 * seconds for seconds in _seconds(configs, steps, rounds)]
    line = through_ends(x, y)
    return Series("local_crops", "local crops", "ms a step", x, y, line, "straight")


def scale_batch(config: RunConfig, steps: int, rounds: int) -> Series:
    """Milliseconds of a step against its images."""
    size = config.batch.size
    sizes = sorted({max(1, round(size * factor)) for factor in BATCH_FACTORS})
    configs = [replace(config, batch=replace(config.batch, size=count, per_device=None)) for count in sizes]
    x = [float(count) for count in sizes]
    y = [1000 * seconds for seconds in _seconds(configs, steps, rounds)]
    return Series("batch", "images of a step", "ms a step", x, y, through_origin(x, y, sizes.index(size)))


def scale_processes(name: str, settings: list[str], counts: Sequence[int], steps: int, rounds: int) -> Series:
    """CPU milliseconds of an image against processes that share batch and threads, start-up left out.

    Args:
        name: mae | dino | dinov2.
        settings: of that script, beside those for the images and the run's folder.
    """
    found = measure_processes(name, settings, counts, steps, rounds)
    x = [float(count) for count in counts]
    # Work per CPU second, as `ratios` compares it.
    rates = {str(count): [one["images"] / one["cpu_seconds"] for one in found[count]] for count in counts}
    y = [1000 / statistics.median(rates[str(count)]) for count in counts]
    extra = {name: 1 / ratio.median - 1 for name, ratio in ratios(rates, str(counts[0])).items()}
    more = {count: {"rounds": found[count], "extra_cpu": extra[str(count)]} for count in counts}
    return Series("processes", "processes", "CPU ms an image", x, y, [y[0]] * len(y), "no extra cost", more=more)


def scale_data(config: RunConfig, rows: Sequence[int] = ROWS, batches: int = 20) -> Series:
    """Seconds from a parquet file to its first batch, and images per second after that, against its rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, y, more = [float(count) for count in rows], [], []
    for count in (rows[0], *rows):  # once to warm up
        with tempfile.TemporaryDirectory() as folder, _cache_in(Path(folder) / "cache"):
            path = Path(folder) / "images.parquet"
            write_images(path, count)
            first, _ = _first_batch(config, path, device, batches)
            again, rate = _first_batch(config, path, device, batches)
        y.append(first)
        more.append({"rows": count, "first_seconds": first, "again_seconds": again, "images_per_second": rate})
    y, more = y[1:], more[1:]
    line = through_origin(x, y, len(x) - 1)
    return Series("data", "rows of a parquet file", "s to the first batch", x, y, line, is_logarithmic=True, more=more)


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Let the copies that are made of data go with the data."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


def write_images(path: Path, count: int) -> None:
    """A parquet file of so many small JPEGs, eight different ones."""
    rng = np.random.default_rng(0)
    images = []
    for number in range(8):
        file = path.with_name(f"{number}.jpg")
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
        images.append({"bytes": file.read_bytes(), "path": None})
    table = pa.table({"image": pa.array(images).take(pa.array(np.arange(count) % 8))})
    pq.write_table(table, path)


def _first_batch(config: RunConfig, path: Path, device: torch.device, batches: int) -> tuple[float, float]:
    """Seconds until a batch is there, and images per second of more of them."""
    size = min(config.batch.size, 32)
    encoder = build_on_meta(config).encoder
    transform = config.build_transform(encoder)
    start = time.perf_counter()
    source = open_source(DataConfig(source=str(path), label_column="none"))
    sampler = StepSampler(num_samples=len(source), batch_size=size, num_steps=batches + 1, seed=0, start_step=0)
    with Batches(source, transform, sampler, num_channels=encoder.in_chans, num_workers=0, device=device) as loaded:
        next(loaded)
        first = time.perf_counter() - start
        for _ in range(batches):
            next(loaded)
        synchronize()
        rate = batches * size / (time.perf_counter() - start - first)
    return first, rate


def as_result(config: RunConfig, series: list[Series]) -> dict:
    """What `benchmark.py` writes."""
    return {
        "what": f"{type(config.objective).__name__.removesuffix('Config')}, {config.encoder.arch}, "
        f"{config.encoder.image_size} px, batch {config.batch.size} where nothing else is said",
        "settings": as_plain(config),
        "series": [asdict(one) for one in series],
        "machine": machine(),
    }


def as_lines(result: dict) -> list[str]:
    """A table for each axis."""
    lines = []
    for one in result["series"]:
        lines.append(f"{one['x_label']:>24} {one['y_label']:>20} {one['line_label']:>14}")
        for x, y, line in zip(one["x"], one["y"], one["line"], strict=True):
            lines.append(f"{x:24,.0f} {y:20.3g} {line:14.3g}")
        if one["axis"] == "processes":
            for count, found in one["more"].items():
                cpu = ", ".join(f"{each['cpu_seconds']:.1f}" for each in found["rounds"])
                seconds = ", ".join(f"{each['seconds']:.1f}" for each in found["rounds"])
                lines.append(f"{count:>8} processes: {found['extra_cpu']:+.1%} CPU; {cpu} s of it in {seconds} s")
        if one["axis"] == "data":
            lines += [
                f"{found['rows']:>12,} rows: {found['again_seconds']:.2f} s the second time, "
                f"{found['images_per_second']:.0f} images/s"
                for found in one["more"]
            ]
    return lines


def draw(result: dict, path: Path) -> None:
    """A panel for each axis, with the line that its cost would follow if it were proportional."""
    figure = Figure(figsize=(3.2 * len(result["series"]), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for number, one in enumerate(result["series"]):
        axes = figure.add_subplot(1, len(result["series"]), number + 1)
        axes.plot(one["x"], one["line"], color="0.7", linestyle="--", label=one["line_label"])
        axes.plot(one["x"], one["y"], color="C0", marker="o", markersize=4, label="measured")
        axes.set(xlabel=one["x_label"], ylabel=one["y_label"])
        if one["is_logarithmic"]:
            axes.set(xscale="log", yscale="log")
        else:
            axes.set_ylim(bottom=0)
        if one["axis"] == "processes":
            axes.set_xticks(one["x"])
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    mark(path.parent, path.name)
    figure.savefig(path, dpi=110)
