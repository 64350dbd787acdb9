"""Which of two runs is better, on results made up for it."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.report import main
from ssl_vit.core.writing import replace_json
from ssl_vit.evaluation.scores import newcombe_interval
from ssl_vit.runs.record import RunData
from ssl_vit.visualize.comparison import compare


def run(knn: float | None, linear: float = 0.5, n: int = 1000, **changes: Any) -> RunData:
    """A run judged by n images; changes of settings are given as `section__name`."""
    settings: dict[str, Any] = {"seed": 0, "data": {"source": "leaves"}, "evaluation": {"max_images": 10_000}}
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (settings[section] if section else settings)[key] = value
    accuracies = {"knn": knn, "linear": linear}
    trained = {name: {"accuracy": value, "n": n} for name, value in accuracies.items()}
    results = None if knn is None else {"step": 9, "scores": {"raw pixels": {"knn": {"accuracy": 0.9, "n": 9}},
                                                               "trained": trained}}  # fmt: skip
    return RunData("run", settings, [], [], results, [], fingerprint=settings["data"].get("fingerprint", "1a2b"))


def told(a: RunData, b: RunData) -> str:
    [sentence] = compare([a, b], ["fern", "moss"])
    return sentence


def test_the_interval_is_newcombes() -> None:
    # Table II of the paper, method 10.
    assert newcombe_interval(56 / 70, 70, 48 / 80, 80) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert newcombe_interval(1.0, 10, 0.0, 10) == pytest.approx((1.0, 0.6075, 1.0), abs=5e-5)


@pytest.mark.parametrize(
    ("knn", "linear", "verdict"),
    [
        ((0.60, 0.50), (0.55, 0.54), "fern is better than moss: k-NN 60.0 and 50.0 %, difference +10.0 points"),
        ((0.50, 0.60), (0.40, 0.60), "moss is better than fern: k-NN 50.0 and 60.0 %, difference -10.0 points"),
        ((0.51, 0.50), (0.50, 0.52), "These numbers cannot tell which of fern and moss is better: k-NN 51.0 and 50.0"),
        ((0.60, 0.50), (0.40, 0.50), "Each of fern and moss is better by another score: k-NN"),
    ],
)
def test_the_better_run_is_named_where_an_interval_leaves_zero_out(
    knn: tuple[float, float], linear: tuple[float, float], verdict: str
) -> None:
    sentence = told(run(knn[0], linear[0]), run(knn[1], linear[1]))
    assert sentence.startswith(verdict)
    assert "linear probe" in sentence
    assert sentence.endswith("of 1,000 images.")


def test_the_same_difference_tells_more_of_more_images() -> None:
    assert told(run(0.52, n=500), run(0.50, n=500)).startswith("These numbers cannot tell")
    assert told(run(0.52, n=9000), run(0.50, n=9000)).startswith("fern is better")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n": 900}, "n of k-NN 1000 and 900"),
        ({"data__fingerprint": "ffff"}, "images 1a2b and ffff"),
        ({"evaluation__source": "ferns"}, "images 1a2b and ferns"),
        ({"evaluation__test_split": "val"}, "evaluation.test_split None and val"),
        ({"evaluation__k": 5}, "evaluation.k None and 5"),
        ({"evaluation__crop_pct": 1.0}, "evaluation.crop_pct None and 1.0"),
        ({"data__split": "train[:10%]"}, "data.split None and train[:10%]"),
    ],
)
def test_runs_that_were_not_judged_alike_are_not_compared(changes: dict[str, Any], reason: str) -> None:
    sentence = told(run(0.9), run(0.1, **changes))
    assert sentence.startswith("fern and moss cannot be compared, since they were not judged alike: ")
    assert reason in sentence


def test_the_seed_counts_where_it_draws_the_images() -> None:
    assert told(run(0.9), run(0.1, seed=1)).startswith("fern is better")
    drawn = [run(0.9, n=10_000, seed=seed) for seed in (0, 1)]
    assert "seed 0 and 1" in told(*drawn)


def test_what_belongs_to_the_backbone_does_not_matter() -> None:
    other = run(0.1, evaluation__feature="cls", data__mean=[0.5], evaluation__batch_size=8, evaluation__every_steps=9)
    assert told(run(0.9), other).startswith("fern is better")


def test_without_scores_there_is_nothing_to_compare() -> None:
    assert told(run(0.5), run(None)) == "fern and moss cannot be compared: no scores at the end of moss."
    assert told(run(None), run(None)).endswith("at the end of fern and moss.")
    assert compare([run(0.5)], ["fern"]) == []
    names = ["fern", "moss", "ivy"]
    sentences = compare([run(0.9), run(0.5), run(0.1)], names)
    for pair, sentence in zip(combinations(names, 2), sentences, strict=True):
        assert sentence.startswith(f"{pair[0]} is better than {pair[1]}")


def test_the_script_prints_it_and_the_page_has_it_on_top(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, knn in (("a<b", 0.9), ("c", 0.1)):
        made = run(knn)
        (tmp_path / name).mkdir()
        settings = {**made.settings, "encoder": {"arch": "x"}, "batch": {"size": 8}, "optim": {}, "objective": {}}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(settings))
        scores = {"low": 0.0, "high": 1.0, "balanced_accuracy": 0.5}
        for columns in made.results["scores"].values():
            for score in columns.values():
                score |= scores
        replace_json(tmp_path / name / "results.json", made.results)
    out = tmp_path / "report.html"
    assert main([str(tmp_path / "a<b"), str(tmp_path / "c"), "--out", str(out), "--panel_images", "0"]) == 0
    assert "a<b is better than c: k-NN 90.0 and 10.0 %" in capsys.readouterr().out
    page = out.read_text()
    assert page.index("a&lt;b is better than c") < page.index('<article class="card">')
