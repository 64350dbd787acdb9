import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ssl_vit.evaluation import logistic
from ssl_vit.evaluation.logistic import logistic_predict


def blobs(n, d=12, num_classes=4, spread=1.0, seed=0):
    """Gaussian classes in features of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, d, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(num_classes, (n,), generator=generator)
    features = centres[labels] + spread * torch.randn(n, d, generator=generator)
    return features * torch.logspace(-2, 2, d) + 3, labels


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_agrees_with_scikit_learn(l2):
    (train, labels), (test, _) = blobs(300, spread=2.0), blobs(2000, spread=2.0, seed=1)
    scaler = StandardScaler().fit(train.double())
    theirs = LogisticRegression(C=1 / (l2 * len(train)), tol=1e-10, max_iter=10_000)
    theirs.fit(scaler.transform(train.double()), labels)
    predicted = logistic_predict(train, labels, test, num_classes=4, l2=l2)
    # Two classes can be a hair apart at one of 2,000 rows; the standardisation has a small epsilon besides.
    assert (predicted.numpy() == theirs.predict(scaler.transform(test.double()))).mean() > 0.998


def test_weights_are_those_of_scikit_learn():
    features, labels = blobs(200, spread=2.0)
    features, _ = logistic._standardise(features, features)
    theirs = LogisticRegression(C=1 / (0.01 * 200), tol=1e-12, max_iter=10_000).fit(features, labels)
    ours = logistic._fit(features, labels, 0.01, features.new_zeros(4, 13), tolerance=1e-9).numpy()
    np.testing.assert_allclose(ours[:, :-1], theirs.coef_, atol=1e-5)
    np.testing.assert_allclose(ours[:, -1], theirs.intercept_ - theirs.intercept_.mean(), atol=1e-5)


def test_chunks_add_up_to_the_same_weights(monkeypatch):
    features, labels = blobs(50)
    features, _ = logistic._standardise(features, features)
    found = []
    for chunk_rows in (7, 1000):
        monkeypatch.setattr(logistic, "_CHUNK_ROWS", chunk_rows)
        found.append(logistic._fit(features, labels, 0.3, features.new_zeros(4, 13), tolerance=1e-9))
    torch.testing.assert_close(*found)


def test_separable_data_is_learned_completely():
    (train, labels), (test, test_labels) = blobs(200, spread=0.1), blobs(500, spread=0.1, seed=1)
    assert torch.equal(logistic_predict(train, labels, test, num_classes=4), test_labels)


def test_shuffled_labels_give_chance():
    (train, labels), (test, test_labels) = blobs(400), blobs(2000, seed=1)
    shuffled = labels[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    accuracy = (logistic_predict(train, shuffled, test, num_classes=4) == test_labels).float().mean()
    assert 0.15 < accuracy < 0.35


def test_strength_is_chosen_to_generalise():
    """Some features need a strong penalty, or their noise is fitted; others a weak one, for large weights."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2100) % 2
    noisy = torch.randn(2100, 30, generator=generator) + 0.4 * labels[:, None]
    # The class is in the small difference of two features that share a large variation.
    shared = torch.randn(2100, 1, generator=generator)
    subtle = torch.cat([shared, shared + 0.1 * (labels[:, None] - 0.5)], dim=1)

    def accuracy(features, l2):
        predicted = logistic_predict(features[:100], labels[:100], features[100:], num_classes=2, l2=l2)
        return (predicted == labels[100:]).float().mean()

    assert accuracy(noisy, None) > accuracy(noisy, 1e-5) + 0.05
    assert accuracy(subtle, None) > accuracy(subtle, 10.0) + 0.05


def test_the_test_set_has_no_part_in_the_fit():
    (train, labels), (test, _) = blobs(100, spread=2.0), blobs(300, spread=2.0, seed=1)
    alone = logistic_predict(train, labels, test[:50], num_classes=4)
    together = logistic_predict(train, labels, torch.cat([test[:50], 1000 * test[50:]]), num_classes=4)
    assert torch.equal(alone, together[:50])


def test_same_call_same_result_even_under_inference_mode():
    (train, labels), (test, _) = blobs(150, spread=2.0), blobs(500, spread=2.0, seed=1)
    torch.manual_seed(0)
    first = logistic_predict(train, labels, test, num_classes=4)
    torch.manual_seed(1)
    with torch.inference_mode():
        second = logistic_predict(train.clone(), labels, test.clone(), num_classes=4)
    assert torch.equal(first, second)


def test_classes_without_rows_are_never_predicted():
    train, labels = blobs(80)
    labels = torch.where(labels >= 2, 7, 3)
    assert set(logistic_predict(train, labels, train, num_classes=9).tolist()) == {3, 7}
    assert logistic_predict(train, torch.full_like(labels, 5), train, num_classes=9).unique().tolist() == [5]


def test_a_single_row_of_each_class_is_enough():
    train = torch.eye(3)
    assert logistic_predict(train, torch.tensor([2, 0, 1]), train, num_classes=3).tolist() == [2, 0, 1]


def test_bad_input_is_refused():
    features = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="num_classes is 3"):
        logistic_predict(features, torch.tensor([0, 1, 3]), features, num_classes=3)
    with pytest.raises(ValueError, match="range from -1"):
        logistic_predict(features, torch.tensor([0, -1, 1]), features, num_classes=3)
    with pytest.raises(ValueError, match="at least one"):
        logistic_predict(features[:0], torch.tensor([], dtype=torch.int64), features, num_classes=3)
