"""Which of several runs is better by its scores, or that these cannot tell, in words."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from ssl_vit.evaluation.scores import newcombe_interval
from ssl_vit.runs.record import RunData

SCORES = {"knn": "k-NN", "linear": "linear probe"}
_LEARNED = ("trained", "fine-tuned", "attentive")  # rows of results.json that score what a run has learned
# What decides by which images a run is judged, and how. The feature is not there: it belongs to the backbone.
_PROTOCOL = ("test_source", "test_split", "k", "temperature", "folds", "crop_pct", "max_images")
_COLUMNS = ("split", "image_column", "label_column")


def compare(runs: Sequence[RunData], names: Sequence[str]) -> list[str]:
    """Of each two runs: which is better, that these numbers cannot tell, or why they cannot be compared.

    They are compared where both were judged by the same images in the same way. The difference of two accuracies has
    the 95 % interval of two independent shares (Newcombe), which is wider than one that knew what both have got right.

    Args:
        names: what to call each run.
    """
    return [
        _compare(a, b, *called) for (a, b), called in zip(combinations(runs, 2), combinations(names, 2), strict=True)
    ]


def _compare(a: RunData, b: RunData, name_a: str, name_b: str) -> str:
    pair, scores_a, scores_b = f"{name_a} and {name_b}", _scores(a), _scores(b)
    shared = [name for name in scores_a if name in scores_b]
    without = [name for name, scores in ((name_a, scores_a), (name_b, scores_b)) if not scores]
    if not shared:
        why = f"no scores at the end of {' and '.join(without)}" if without else "they have no score in common"
        return f"{pair} cannot be compared: {why}."
    if differing := _differing(a, b, shared):
        return f"{pair} cannot be compared, since they were not judged alike: {'; '.join(differing)}."
    signs, differences = set(), []
    for name in shared:
        first, second = scores_a[name], scores_b[name]
        difference, low, high = newcombe_interval(first["accuracy"], first["n"], second["accuracy"], second["n"])
        signs.add(1 if low > 0 else -1 if high < 0 else 0)
        differences.append(
            f"{SCORES.get(name, name)} {100 * first['accuracy']:.1f} and {100 * second['accuracy']:.1f} %, difference "
            f"{100 * difference:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
        )
    if signs == {0}:
        verdict = f"These numbers cannot tell which of {pair} is better"
    elif signs >= {1, -1}:
        verdict = f"Each of {pair} is better by another score"
    else:
        verdict = f"{name_a} is better than {name_b}" if 1 in signs else f"{name_b} is better than {name_a}"
    return f"{verdict}: {'; '.join(differences)}, of {scores_a[shared[0]]['n']:,} images."


def _scores(run: RunData) -> dict[str, Any]:
    """How good what a run has learned was at its end: score -> its accuracy, n and more."""
    rows = (run.results or {}).get("scores") or {}
    found = next((rows[name] for name in _LEARNED if name in rows), {})
    return {name: score for name, score in found.items() if score.get("n") and "accuracy" in score}


def _differing(a: RunData, b: RunData, shared: Sequence[str]) -> list[str]:
    """What scores depend on beside the backbone and is not the same for both, with the values."""
    first, second = _judged_by(a, shared), _judged_by(b, shared)
    return [f"{key} {first[key]} and {second[key]}" for key in first if first[key] != second[key]]


def _judged_by(run: RunData, shared: Sequence[str]) -> dict[str, Any]:
    evaluation, data = run.settings.get("evaluation") or {}, run.settings["data"]
    rows, scores, most = (run.results or {})["scores"], _scores(run), evaluation.get("max_images")
    own = evaluation.get("source") is None
    most_known = max(scores[shared[0]]["n"], run.provenance.get("num_images", 0) if own else 0)
    # The seed draws the images where there are too many, and the fifth that a fine-tuning holds out.
    is_drawn = (most is not None and most_known >= most) or (
        "trained" not in rows and not evaluation.get("test_source")
    )
    return {
        "images": (run.fingerprint or data["source"]) if own else evaluation["source"],
        **{f"evaluation.{name}": evaluation.get(name) for name in _PROTOCOL},
        **{f"data.{name}": data.get(name) for name in _COLUMNS},
        "seed": run.settings.get("seed") if is_drawn else None,
        "score of": next(name for name in _LEARNED if name in rows),
        **{f"n of {SCORES.get(name, name)}": scores[name]["n"] for name in shared},
    }
