import json

import numpy as np
import pytest

from ssl_vit.evaluation.scores import (
    Score,
    format_classes,
    format_table,
    paired_interval,
    per_class,
    scores_to_json,
    wilson_interval,
)


def test_wilson_interval_has_the_textbook_values():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_score_counts():
    score = Score.of(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 0, 0, 1]))
    assert score.accuracy == pytest.approx(0.8)
    assert score.balanced_accuracy == pytest.approx(0.75)
    assert score.correct.tolist() == [True, True, True, False, True]
    assert score.n == 5
    assert (score.low, score.high) == wilson_interval(4, 5)


def test_paired_interval_by_hand():
    a = np.array([True] * 60 + [False] * 40)
    b = np.array([True] * 50 + [False] * 50)
    difference, low, high = paired_interval(a, b)
    assert difference == pytest.approx(0.1)
    # Agresti and Min: 10.5 differences of 1, 0.5 of -1 and 91 of 0.
    half = 1.96 * np.sqrt(11 - 10**2 / 102) / 102
    assert (low, high) == pytest.approx((10 / 102 - half, 10 / 102 + half), abs=1e-4)
    assert paired_interval(b, a) == pytest.approx((-0.1, -high, -low))


def test_a_paired_interval_of_few_images_is_wide():
    both, none = np.ones(2, bool), np.zeros(2, bool)
    assert paired_interval(both, none) == pytest.approx((1.0, -0.193, 1.0), abs=1e-3)
    assert paired_interval(both, both) == pytest.approx((0.0, -0.49, 0.49), abs=1e-3)
    difference, low, high = paired_interval(both[:1], none[:1])
    assert (difference, high) == (1.0, 1.0)
    assert low < -0.4
    # As narrow as without the added images where there are many.
    a, b = np.arange(1000) < 600, np.arange(1000) < 500
    half = 1.96 * np.std(a * 1.0 - b) / np.sqrt(1000)
    assert paired_interval(a, b)[1:] == pytest.approx((0.1 - half, 0.1 + half), abs=5e-4)


@pytest.mark.parametrize("n", [5, 10, 30])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_paired_interval_excludes_no_difference_as_rarely_as_it_says(n: int, share: float):
    """Without a true difference 0 may lie outside 5 % of the intervals, whatever share of images the two differ on."""
    rng = np.random.default_rng(0)
    outside = 0
    for _ in range(2000):
        only = rng.choice(3, n, p=[share / 2, share / 2, 1 - share])
        _, low, high = paired_interval(only == 0, only == 1)
        outside += not low <= 0 <= high
    assert outside / 2000 < 0.065


def test_the_spread_of_seeds_widens_a_paired_interval():
    a = np.array([True] * 60 + [False] * 40)
    seeds = [np.array([True] * right + [False] * (100 - right)) for right in (40, 50, 54)]
    difference, low, high = paired_interval(a, *seeds)
    assert difference == pytest.approx(0.6 - 0.48)
    values = np.append(a - np.mean(seeds, axis=0), [0, 0])
    within = (np.square(values).sum() + 1) / 102 - values.mean() ** 2
    half = 1.96 * np.sqrt(within / 102 + np.var([0.4, 0.5, 0.54], ddof=1) / 3)
    assert (low, high) == pytest.approx((12 / 102 - half, 12 / 102 + half), abs=1e-4)
    assert paired_interval(a, seeds[1], seeds[1])[1:] == pytest.approx(paired_interval(a, seeds[1])[1:])


def test_paired_interval_needs_the_same_images():
    with pytest.raises(ValueError, match="5 images with 4"):
        paired_interval(np.ones(5, bool), np.ones(4, bool))
    with pytest.raises(ValueError, match="0 images with 0"):
        paired_interval(np.ones(0, bool), np.ones(0, bool))


def test_table_is_aligned_and_numbers_survive_json():
    good = Score.of(np.zeros(1000, dtype=np.int64), np.array([0] * 999 + [1]))
    poor = Score.of(np.zeros(50, dtype=np.int64), np.arange(50) // 5)
    rows = {"pixels": {"knn": poor, "linear": poor}, "trained encoder": {"knn": good, "linear": poor}}
    lines = format_table(rows, {"knn": "k-NN (k=10)"}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["accuracy,", "%", "k-NN", "(k=10)", "linear", "n"]
    assert lines[2].split() == ["pixels", "10.0", "[4.3,", "21.4]", "10.0", "[4.3,", "21.4]", "50"]
    assert lines[3].split() == [
        "trained",
        "encoder",
        "99.9",
        "[99.4,",
        "100.0]",
        "10.0",
        "[4.3,",
        "21.4]",
        "1000",
    ]
    numbers = json.loads(json.dumps(scores_to_json(rows)))
    assert numbers["trained encoder"]["knn"]["accuracy"] == 0.999
    assert numbers["pixels"]["linear"] == {
        "accuracy": 0.1,
        "low": poor.low,
        "high": poor.high,
        "balanced_accuracy": 0.1,
        "n": 50,
    }


def test_classes_one_by_one():
    labels, predictions = np.array([0, 0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 1, 0])
    classes = per_class(Score.of(labels, predictions), ("ant", "bee", "cat", "dog"))
    assert [item._asdict() for item in classes] == [
        {"name": "ant", "n": 4, "recall": 0.5, "precision": 2 / 3, "confused_with": "bee"},
        {"name": "bee", "n": 2, "recall": 1.0, "precision": 0.5, "confused_with": None},
        {"name": "cat", "n": 1, "recall": 0.0, "precision": None, "confused_with": "ant"},
    ]
    lines = format_classes(classes).splitlines()
    assert lines[2].split() == ["ant", "4", "50.0", "66.7", "bee"]
    assert lines[4].split() == ["cat", "1", "0.0", "-", "ant"]
    assert "the 2 classes of lowest recall, of 3" in format_classes(classes, most=2)
    assert "bee" not in [line.split()[0] for line in format_classes(classes, most=2).splitlines()]


def test_a_column_that_a_line_lacks_is_a_dash():
    score = Score.of(np.array([0, 1]), np.array([0, 1]))
    lines = format_table({"a": {"x": score}, "b": {"x": score, "y": score}}).splitlines()
    assert lines[2].split()[-2:] == ["-", "2"]
