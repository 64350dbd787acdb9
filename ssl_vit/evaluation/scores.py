"""Accuracies with honest intervals, and how they are shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ssl_vit.core.text import plain

_Z95 = 1.959963984540054  # half the width of a central 95 % interval, in standard deviations
_WIDEST = 80  # characters of a cell of a table


@dataclass(frozen=True, eq=False)
class Score:
    """Accuracy over images none of which its classifier was fitted to. Shares, not percent."""

    accuracy: float
    low: float
    """Lower end of the 95 % interval of the accuracy (Wilson)."""
    high: float
    """Upper end of the same interval."""
    balanced_accuracy: float
    """Mean over the classes of the share of their images that were recognised."""
    labels: Int[np.ndarray, " n"]
    """Class of each image."""
    predictions: Int[np.ndarray, " n"]
    """Predicted class of each image."""

    @property
    def correct(self) -> Bool[np.ndarray, " n"]:
        """Whether each image was recognised."""
        return self.labels == self.predictions

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.labels)

    @classmethod
    def of(cls, labels: Int[np.ndarray, " n"], predictions: Int[np.ndarray, " n"]) -> "Score":
        """Score predictions against labels, at least one image."""
        correct = labels == predictions
        low, high = wilson_interval(int(correct.sum()), len(correct))
        balanced = np.mean([correct[labels == label].mean() for label in np.unique(labels)])
        return cls(float(correct.mean()), low, high, float(balanced), labels, predictions)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), sound for few images and for shares near 0 and 1 too."""
    share, z2 = successes / trials, _Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 * (share * (1 - share) / trials + z2 / (4 * trials**2)) ** 0.5 / (1 + z2 / trials)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def newcombe_interval(share_a: float, trials_a: int, share_b: float, trials_b: int) -> tuple[float, float, float]:
    """Difference of two independent shares, a - b, with its 95 % interval (Newcombe 1998, method 10).

    Returns:
        (difference, low, high)
    """
    low_a, high_a = wilson_interval(round(share_a * trials_a), trials_a)
    low_b, high_b = wilson_interval(round(share_b * trials_b), trials_b)
    difference = share_a - share_b
    low = difference - ((share_a - low_a) ** 2 + (high_b - share_b) ** 2) ** 0.5
    return difference, low, difference + ((high_a - share_a) ** 2 + (share_b - low_b) ** 2) ** 0.5


def paired_interval(
    correct_a: Bool[np.ndarray, " a"], *correct_b: Bool[np.ndarray, " b"]
) -> tuple[float, float, float]:
    """Difference of two accuracies on the same images, a - b, with its 95 % interval.

    Normal approximation of the mean of the per-image differences: images that both get right or both get
    wrong cancel, so it is narrower than what two separate intervals suggest. Half an image is added to each of the
    four cells (both right, both wrong, only a, only b), so that it is honest for few images too: Agresti and Min,
    "Simple improved confidence intervals for comparing matched proportions" (2005). Of several b, such as seeds of
    one network, it is their mean, and how far they lie apart widens the interval.

    Args:
        correct_a, correct_b: `Score.correct` of the two, the same images in the same order.

    Returns:
        (difference, low, high)

    Raises:
        ValueError: not the same number of images, or none.
    """
    lengths = {len(b) for b in correct_b}
    if lengths != {len(correct_a)} or len(correct_a) == 0:
        raise ValueError(
            f"cannot compare {len(correct_a)} images with {', '.join(map(str, sorted(lengths)))}: "
            "the two scores must be of the same images, at least one of them"
        )
    others = np.stack(correct_b).astype(np.float64)
    differences = correct_a - others.mean(axis=0)
    # The added halves: one image on which both are alike, and half a one each way.
    number = len(differences) + 2
    centre = differences.sum() / number
    variance = ((np.square(differences).sum() + 1) / number - centre**2) / number
    if len(others) > 1:
        variance += others.mean(axis=1).var(ddof=1) / len(others)
    half = _Z95 * variance**0.5
    return float(differences.mean()), max(float(centre - half), -1.0), min(float(centre + half), 1.0)


class Gain(NamedTuple):
    """How far a score lies above another of the same images, see `paired_interval`."""

    difference: float
    low: float
    high: float
    others: tuple[float, ...]
    """Accuracies that it is compared with: one, or those of several seeds."""

    @classmethod
    def of(cls, score: Score, others: Sequence[Score]) -> "Gain":
        """The gain over the mean of `others`.

        Raises:
            ValueError: not the same number of images, or none.
        """
        interval = paired_interval(score.correct, *(other.correct for other in others))
        return cls(*interval, tuple(other.accuracy for other in others))

    def to_json(self) -> dict[str, float]:
        return {"difference": self.difference, "low": self.low, "high": self.high}

    def sentence(self, baseline: str) -> str:
        """The gain over `baseline` in points, and whether it is clear."""
        seeds = ", ".join(f"{100 * share:.1f}" for share in self.others)
        several = f" (mean of {len(self.others)} seeds, {seeds})" if len(self.others) > 1 else ""
        better = f"better than {baseline}" if self.low > 0 else "no clear difference"
        return (
            f"{baseline}{several} = {100 * self.difference:+.1f} points (95 % interval {100 * self.low:+.1f} to "
            f"{100 * self.high:+.1f}): {f'worse than {baseline}' if self.high < 0 else better}"
        )


def format_table(rows: Mapping[str, Mapping[str, Score]], titles: Mapping[str, str] | None = None) -> str:
    """Lay scores out as text: a line each, accuracies in percent with their 95 % intervals.

    Args:
        rows: from the line's name to a score for each column; a line may lack some.
        titles: headings of columns that are not to bear their own names.
    """
    columns = list(dict.fromkeys(column for scores in rows.values() for column in scores))
    lines = [["accuracy, %", *((titles or {}).get(column, column) for column in columns), "n"]]
    for name, scores in rows.items():
        cells = [_interval(scores[column]) if column in scores else "-" for column in columns]
        lines.append([name, *cells, str(next(iter(scores.values())).n)])
    return lay_out(lines)


def _interval(score: Score) -> str:
    return f"{100 * score.accuracy:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]"


def lay_out(lines: Sequence[Sequence[str]]) -> str:
    """Lay out a table as text: the first line is its heading, the first column is set left and the others right."""
    lines = [[plain(entry, _WIDEST) for entry in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "   ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def scores_to_json(rows: Mapping[str, Mapping[str, Score]]) -> dict[str, dict[str, dict[str, float]]]:
    """Convert a table for `json.dump`: dictionaries of line, column, number. Shares, not percent."""
    numbers = ("accuracy", "low", "high", "balanced_accuracy", "n")
    return {
        name: {column: {number: getattr(score, number) for number in numbers} for column, score in scores.items()}
        for name, scores in rows.items()
    }


class ClassScore(NamedTuple):
    """Recall and precision of one class. Shares, not percent."""

    name: str
    n: int
    """Images of the class."""
    recall: float
    """Share of them that were recognised: the class's accuracy."""
    precision: float | None
    """Share of the images predicted as this class that belong to it; None if there are none."""
    confused_with: str | None
    """Most frequent wrong prediction for its images; None if all were recognised."""


def per_class(score: Score, class_names: Sequence[str]) -> list[ClassScore]:
    """Score each class that was tested, in the order of the classes."""
    found = []
    for label in np.unique(score.labels).tolist():
        of_class, taken_for = score.labels == label, score.predictions == label
        wrong = score.predictions[of_class & ~taken_for]
        confused = None if len(wrong) == 0 else class_name(int(np.bincount(wrong).argmax()), class_names)
        precision = float((of_class & taken_for).sum() / taken_for.sum()) if taken_for.any() else None
        recall = float((of_class & taken_for).sum() / of_class.sum())
        found.append(ClassScore(class_name(label, class_names), int(of_class.sum()), recall, precision, confused))
    return found


def format_classes(classes: Sequence[ClassScore], most: int = 30) -> str:
    """Lay out `per_class` as text; of more than `most` classes those with the lowest recall."""
    shown = sorted(classes, key=lambda item: item.recall)[:most] if len(classes) > most else classes
    lines = [["class", "n", "recall, %", "precision, %", "most taken for"]]
    for item in shown:
        precision = "-" if item.precision is None else f"{100 * item.precision:.1f}"
        lines.append([item.name, str(item.n), f"{100 * item.recall:.1f}", precision, item.confused_with or "-"])
    more = f"\nthe {most} classes of lowest recall, of {len(classes)}" if len(classes) > most else ""
    return lay_out(lines) + more


def class_name(label: int, class_names: Sequence[str]) -> str:
    """Return the name of a class, or its number if it has none."""
    return class_names[label] if label < len(class_names) else str(label)
