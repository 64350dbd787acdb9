"""Everything that a run folder holds for readers: settings, metrics, scores, figures, provenance."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ssl_vit.core.reading import read_json, read_metrics
from ssl_vit.core.writing import own_folder
from ssl_vit.models.weights.backbone import CONFIG_FILE as EXPORT_FILE
from ssl_vit.runs.checkpoint import STATE_FILE, newest_checkpoint
from ssl_vit.runs.folder import CONFIG_FILE, METRICS_FILE, PICTURES_FOLDER, RESULTS_FILE, read_results
from ssl_vit.runs.provenance import PROVENANCE_FILE
from ssl_vit.runs.trained import read_settings

# Entries of metrics.jsonl that say when a line was measured.
_PLACES = ("step", "progress", "epoch")
_SCORES = (RESULTS_FILE, "knn.json", "linear.json", "retrieval.json", "segmentation.json")


class Frame(NamedTuple):
    """A figure drawn during training."""

    step: int
    path: Path


@dataclass(frozen=True)
class RunData:
    """A run as it lies on disk, finished or not."""

    name: str
    settings: dict[str, Any]
    records: list[dict[str, Any]]
    """Lines of metrics.jsonl with a loss, in order. NaN and infinity are None."""
    evaluations: list[dict[str, Any]]
    """The other lines: scores during training, shares of 1."""
    results: dict[str, Any] | None
    """results.json; None while the run goes on, also where it was lengthened."""
    scores: list[tuple[str, str, str, float, str]]
    """(file, row, column, share of 1, interval as text) of every score in the folder; of results.json only once the run
    has finished."""
    provenance: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    """Hash of the training images; None if it was not recorded."""
    frames: list[Frame] = field(default_factory=list)
    picture: Path | None = None
    """The figure drawn at the end of the run."""

    @property
    def batch_size(self) -> int:
        return int(self.settings["batch"]["size"])

    @property
    def hours(self) -> list[float]:
        """Hours of training up to each record; evaluation and saving are left out."""
        return training_hours(self.records, self.batch_size)

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """(step, value) of every measured quantity, by its name in metrics.jsonl."""
        found: dict[str, list[tuple[int, float]]] = {}
        for record in [*self.records, *self.evaluations]:
            for name, value in record.items():
                if name not in _PLACES and isinstance(value, int | float) and not isinstance(value, bool):
                    found.setdefault(name, []).append((record["step"], value))
        return found


def read_run(folder: Path) -> RunData:
    """Read the folder of a run, finished or not; missing files are left out.

    Raises:
        ValueError: the folder holds no run.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder}: holds no run ({CONFIG_FILE} is missing)")
    settings = read_settings(folder)
    lines = read_metrics(folder / METRICS_FILE)
    results = read_results(folder, settings)
    figures = [folder / name for name in ("reconstructions.png", "attention.png", "pca.png", "figure.png")]
    return RunData(
        name=folder.resolve().name,
        settings=settings,
        records=[line for line in lines if "loss" in line],
        evaluations=[line for line in lines if "loss" not in line],
        results=results,
        scores=[score for score in found_scores(folder) if results is not None or score[0] != RESULTS_FILE],
        provenance=_provenance(folder),
        fingerprint=_fingerprint(folder),
        frames=list_frames(folder),
        picture=next((path for path in figures if path.is_file()), None),
    )


def list_frames(run: Path) -> list[Frame]:
    """Figures drawn during a run, in order.

    Raises:
        ValueError: the figures' folder is a link.
    """
    found = []
    for path in own_folder(run / PICTURES_FOLDER).glob("step-*.webp"):
        number = path.stem.removeprefix("step-")
        if number.isdecimal():
            found.append(Frame(int(number), path))
    return sorted(found)


def training_hours(records: Sequence[Mapping[str, Any]], batch_size: int) -> list[float]:
    """Hours of training up to each line of metrics.jsonl; evaluation and saving are left out."""
    total, before, hours = 0.0, 0, []
    for record in records:
        if record.get("images_per_second"):
            total += (record["step"] - before) * batch_size / record["images_per_second"] / 3600
            before = record["step"]
        hours.append(total)
    return hours


def found_scores(folder: Path) -> Iterator[tuple[str, str, str, float, str]]:
    """(file, row, column, share of 1, interval as text) of all scores in a backbone's folder."""
    for name in _SCORES:
        found = _read_json(folder / name) or {}
        scores = found.get("scores", found)
        for row, columns in scores.items() if isinstance(scores, dict) else ():
            for column, value, interval in _read_scores(columns):
                yield name, row, column, value, interval


def _read_scores(columns: Any) -> Iterator[tuple[str, float, str]]:
    if not isinstance(columns, dict):
        return
    for column, entry in columns.items():
        if isinstance(entry, dict) and all(_is_share(entry.get(name)) for name in ("accuracy", "low", "high")):
            interval = f"{100 * entry['low']:.1f} to {100 * entry['high']:.1f}, n {entry.get('n')}"
            yield column, entry["accuracy"], interval
        elif column in ("mean_average_precision", "miou") and isinstance(entry, float):
            yield column, entry, ""


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _provenance(folder: Path) -> dict[str, Any]:
    """Facts, without settings, from the export or else the newest checkpoint."""
    known = (_read_json(folder / EXPORT_FILE) or {}).get("ssl_vit")
    known = known if isinstance(known, dict) else {}
    checkpoint = newest_checkpoint(folder)
    if not known and checkpoint is not None:
        known = _read_json(checkpoint / STATE_FILE) or {}
    wanted = ("objective", "version", "torch", "timm", "hardware", "source", "num_images", "attribution", "pretrained")
    found = {name: known[name] for name in wanted if known.get(name) is not None}
    if not isinstance(found.get("num_images", 0), int):
        found.pop("num_images")
    return found


def _fingerprint(folder: Path) -> str | None:
    sessions = (_read_json(folder / PROVENANCE_FILE) or {}).get("sessions") or [{}]
    return sessions[-1].get("data", {}).get("sha256")


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if it cannot be read."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
