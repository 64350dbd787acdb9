"""Accuracies with honest intervals, and how they are shown."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

_Z95 = 1.959963984540054  # half the width of a central 95 % interval, in standard deviations


@dataclass(frozen=True, eq=False)
class Score:
    """Accuracy over pictures none of which its classifier was fitted to. Shares, not percent."""

    accuracy: float
    low: float
    """Lower end of the 95 % interval of the accuracy (Wilson)."""
    high: float
    """Upper end of the same interval."""
    balanced_accuracy: float
    """Mean over the classes of the share of their pictures that were recognised."""
    correct: Bool[np.ndarray, " n"]
    """Whether each picture was recognised, in the order of their rows."""

    @property
    def n(self) -> int:
        """How many pictures."""
        return len(self.correct)

    @classmethod
    def of(cls, labels: Int[np.ndarray, " n"], predictions: Int[np.ndarray, " n"]) -> "Score":
        """Score predictions against labels, at least one picture."""
        correct = labels == predictions
        low, high = wilson_interval(int(correct.sum()), len(correct))
        balanced = np.mean([correct[labels == label].mean() for label in np.unique(labels)])
        return cls(float(correct.mean()), low, high, float(balanced), correct)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), sound for few pictures and for shares near 0 and 1 too."""
    share, z2 = successes / trials, _Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 * (share * (1 - share) / trials + z2 / (4 * trials**2)) ** 0.5 / (1 + z2 / trials)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def paired_interval(correct_a: Bool[np.ndarray, " a"], correct_b: Bool[np.ndarray, " b"]) -> tuple[float, float, float]:
    """Difference of two accuracies on the same pictures, a - b, with its 95 % interval.

    Normal approximation of the mean of the per-picture differences: pictures that both get right or both get
    wrong cancel, so it is narrower than what two separate intervals suggest.

    Args:
        correct_a, correct_b: `Score.correct` of the two, the same pictures in the same order.

    Returns:
        (difference, low, high)

    Raises:
        ValueError: not the same number of pictures, or fewer than two.
    """
    if len(correct_a) != len(correct_b) or len(correct_a) < 2:
        raise ValueError(
            f"cannot compare {len(correct_a)} pictures with {len(correct_b)}: "
            "the two scores must be of the same pictures, at least two of them"
        )
    differences = correct_a.astype(np.float64) - correct_b
    difference = float(differences.mean())
    half = _Z95 * float(differences.std(ddof=1)) / len(differences) ** 0.5
    return difference, max(difference - half, -1.0), min(difference + half, 1.0)


def format_table(rows: dict[str, dict[str, Score]], k: int = 20) -> str:
    """Lay scores out as text: a line each, accuracies in percent with their 95 % intervals.

    Args:
        rows: from the line's name to what `evaluate_features` returned.
        k: neighbours of the k-NN, for the heading.
    """
    probes = list(next(iter(rows.values())))
    titles = {"knn": f"k-NN (k={k})", "linear": "linear"}
    lines = [["accuracy, %", *(titles[probe] for probe in probes), "n"]]
    for name, scores in rows.items():
        shown = [scores[probe] for probe in probes]
        cells = [f"{100 * s.accuracy:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}]" for s in shown]
        lines.append([name, *cells, str(shown[0].n)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "   ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def scores_to_json(rows: dict[str, dict[str, Score]]) -> dict[str, dict[str, dict[str, float]]]:
    """The numbers of a table for `json.dump`: dictionaries of line, probe, number. Shares, not percent."""
    numbers = ("accuracy", "low", "high", "balanced_accuracy", "n")
    return {
        name: {probe: {number: getattr(score, number) for number in numbers} for probe, score in scores.items()}
        for name, scores in rows.items()
    }
