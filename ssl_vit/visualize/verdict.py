"""How a run is going, in a word and by rules that are written down here."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from ssl_vit.evaluation.start import what_to_change
from ssl_vit.objectives.collapse import diagnose, diagnose_views
from ssl_vit.runs.record import RunData

MIN_RECORDS = 5  # log intervals after the warm-up
STARVED = 0.4  # share of a step in which it waits for its batch
FLAT = 0.01  # relative fall of the loss that counts as one
RISE = 0.01  # of k-NN accuracy, a point
PATIENCE = 3  # intervals in a row that look collapsed, as in training


class Verdict(NamedTuple):
    """A word, and why."""

    word: str
    """learning, collapsing, diverged, starved for data, not learning, undecided, or too early to say."""
    reasons: list[str]
    """Sentences, the one that decided first."""


def assess(run: RunData) -> Verdict:
    """The first of these rules that applies decides; what else is known is added as further reasons.

    1. diverged: the last loss is not a finite number.
    2. too early to say: fewer than 5 log intervals after the warm-up (optim.warmup).
    3. collapsing: the last 3 intervals look collapsed, by the rules of training (`objectives.collapse.diagnose`).
    4. starved for data: in the last quarter of the intervals, a step waits for its batch 40 % of its time or more.
    5. not learning: at the end the scores are below those of the start and their 95 % interval excludes 0.
    6. learning: that interval lies above 0; or the k-NN rose by a point or more over the run.
    7. MAE, and other losses that can only fall by learning: learning where the loss of the last quarter is 1 % below
       that of the first or more, else not learning.
    8. Losses of self-distillation, which may rise while a model learns: learning where features stay spread
       (feature_std at least .2), RankMe has kept at least half of its highest value, and at least 5 % of the
       prototypes that could be are in use, if there are any; else not learning. Trained weights have such features
       from the start, so a run that continues from some is then undecided.
    """
    records = run.records
    if records and not _is_finite(records[-1]["loss"]):
        return Verdict("diverged", ["The last loss is not a finite number: lower optim.base_lr or clip gradients."])
    warmup = run.settings["optim"].get("warmup", 0.0)
    start = float(warmup) if isinstance(warmup, int | float) else 0.0
    settled = [record for record in records if record.get("progress", 1.0) >= start and _is_finite(record["loss"])]
    if len(settled) < MIN_RECORDS:
        counted = f"{len(settled)} log interval{'' if len(settled) == 1 else 's'}"
        return Verdict("too early to say", [f"Only {counted} after the warm-up; it takes {MIN_RECORDS}."])
    data, others = _about_data(settled), [*_about_scores(run), *_about_knn(run), _about_loss(settled)]
    facts = [*data, *others]  # as they decide; told in the order of interest
    reasons = [reason for _, reason in (*others, *data)]
    if (sign := _collapse(run, settled)) is not None:
        return Verdict("collapsing", [sign, *reasons])
    decided = next((fact for fact in facts if fact[0]), None) or _by_spread(run, settled)
    return Verdict(decided[0], [decided[1], *(reason for reason in reasons if reason != decided[1])])


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_distillation(records: Sequence[Mapping[str, Any]]) -> bool:
    return bool({"teacher_entropy", "coding_rate"} & records[-1].keys())


def _collapse(run: RunData, records: Sequence[Mapping[str, Any]]) -> str | None:
    prototypes = run.settings["objective"].get("num_prototypes")
    needed = ("teacher_entropy", "kl", "feature_std", "prototypes_used")
    last = records[-PATIENCE:]
    if all(_is_finite(record.get(name)) for record in last for name in ("feature_std", "projection_rank")):
        signs = [diagnose_views(record, run.settings) for record in last]
        return signs[-1] if all(signs) else None
    if not isinstance(prototypes, int) or not all(_is_finite(record.get(name)) for record in last for name in needed):
        return None
    known = {**run.settings, "num_images": run.provenance.get("num_images")}
    signs = [diagnose(record, run.settings["objective"], known) for record in last]
    return signs[-1] if all(signs) else None


def _about_scores(run: RunData) -> list[tuple[str, str]]:
    found = []
    for key, scores in (run.results or {}).items():
        if not key.startswith("trained_minus_") or not isinstance(scores, dict):
            continue
        start = key.removeprefix("trained_minus_").replace("_", " ")
        for name, values in scores.items():
            word = "learning" if values["low"] > 0 else "not learning" if values["high"] < 0 else ""
            word = "" if start == "raw pixels" else word  # they tell where it stands, not whether it learns
            found.append(
                (
                    word,
                    f"At the end, {_title(name)} is {abs(100 * values['difference']):.1f} points "
                    f"{'above' if values['difference'] >= 0 else 'below'} {start} "
                    f"(95 % interval {100 * values['low']:+.1f} to {100 * values['high']:+.1f}).",
                )
            )
    # One score below its start does not make a run useless while another is above it.
    words = {word for word, _ in found}
    return [("" if word == "not learning" and "learning" in words else word, reason) for word, reason in found]


def _about_knn(run: RunData) -> list[tuple[str, str]]:
    scores = [line["eval_knn"] for line in run.evaluations if _is_finite(line.get("eval_knn"))]
    if len(scores) < 2:
        return []
    rise = scores[-1] - scores[0]
    if run.settings["encoder"].get("pretrained") and run.evaluations[0]["step"] == 0 and rise <= -RISE:
        change = what_to_change(run.settings["optim"], run.settings["objective"])
        word = "" if run.results is not None else "not learning"
        return [
            (
                word,
                f"k-NN is {100 * scores[-1]:.1f} %, below the {100 * scores[0]:.1f} % of the weights that the run "
                f"started from: {change}.",
            )
        ]
    word = "learning" if rise >= RISE and run.results is None else ""
    return [(word, f"k-NN went from {100 * scores[0]:.1f} % to {100 * scores[-1]:.1f} % during training.")]


def _about_loss(records: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    quarter = max(1, len(records) // 4)
    first, last = (median(record["loss"] for record in part) for part in (records[:quarter], records[-quarter:]))
    fall = (first - last) / abs(first) if first else 0.0
    word = "learning" if fall >= FLAT else "not learning"
    if _is_distillation(records):
        word = ""
    moved = "fell" if fall > 0 else "rose"
    return (
        word,
        f"The loss {moved} by {100 * abs(fall):.1f} % from the first to the last quarter ({first:.4g} to {last:.4g}).",
    )


def _about_data(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    waits = [record["data_wait"] for record in records[-max(1, len(records) // 4) :] if "data_wait" in record]
    if not waits:
        return []
    wait = median(waits)
    if wait >= STARVED:
        advice = "raise data.num_workers, store smaller images, or use a faster disk"
        return [("starved for data", f"{100 * wait:.0f} % of a step's time goes to waiting for its batch: {advice}.")]
    return [("", f"{100 * wait:.0f} % of a step's time goes to waiting for its batch.")]


def _by_spread(run: RunData, records: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    last = records[-1]
    spread, ranks = last.get("feature_std"), [r["rankme"] for r in records if _is_finite(r.get("rankme"))]
    if spread is None or not ranks:
        return "too early to say", "Neither scores nor the spread of the features tell."
    used = last.get("prototypes_used")
    healthy = spread >= 0.2 and ranks[-1] >= max(ranks) / 2 and (used is None or used >= 0.05)
    reason = f"The features' spread is {spread:.2f} of 1, RankMe is {ranks[-1]:.1f}, {max(ranks):.1f} at its highest"
    reason += "." if used is None else f", and {100 * used:.0f} % of the prototypes that could be are in use."
    if healthy and run.settings.get("encoder", {}).get("pretrained"):
        return "undecided", f"{reason} So had its start; labelled images would tell which is better."
    return ("learning" if healthy else "not learning"), reason


def _title(name: str) -> str:
    return {"knn": "k-NN", "linear": "the linear probe"}.get(name, name)
