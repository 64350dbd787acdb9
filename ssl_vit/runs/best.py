"""The best checkpoint of a run: found from its log and the checkpoints that exist, so that nothing else is stored."""

from pathlib import Path
from typing import Any, NamedTuple

from ssl_vit.core.reading import read_metrics
from ssl_vit.objectives.objective import Objective
from ssl_vit.runs.checkpoint import (
    CheckpointConfig,
    KeepBest,
    find_damage,
    list_checkpoints,
    prune_checkpoints,
    step_of,
)
from ssl_vit.runs.folder import METRICS_FILE, read_results

NAMES = {"knn": "eval_knn", "linear": "eval_linear", "rankme": "rankme", "loss": "loss"}
"""What metrics.jsonl calls that by which a checkpoint is the best."""
SCORES = ("knn", "linear")


class Best(NamedTuple):
    """A checkpoint and what it is the best by."""

    folder: Path
    by: KeepBest
    value: float
    """Share of 1, RankMe, or loss."""

    @property
    def step(self) -> int:
        return step_of(self.folder)

    def to_plain(self) -> dict[str, Any]:
        """What an export and results.json say of it."""
        return {"by": self.by, "value": self.value, "step": self.step}

    def __str__(self) -> str:
        shown = f"{100 * self.value:.1f} %" if self.by in SCORES else f"{self.value:.4g}"
        return f"step {self.step:,}, {self.by} {shown}"


def ranked(run: Path, by: KeepBest) -> list[Best]:
    """The run's checkpoints that were scored, the best first; of equal ones the earliest."""
    if by == "none":
        return []
    values = {
        line["step"]: value for line in read_metrics(run / METRICS_FILE) if (value := line.get(NAMES[by])) is not None
    }
    found = [Best(folder, by, values[step_of(folder)]) for folder in list_checkpoints(run) if step_of(folder) in values]
    return sorted(found, key=lambda best: best.value if by == "loss" else -best.value)


def best_checkpoint(run: Path, by: KeepBest) -> Best | None:
    """The best undamaged checkpoint; None where none was scored."""
    return next((best for best in ranked(run, by) if find_damage(best.folder) is None), None)


def ended_with(run: Path, settings: dict[str, Any]) -> Best | None:
    """The best checkpoint, where a finished run exported and scored its weights and not the last.

    Args:
        settings: the run's config.yaml.
    """
    noted = (read_results(run, settings) or {}).get("best")
    if not isinstance(noted, dict) or noted.get("by") not in list(NAMES):
        return None
    best = best_checkpoint(run, noted["by"])
    return best if best is not None and best.step == noted.get("step") else None


def is_best_yet(run: Path, by: KeepBest, step: int) -> bool:
    """Whether the weights of this step, whose scores are logged, are better than all checkpoints of other steps."""
    values = [
        line[NAMES[by]] for line in read_metrics(run / METRICS_FILE) if line["step"] == step and NAMES[by] in line
    ]
    others = [best.value for best in ranked(run, by) if best.step != step]
    return bool(values) and values[-1] is not None and all(values[-1] > other for other in others)


def tidy(run: Path, config: CheckpointConfig) -> None:
    """`prune_checkpoints`, which leaves the best one."""
    prune_checkpoints(run, config, {best.folder for best in ranked(run, config.keep_best)[:1]})


def check_keep_best(config: CheckpointConfig, objective: Objective, *, has_labels: bool) -> None:
    """Refuse to keep the best by what a run does not measure.

    Raises:
        ValueError: it has no labelled images, or logs no RankMe; or it has labels, whose test must choose nothing.
    """
    by = config.keep_best
    said = f"checkpoint.keep_best={by!r}"
    if by != "none" and objective.leaves != "backbone":
        raise ValueError(f"{said}: a run with labels keeps its last weights, and its test chooses nothing; use none")
    if by in SCORES and not has_labels:
        raise ValueError(f"{said}: there are no labelled images; name some in evaluation.source, or use rankme or loss")
    if by == "rankme" and type(objective).diagnostics is Objective.diagnostics:
        raise ValueError(f"{said}: {objective.name} logs none; use knn, linear or loss")
