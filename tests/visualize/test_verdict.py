"""Each rule of the verdict, on runs made up for it."""

import math
from typing import Any

import pytest

from ssl_vit.runs.record import RunData
from ssl_vit.visualize.verdict import assess

HEALTHY = {"teacher_entropy": 3.0, "kl": 0.5, "feature_std": 0.7, "prototypes_used": 0.8, "rankme": 20.0}


def run(records: list[dict[str, Any]], **changes: Any) -> RunData:
    settings = {
        "optim": {"warmup": 0.1, "base_lr": 5e-4},
        "objective": {"num_prototypes": 1024, "anchor": "none"},
        "batch": {"size": 8},
        "encoder": {},
    }
    filled = [
        {"step": 10 * (place + 1), "progress": place / len(records), "data_wait": 0.05, **record}
        for place, record in enumerate(records)
    ]
    return RunData(**{"name": "run", "settings": settings, "records": filled, "evaluations": [], "results": None,
                      "scores": []} | changes)  # fmt: skip


def falling(number: int = 20, **more: Any) -> list[dict[str, Any]]:
    return [{"loss": 1.0 - 0.02 * place, **more} for place in range(number)]


def results(low: float, high: float) -> dict[str, Any]:
    interval = {"difference": (low + high) / 2, "low": low, "high": high}
    return {"step": 200, "trained_minus_untrained": {"knn": interval}}


def test_healthy_features_of_trained_weights_decide_nothing() -> None:
    signs = {"coding_rate": 1.9, "feature_std": 0.6, "projection_rank": 0.5, "rankme": 20.0}
    going_on = run([{"loss": -2.5, **signs}] * 20)
    assert assess(going_on).word == "learning"
    going_on.settings["encoder"]["pretrained"] = "start"
    assert assess(going_on).word == "undecided"
    assert "labelled images would tell" in assess(going_on).reasons[0]


def test_raw_pixels_say_where_a_run_stands_not_whether_it_learns() -> None:
    below = {"knn": {"difference": -0.1, "low": -0.15, "high": -0.05}}
    found = assess(run(falling(), results={**results(0.02, 0.05), "trained_minus_raw_pixels": below}))
    assert found.word == "learning"
    assert any(" below raw pixels (95 % interval -15.0 to -5.0)" in reason for reason in found.reasons)


def test_no_or_few_intervals_are_too_early() -> None:
    assert assess(run([])).word == "too early to say"
    assert assess(run(falling(5))).word == "too early to say"  # one of the five is within the warm-up
    assert "Only 4 log intervals" in assess(run(falling(5))).reasons[0]
    assert assess(run(falling(6))).word == "learning"


def test_a_run_with_a_coding_rate_is_judged_by_the_spread_of_its_features() -> None:
    """Its loss may stand still while it learns; a run without prototypes has no share of them in use."""
    objective = {"loss": "coding_rate", "num_prototypes": "auto"}
    signs = {"coding_rate": 1.9, "feature_std": 0.6, "projection_rank": 0.5, "rankme": 20.0}
    settings = {"optim": {"warmup": 0.1}, "objective": objective, "batch": {"size": 256}}
    found = assess(run([{"loss": -2.5, **signs}] * 20, settings=settings))
    assert found.word == "learning"
    assert found.reasons[0] == "The features' spread is 0.60 of 1, RankMe is 20.0, 20.0 at its highest."
    fallen = [{"loss": -2.5, **signs, "rankme": rank} for rank in [20.0] * 15 + [4.0] * 5]
    assert assess(run(fallen, settings=settings)).word == "not learning"
    found = assess(run([{"loss": -2.5, **signs, "projection_rank": 0.05}] * 20, settings=settings))
    assert found.word == "collapsing"
    assert "a lower objective.coding_coeff" in found.reasons[0]


def test_a_loss_that_is_not_finite_is_diverged() -> None:
    assert assess(run([*falling(), {"loss": None}])).word == "diverged"
    assert assess(run([*falling(), {"loss": math.nan}])).word == "diverged"


def test_a_falling_loss_is_learning_and_a_flat_one_is_not() -> None:
    assert assess(run(falling())).word == "learning"
    flat = assess(run([{"loss": 1.0 - 0.0001 * place} for place in range(20)]))
    assert flat.word == "not learning"
    assert flat.reasons[0].startswith("The loss fell by 0.1 %")


def test_objectives_without_prototypes_are_judged_by_their_projections() -> None:
    assert assess(run(falling(feature_std=0.6, projection_rank=0.7))).word == "learning"
    collapsed = assess(run(falling(feature_std=0.6, projection_rank=0.05)))
    assert collapsed.word == "collapsing"
    assert collapsed.reasons[0].startswith("The projections use few dimensions (5.0%")


@pytest.mark.parametrize(("wait", "word"), [(0.39, "learning"), (0.41, "starved for data")])
def test_a_run_that_waits_is_starved(wait: float, word: str) -> None:
    found = assess(run(falling(data_wait=wait)))
    assert found.word == word
    if word == "starved for data":
        assert found.reasons[0].startswith(
            "41 % of a step's time goes to waiting for its batch: raise data.num_workers"
        )


def test_three_intervals_in_a_row_are_a_collapse_and_two_are_not() -> None:
    collapsed = {**HEALTHY, "feature_std": 0.01}
    healthy = [{"loss": 5.0, **HEALTHY}] * 20
    found = assess(run([*healthy, *[{"loss": 5.0, **collapsed}] * 3]))
    assert found.word == "collapsing"
    assert "nearly the same features" in found.reasons[0]
    assert assess(run([*healthy, *[{"loss": 5.0, **collapsed}] * 2])).word != "collapsing"
    uniform = {**HEALTHY, "teacher_entropy": math.log(1024), "kl": 0.0}
    assert assess(run([*healthy, *[{"loss": 6.9, **uniform}] * 3])).word == "collapsing"


def test_scores_at_the_end_outweigh_the_loss() -> None:
    assert assess(run(falling(), results=results(0.01, 0.05))).word == "learning"
    below = assess(run(falling(), results=results(-0.05, -0.01)))
    assert below.word == "not learning"
    assert "3.0 points below untrained" in below.reasons[0]
    flat = [{"loss": 1.0}] * 20
    assert assess(run(flat, results=results(0.01, 0.05))).word == "learning"
    assert assess(run(flat, results=results(-0.01, 0.05))).word == "not learning"  # undecided: the loss decides


def test_a_rising_knn_is_learning_whatever_the_loss() -> None:
    flat = [{"loss": 1.0}] * 20
    assert (
        assess(run(flat, evaluations=[{"step": 1, "eval_knn": 0.5}, {"step": 2, "eval_knn": 0.52}])).word == "learning"
    )
    same = [{"step": 1, "eval_knn": 0.5}, {"step": 2, "eval_knn": 0.505}]
    assert assess(run(flat, evaluations=same)).word == "not learning"


def test_a_run_below_the_weights_that_it_started_from_is_not_learning() -> None:
    scores = [{"step": 0, "eval_knn": 0.7}, {"step": 10, "eval_knn": 0.5}, {"step": 20, "eval_knn": 0.6}]
    going_on = run(falling(), evaluations=scores)
    assert assess(going_on).word == "learning"  # of fresh weights
    going_on.settings["encoder"]["pretrained"] = "start"
    found = assess(going_on)
    assert found.word == "not learning"
    assert found.reasons[0].startswith(
        "k-NN is 60.0 %, below the 70.0 % of the weights that the run started from: lower "
    )


def test_of_self_distillation_the_spread_decides_and_not_the_loss() -> None:
    rising = [{"loss": 4.0 + 0.02 * place, **HEALTHY} for place in range(20)]
    assert assess(run(rising)).word == "learning"
    narrow = [{"loss": 4.0, **HEALTHY, "rankme": 20.0 - 0.9 * place} for place in range(20)]
    found = assess(run(narrow))
    assert found.word == "not learning"
    assert "RankMe is 2.9, 18.2 at its highest" in found.reasons[0]
    few = assess(run([{"loss": 4.0, **HEALTHY, "prototypes_used": 0.01}] * 20))
    assert few.word == "not learning"
    assert "1 % of the prototypes" in few.reasons[0]
