import json
from dataclasses import dataclass, replace
from pathlib import Path
from unicodedata import normalize

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ssl_vit.data.augment.evaluation import EvalTransform
from ssl_vit.data.sources.source import DataConfig, Source, open_source
from ssl_vit.evaluation import evaluate
from ssl_vit.evaluation.evaluate import (
    EvaluationConfig,
    align_classes,
    evaluate_encoder,
    evaluate_features,
    evaluate_pixels,
    split_sources,
)
from ssl_vit.evaluation.features import EncodeSettings
from ssl_vit.evaluation.scores import (
    Score,
    format_classes,
    format_table,
    paired_interval,
    per_class,
    scores_to_json,
    wilson_interval,
)
from tests.specs import grey


@dataclass(frozen=True, eq=False)
class Stripes(Source):
    """A source of dark noise with a bright stripe whose height tells the class."""

    def image(self, index: int, num_channels: int) -> Tensor:
        picture = np.random.default_rng(index).integers(0, 50, (num_channels, 32, 32), dtype=np.uint8)
        top = 4 + 8 * self.labels[index]
        picture[:, top : top + 8] += 200
        return torch.from_numpy(picture)


def source(labels, *, groups=None, names=("a", "b", "c"), name="stripes") -> Stripes:
    rows = datasets.Dataset.from_dict({"image": [""] * (12 if labels is None else len(labels))})
    labels = None if labels is None else np.asarray(labels, dtype=np.int64)
    return Stripes(name, rows, "image", labels, names if labels is not None else (), groups, None)


def clusters(labels, spread=0.3, seed=0):
    noise = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(seed))
    return torch.eye(5)[np.maximum(labels, 0)] + spread * noise


ENCODING = EvalTransform((32, 32), grey(std=0.25)), EncodeSettings(8, torch.device("cpu"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("every_steps", 0),
        ("k", 0),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("folds", 1),
        ("crop_pct", 0.0),
        ("crop_pct", 1.1),
        ("batch_size", 0),
        ("max_images", -3),
    ],
)
def test_config_refuses_nonsense(field, value):
    with pytest.raises(ValueError, match=f"^{field}={value!r}: "):
        EvaluationConfig(**{field: value})


def test_config_refuses_an_unknown_feature():
    config = EvaluationConfig()
    object.__setattr__(config, "feature", "pooled")  # past the type check that tests add
    with pytest.raises(ValueError, match=r"^feature='pooled': .*'cls' or 'mean'"):
        config.__post_init__()


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
    half = 1.96 * np.sqrt(0.1 * 0.9 / 99)  # 10 differences of 1, 90 of 0
    assert (low, high) == pytest.approx((0.1 - half, 0.1 + half), abs=1e-4)
    assert paired_interval(a, a) == (0, 0, 0)
    assert paired_interval(b, a)[0] == pytest.approx(-0.1)


def test_the_spread_of_seeds_widens_a_paired_interval():
    a = np.array([True] * 60 + [False] * 40)
    seeds = [np.array([True] * right + [False] * (100 - right)) for right in (40, 50, 54)]
    difference, low, high = paired_interval(a, *seeds)
    assert difference == pytest.approx(0.6 - 0.48)
    within = np.var(a - np.mean(seeds, axis=0), ddof=1) / 100
    half = 1.96 * np.sqrt(within + np.var([0.4, 0.5, 0.54], ddof=1) / 3)
    assert (low, high) == pytest.approx((0.12 - half, 0.12 + half), abs=1e-4)
    assert paired_interval(a, seeds[1], seeds[1])[1:] == pytest.approx(paired_interval(a, seeds[1])[1:])


def test_paired_interval_needs_the_same_pictures():
    with pytest.raises(ValueError, match="5 pictures with 4"):
        paired_interval(np.ones(5, bool), np.ones(4, bool))


def test_every_picture_is_predicted_once_while_held_out(monkeypatch):
    """Each feature is the number of its row, so that the probe can tell which rows it was given."""
    labels = np.random.default_rng(0).integers(0, 3, 61)
    predicted = []

    def remember(train, targets, test, **settings):
        train_rows, test_rows = train[:, 0].long(), test[:, 0].long()
        assert not np.intersect1d(train_rows, test_rows).size
        assert len(train_rows) + len(test_rows) == 61
        assert torch.equal(targets, torch.from_numpy(labels)[train_rows])
        predicted.extend(test_rows.tolist())
        return torch.from_numpy(labels)[test_rows]

    monkeypatch.setattr(evaluate, "logistic_predict", remember)
    scores = evaluate_features(torch.arange(61.0)[:, None], labels, folds=4)
    assert sorted(predicted) == list(range(61))
    assert scores["linear"].correct.all()  # predictions come back to their own rows


def test_cross_validation_knows_clusters_and_is_at_chance_without():
    labels = np.arange(150) % 5
    for features, low, high in ((clusters(labels), 0.9, 1.0), (clusters(np.zeros_like(labels)), 0.05, 0.35)):
        for score in evaluate_features(features, labels).values():
            assert low <= score.accuracy <= high
            assert score.n == 150


def test_only_the_first_labelled_row_of_a_group_counts():
    labels = np.repeat(np.arange(40) % 2, 3)
    labels[0] = -1
    split = split_sources(source(labels, groups=np.repeat(np.arange(40), 3)), None, max_images=None)
    assert np.array_equal(split.rows, np.concatenate([[1], np.arange(3, 120, 3)]))
    assert np.array_equal(split.labels, labels[split.rows])


def test_the_seed_decides_the_folds():
    labels = np.arange(60) % 3
    features = clusters(labels, spread=1.0)
    first, again, other = (evaluate_features(features, labels, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[probe].correct, again[probe].correct) for probe in first)
    assert any(not np.array_equal(first[probe].correct, other[probe].correct) for probe in first)


def test_train_and_test_set():
    train, test = np.arange(60) % 3, np.arange(33) % 3
    flipped = (test + 1) % 3  # all labels of the test set wrong: no test row was learned from
    for labels, accuracy in ((test, 1.0), (flipped, 0.0)):
        scores = evaluate_features(
            clusters(train, 0.1), train, test_features=clusters(test, 0.1, seed=1), test_labels=labels
        )
        for score in scores.values():
            assert (score.accuracy, score.n) == (accuracy, 33)


def test_a_class_with_fewer_pictures_than_folds_still_works():
    labels = np.array([0] * 20 + [1] * 20 + [2])
    scores = evaluate_features(clusters(labels), labels)
    for score in scores.values():
        assert score.n == 41
        assert not score.correct[-1]  # nothing to learn it from while it is held out
        assert score.accuracy > 0.8


def test_features_that_cannot_be_evaluated_are_refused():
    labels = np.arange(10) % 2
    features = clusters(labels)
    broken = torch.where(features > 1, torch.nan, features)
    with pytest.raises(ValueError, match="NaN"):
        evaluate_features(broken, labels)
    with pytest.raises(ValueError, match="NaN"):
        evaluate_features(features, labels, test_features=broken, test_labels=labels)


def test_evaluate_encoder_and_pixels(tiny_encoder):
    labels = np.arange(30) % 3
    config = EvaluationConfig(folds=3, k=3)
    encoder_scores = evaluate_encoder(tiny_encoder, source(labels), None, config, *ENCODING)
    pixel_scores = evaluate_pixels(source(labels), None, config, num_channels=3)
    for scores in (encoder_scores, pixel_scores):
        assert {probe: (score.n, score.accuracy) for probe, score in scores.items()} == {
            "knn": (30, 1.0),
            "linear": (30, 1.0),
        }
    tested = evaluate_pixels(source(labels), source([2, -1, 0, 1]), config, num_channels=1)
    assert (tested["knn"].n, tested["linear"].accuracy) == (3, 1.0)


def test_the_configured_feature_is_used(tiny_encoder, monkeypatch):
    used = []
    monkeypatch.setattr(
        evaluate, "extract_features", lambda *args, **kw: {"cls": torch.ones(6, 1, 2), "mean": torch.zeros(6, 2)}
    )
    monkeypatch.setattr(evaluate, "evaluate_features", lambda features, *args, **kw: used.append(features) or {})
    for feature in ("cls", "mean"):
        config = EvaluationConfig(feature=feature)
        evaluate_encoder(tiny_encoder, source([0, 1, 2] * 2), None, config, *ENCODING)
    assert [features.mean() for features in used] == [1, 0]


def test_subset_is_seeded_stratified_and_decodes_nothing_else(monkeypatch):
    labels = np.repeat([0, 1, 2, -1], [80, 80, 40, 50])
    groups = np.arange(250) // 2
    seen = []

    def remember(source, rows, *args, **settings):
        seen.append(rows)
        return {"mean": torch.eye(3)[labels[rows]]}

    monkeypatch.setattr(evaluate, "pixel_features", remember)
    monkeypatch.setattr(evaluate, "logistic_predict", lambda train, targets, test, **kw: torch.zeros(len(test)).long())
    for seed in (0, 0, 1):
        scores = evaluate_pixels(
            source(labels, groups=groups), None, EvaluationConfig(max_images=20), num_channels=3, seed=seed
        )
        assert scores["knn"].n == 20
    assert np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2])
    assert np.bincount(labels[seen[0]]).tolist() == [8, 8, 4]
    assert (seen[0] % 2 == 0).all()  # the first row of each group
    assert (np.diff(seen[0]) > 0).all()


def test_classes_are_matched_however_their_letters_are_composed():
    train, test = source([0, 1], names=("caf\u00e9", "pub")), source([0, 1, -1], names=("pub", "cafe\u0301"))
    aligned = align_classes(train, test)
    assert aligned.labels is not None
    assert (aligned.labels.tolist(), aligned.class_names) == ([1, 0, -1], train.class_names)


def test_sources_that_cannot_be_evaluated_are_refused_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr(Stripes, "image", None)
    good, config = source([0, 1, 2] * 4), EvaluationConfig()
    cases = [
        (source(None), None, "^evaluation.source='stripes': has no labels.*: name a labelled source"),
        (source([-1] * 5), None, "^evaluation.source='stripes': has no labels"),
        (good, source(None, name="t"), "^evaluation.test_source='t': has no labels"),
        (source([1] * 5), None, "class 'b': .*at least two classes"),
        (
            source([0, 1, 2]),
            None,
            "^evaluation.source='stripes': each of the 3 .* has a class of its own.*label_column",
        ),
        (source([0, 1] * 4), good, "lacks: 'c'; add"),
        (good, source([0, 1], names=("c", "d"), name="t"), "source='t': .*'stripes' lacks: 'd'; there it is 'a', 'b'"),
    ]
    for train, test, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate_pixels(train, test, config, num_channels=3)


def test_classes_of_the_test_set_are_matched_by_name():
    train = source([0, 1, 2] * 4)
    for labels, names, expected in (
        ([0, 1, 1, -1], ("b", "c"), [1, 2, 2]),  # lacks the first class
        ([0, 1, 2], ("c", "a", "b"), [2, 0, 1]),  # another order
        ([0, 3], ("a", "d", "e", "b"), [0, 1]),  # names without pictures
    ):
        split = split_sources(train, source(labels, names=names), max_images=None)
        assert split.test_labels is not None
        assert split.test_labels.tolist() == expected
        assert split.class_names == ("a", "b", "c")


def test_one_picture_of_each_class_is_enough_to_learn_from_where_there_is_a_test_set():
    split = split_sources(source([0, 1, 2]), source([2, 2]), max_images=None)
    assert split.test_labels is not None
    assert split.test_labels.tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"each of the 3 labelled pictures.*raise evaluation\.max_images"):
        split_sources(source([0, 1, 2] * 4), None, max_images=3)


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


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (
            ["a.png", "b.png"],
            "images lie in .* itself, and classes are the folders that images lie in; classes are folders, one",
        ),
        (["cat/a.png", "cat/deep/b.png"], "all images lie in one folder, .*cat; name that one"),
        (["cat/a.png", "dog/b.png", "stray.png"], "1 image, such as stray.png, lies beside the folders of"),
    ],
)
def test_why_a_folder_has_no_labels(tmp_path: Path, files: list[str], why: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / file)
    with pytest.raises(ValueError, match=rf"^data.source='.*': has no labels, and evaluating needs them: {why}"):
        split_sources(open_source(DataConfig(str(tmp_path))), None, None, setting="data.source")


def test_why_columns_are_no_labels(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    rows = {"image": [Image.new("RGB", (4, 4))] * 2, "species": ["a", "b"]}
    kinds = datasets.Features({"image": datasets.Image(), "species": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, kinds).to_parquet(str(file))
    for source in (str(file), {str(file): 1.0, str(tmp_path): 1.0}):
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
        why = "there are species: name one in data.label_column" if isinstance(source, str) else "none of the sources"
        with pytest.raises(ValueError, match=why):
            split_sources(open_source(DataConfig(source)), None, None)


def test_class_names_with_accents_are_matched_however_they_are_written() -> None:
    names = [normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]
    ours, theirs = source([0, 1]), source([1, 0])
    aligned = align_classes(replace(ours, class_names=(names[0], "b")), replace(theirs, class_names=("b", names[1])))
    assert aligned.labels.tolist() == [0, 1]
