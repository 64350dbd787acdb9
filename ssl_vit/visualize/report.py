"""The report: one HTML file about one run or several, which opens from disk and asks the network for nothing."""

import base64
import io
import json
from collections.abc import Callable, Collection, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import yaml

from ssl_vit.core.reading import MAX_FIGURE, read_bytes
from ssl_vit.core.settings import differences
from ssl_vit.core.text import visible
from ssl_vit.core.writing import replace_text
from ssl_vit.runs.record import RunData, read_run
from ssl_vit.runs.trained import Trained, open_trained
from ssl_vit.visualize.comparison import SCORES, compare
from ssl_vit.visualize.film import Frame, open_figure, spread
from ssl_vit.visualize.inputs import ShownImages, open_shown_images
from ssl_vit.visualize.panel import panel_data
from ssl_vit.visualize.verdict import assess

MOST_BYTES = 15_000_000
_FIGURES_BYTES = 4_500_000  # of all runs together, before base64
_PANEL_BYTES = 6_000_000  # of one run
_FRAME_BYTES = 50_000  # what stands around the panels: controls, names, reasons
_MAX_POINTS = 600  # of a curve
# Name in metrics.jsonl -> title, unit and what it means. Others that a run has logged come after these, by their names.
_CURVES = {
    "loss": ("Loss", "", "what is minimised"),
    "eval_knn": ("k-NN accuracy", "%", "of frozen features, on labelled images"),
    "eval_linear": ("Linear probe accuracy", "%", "of frozen features, on labelled images"),
    "rankme": ("RankMe", "", "dimensions that the features make use of; a fall to a few is a collapse"),
    "feature_std": ("Feature spread", "", "0 where all images get the same features, near 1 where they are spread"),
    "teacher_entropy": ("Teacher entropy", "nats", "0 = always one prototype, ln K = all alike; both are collapses"),
    "kl": ("KL, teacher to student", "nats", "how far the student is from its teacher"),
    "below_ln_k": ("Loss below ln K", "nats", "0 means that nothing is told apart"),
    "prototypes_used": ("Prototypes in use", "%", "of those that could be"),
    "view_cosine": ("Cosine of views", "", "how far views of an image agree; 1 is most"),
    "coding_rate": ("Coding rate", "", "half a log-determinant, scaled; a fall means that images get more alike"),
    "projection_rank": ("Dimensions in use", "%", "of those that a batch's projections could use"),
    "own_found": ("Own image found", "%", "the student's feature is nearest to the teacher's of the same image"),
    "target_entropy": (
        "Entropy of targets",
        "%",
        "100 = all images are alike to the teacher: lower the temperature",
    ),
    "lr": ("Learning rate", "", "of the schedule"),
    "weight_decay": ("Weight decay", "", "of the schedule"),
    "teacher_temp": ("Teacher temperature", "", "lower is sharper"),
    "ema_momentum": ("EMA momentum", "", "share of the old teacher that a step keeps"),
    "grad_norm": ("Gradient norm", "", "before clipping"),
    "images_per_second": ("Images per second", "", "evaluation and saving left out"),
    "data_wait": ("Waiting for data", "%", "share of a step's time; below 10 % is well"),
    "memory_mib": ("Memory", "MiB", "peak of the GPU, or resident memory on a CPU"),
    "bad_images": ("Images that could not be decoded", "", "so far"),
}


def write_report(
    folders: Sequence[Path],
    out: Path,
    *,
    num_images: int = 3,
    seed: int = 0,
    source: str | None = None,
    asked: bool = False,
) -> list[str]:
    """Write the report of runs.

    Args:
        num_images: of each run's panel, fewer where they do not fit into `MOST_BYTES`; 0 leaves the panels out.
        source: whose images the panels show; None = each run's own.
        asked: whether the user wants those opened, see `check_asked`; a run whose images are not has no panel.

    Returns:
        A line for each thing that had to be left out.

    Raises:
        ValueError: a folder that holds no run.
    """
    if num_images < 0:
        raise ValueError(f"--panel_images {num_images}: give a number of images; 0 leaves the panel out")
    runs = [read_run(folder) for folder in folders]
    panels = []
    if num_images:
        left = MOST_BYTES - len(render(runs).encode()) - _FRAME_BYTES
        for place, folder in enumerate(folders):
            inputs = partial(
                open_shown_images, given=[source] if source else [], number=num_images, seed=seed, asked=asked
            )
            panels.append(_panel(folder, inputs, min(_PANEL_BYTES, left // (len(folders) - place))))
            left -= len(json_for_script(panels[-1]))
    page = render(runs, panels)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, page)
    few = [_left_out(run, _FIGURES_BYTES // len(runs)) for run in runs]
    told = [f"{name}: {text}" for name, text in zip(distinct([run.name for run in runs]), few, strict=True) if text]
    return [*(f"no panel: {panel}" for panel in panels if isinstance(panel, str)), *told]


def _panel(folder: Path, open_inputs: Callable[[Trained], ShownImages], most_bytes: int) -> dict[str, Any] | str:
    """What the panel shows of a run, of as many images as fit, or why there is none."""
    try:
        trained = open_trained(folder)
        inputs = open_inputs(trained)
    except ValueError as error:
        return str(error)
    reason = ""
    for number in range(len(inputs.images), 0, -1):
        fewer = inputs._replace(images=inputs.images[:number], names=inputs.names[:number])
        try:
            return panel_data(trained, fewer, most_bytes=most_bytes)
        except ValueError as error:
            reason = f"{folder}: {error}"
    return reason


def render(runs: Sequence[RunData], panels: Sequence[dict[str, Any] | str] = ()) -> str:
    """The page. All that comes from a run is escaped: names, classes and paths are other people's text.

    Args:
        panels: of each run what its panel shows, or the reason why there is none; nothing leaves the panels out.
    """
    most_figures = _FIGURES_BYTES // len(runs)
    names = distinct([run.name for run in runs])
    described = [_about(run, name, most_figures) for run, name in zip(runs, names, strict=True)]
    shown = [panel if isinstance(panel, dict) else None for panel in panels]
    data = {
        "runs": [{"name": name, **_curves(run)} for run, name in zip(runs, names, strict=True)],
        "curves": _curve_list(runs),
        "frames": [about.pop("frames") for about in described],
        "panels": shown,
        "viridis": _map_table("viridis"),
        "inferno": _map_table("inferno"),
    }
    templates = files("ssl_vit.visualize") / "templates"
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    return environment.from_string((templates / "report.html").read_text(encoding="utf-8")).render(
        runs=described,
        comparison=compare(runs, names),
        differing=_differing(runs),
        unchanged=_unchanged(runs),
        panels=[name for name, panel in zip(names, shown, strict=False) if panel is not None],
        no_panel=[(name, panel) for name, panel in zip(names, panels, strict=False) if isinstance(panel, str)],
        has_steps=any(panel is not None and "steps" in panel for panel in shown),
        has_frames=any(data["frames"]),
        data=json_for_script(data),
        style=(templates / "report.css").read_text(encoding="utf-8"),
        scripts=[(templates / name).read_text(encoding="utf-8") for name in ("curves.js", "film.js", "panel.js")],
    )


def json_for_script(data: Any) -> str:
    """JSON that nothing in it can end the script element it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _about(run: RunData, name: str, most_bytes: int) -> dict[str, Any]:
    verdict = assess(run)
    hours = run.hours
    last = run.records[-1] if run.records else {}
    rates = [record["images_per_second"] for record in run.records if record.get("images_per_second")]
    step, frames = last.get("step", 0), _embed(_fitting(run.frames, most_bytes))
    facts = {
        "objective": run.provenance.get("objective", "-"),
        "architecture": run.settings["encoder"]["arch"],
        "data": run.settings["data"]["source"],
        "images": f"{run.provenance['num_images']:,}" if "num_images" in run.provenance else "-",
        "state": "finished" if run.results else f"at {100 * last.get('progress', 0):.0f} %",
        "steps": f"{step:,} of {run.batch_size:,} images",
        "hours": f"{hours[-1]:.2g}" if hours else "-",
        "images/s": f"{np.median(rates):,.0f} (median)" if rates else "-",
        "hardware": run.provenance.get("hardware", "-"),
        "versions": ", ".join(f"{key} {run.provenance[key]}" for key in ("torch", "timm") if key in run.provenance),
        "ssl_vit": run.provenance.get("version", "-"),
    }
    return {
        "name": name,
        "verdict": verdict.word,
        "reasons": verdict.reasons,
        "facts": {key: value for key, value in facts.items() if value not in ("", "-")},
        "attribution": run.provenance.get("attribution"),
        "scores": [
            {
                "file": file,
                "row": row,
                "column": SCORES.get(column, column),
                "value": f"{100 * value:.1f} %",
                "interval": interval,
            }
            for file, row, column, value, interval in run.scores
        ],
        "config": yaml.safe_dump(run.settings, sort_keys=False),
        "picture": None if frames or run.picture is None else _shrink(run.picture),
        "frames": frames,
        "left_out": _left_out(run, most_bytes),
    }


def _left_out(run: RunData, most_bytes: int) -> str:
    """Says that a run has more figures than fit."""
    shown, number = len(_fitting(run.frames, most_bytes)), len(run.frames)
    return "" if shown == number else f"{shown} of its {number} figures over time are shown, the others do not fit"


def _fitting(frames: Sequence[Frame], most_bytes: int) -> list[Frame]:
    """As many figures, evenly, as fit into so many bytes."""
    number = len(frames)
    while number > 2 and sum(item.path.stat().st_size for item in spread(frames, number)) > most_bytes:
        number -= max(1, number // 10)
    chosen = spread(frames, number) if number else []
    if sum(item.path.stat().st_size for item in chosen) > most_bytes:
        chosen = []
    return chosen


def _embed(frames: Sequence[Frame]) -> list[dict[str, Any]]:
    return [
        {
            "step": item.step,
            "picture": "data:image/webp;base64," + base64.b64encode(_read_frame(item)).decode(),
        }
        for item in frames
    ]


def _read_frame(frame: Frame) -> bytes:
    open_figure(frame.path).close()
    return read_bytes(frame.path, MAX_FIGURE)


def _shrink(path: Path) -> str:
    buffer = io.BytesIO()
    with open_figure(path) as figure:
        small = figure.convert("RGB")
        small.thumbnail((1400, 2800))
        small.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _curves(run: RunData) -> dict[str, Any]:
    steps = [record["step"] for record in run.records]
    return {
        "batch": run.batch_size,
        # Hours of any step lie between those of the records.
        "clock": _thin(list(zip(steps, run.hours, strict=True))),
        "points": {name: _thin(points) for name, points in run.curves().items()},
    }


def _thin(points: list[tuple[int, float]]) -> list[list[float]]:
    """At most `_MAX_POINTS`, the first and last among them, six digits each."""
    if len(points) > _MAX_POINTS:
        chosen = np.linspace(0, len(points) - 1, _MAX_POINTS).round().astype(int)
        points = [points[place] for place in chosen]
    return [[step, float(f"{value:.6g}")] for step, value in points]


def _curve_list(runs: Sequence[RunData]) -> list[dict[str, str]]:
    """What has been measured at least twice and is not one constant, the known ones first."""
    values: dict[str, set[float]] = {}
    present = set()
    for run in runs:
        for name, points in run.curves().items():
            values.setdefault(name, set()).update(value for _, value in points)
            if len(points) > 1:
                present.add(name)
    present = {name for name in present if not _is_constant(values[name])}
    names = [*(name for name in _CURVES if name in present), *sorted(present - set(_CURVES))]
    found = []
    for name in names:
        title, unit, help_text = _CURVES.get(name, (name.replace("_", " ").capitalize(), "", ""))
        found.append({"name": name, "title": title, "unit": unit, "help": help_text})
    return found


def _unchanged(runs: Sequence[RunData]) -> list[str]:
    """What has no curve since it was the same at every measurement of every run that has it."""
    found = []
    for name, (title, unit, _) in _CURVES.items():
        points = [value for run in runs for _, value in run.curves().get(name, [])]
        if len(points) > 1 and _is_constant(points):
            shown = 100 * points[0] if unit == "%" else points[0]
            found.append(f"{title} {shown:.4g} {unit}".strip())
    return found


def _is_constant(values: Collection[float]) -> bool:
    """But for rounding, of which a curve would be all noise."""
    return max(values) - min(values) <= 1e-5 * max(abs(value) for value in values)


def _differing(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Settings in which not all runs agree."""
    keys: dict[str, None] = {}
    for run in runs[1:]:
        keys.update(dict.fromkeys(differences(runs[0].settings, run.settings)))
    keys.pop("output_dir", None)
    found = []
    for key in keys:
        values = []
        for run in runs:
            value: Any = run.settings
            for part in key.split("."):
                value = value.get(part, "-") if isinstance(value, dict) else "-"
            values.append("null" if value is None else str(value))
        found.append({"key": key, "values": values})
    return found


def distinct(names: Sequence[str]) -> list[str]:
    """Runs of the same folder name get numbers."""
    return [
        f"{name} ({names[: place + 1].count(name)})" if list(names).count(name) > 1 else name
        for place, name in enumerate(names)
    ]


def _map_table(name: str) -> list[int]:
    """A colour map of 64 entries as numbers 0xRRGGBB."""
    colours = (matplotlib.colormaps[name](np.linspace(0, 1, 64))[:, :3] * 255).round().astype(int)
    return [int(red) << 16 | int(green) << 8 | int(blue) for red, green, blue in colours]
