from dataclasses import dataclass

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_vit.data.augment.evaluation import EvalTransform
from ssl_vit.data.sources.source import Source
from ssl_vit.evaluation import evaluate
from ssl_vit.evaluation.evaluate import (
    EvaluationConfig,
    evaluate_encoder,
    evaluate_features,
    evaluate_pixels,
)
from ssl_vit.evaluation.features import EncodeSettings
from tests.specs import grey


@dataclass(frozen=True, eq=False)
class Stripes(Source):
    """A source of dark noise with a bright stripe whose height tells the class."""

    def image(self, index: int, num_channels: int) -> Tensor:
        image = np.random.default_rng(index).integers(0, 50, (num_channels, 32, 32), dtype=np.uint8)
        top = 4 + 8 * self.labels[index]
        image[:, top : top + 8] += 200
        return torch.from_numpy(image)


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


def test_every_image_is_predicted_once_while_held_out(monkeypatch):
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


def test_a_class_with_fewer_images_than_folds_still_works():
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
