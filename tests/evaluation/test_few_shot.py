import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier, RidgeClassifierCV

from ssl_vit.evaluation import few_shot as module
from ssl_vit.evaluation.few_shot import few_shot, ridge_predict


def blobs(n: int, d: int, num_classes: int, seed: int = 0, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, d, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % num_classes
    return (centres[labels] + spread * torch.randn(n, d, generator=generator)).double() + 3, labels


@pytest.mark.parametrize(("n", "d"), [(200, 10), (30, 50), (20, 20)])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_equals_scikit_learns(n: int, d: int, num_classes: int) -> None:
    (train, labels), (test, _) = blobs(n, d, num_classes), blobs(500, d, num_classes, seed=1)
    for alpha in (1e-2, 1.0, 100.0):
        theirs = RidgeClassifier(alpha=alpha).fit(train, labels).predict(test)
        assert np.array_equal(ridge_predict(train, labels, test, alphas=[alpha]).numpy(), theirs)


@pytest.mark.parametrize(("n", "d"), [(200, 10), (30, 50)])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_the_penalty_is_the_one_that_scikit_learn_picks(n: int, d: int, num_classes: int) -> None:
    alphas = [1e-2, 1.0, 10.0, 1e2, 1e3]
    (train, labels), (test, _) = blobs(n, d, num_classes), blobs(500, d, num_classes, seed=1)
    theirs = RidgeClassifierCV(alphas=alphas).fit(train, labels)
    assert np.array_equal(ridge_predict(train, labels, test, alphas=alphas).numpy(), theirs.predict(test))
    # Another penalty would have predicted otherwise, so that the test can tell.
    others = [ridge_predict(train, labels, test, alphas=[alpha]).numpy() for alpha in alphas if alpha != theirs.alpha_]
    assert not all(np.array_equal(other, theirs.predict(test)) for other in others)


def test_classes_keep_their_numbers() -> None:
    train, labels = blobs(40, 5, 2, spread=0.1)
    assert set(ridge_predict(train, labels * 7 + 2, train, alphas=[1.0]).tolist()) == {2, 9}
    assert ridge_predict(train, torch.full((40,), 4), train, alphas=[1.0]).tolist() == [4] * 40
    with pytest.raises(ValueError, match="at least one training row"):
        ridge_predict(train[:0], labels[:0], train, alphas=[1.0])


def test_so_many_of_each_class_are_drawn_and_only_others_are_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each feature tells its row."""
    labels = np.array([0] * 30 + [1] * 17 + [2] * 6)
    features = torch.nn.functional.pad(torch.arange(53.0)[:, None], (0, 1), value=53.0)
    seen = []

    def remember(train, targets, test, **settings):
        rows = (train[:, 0] / train[:, 1] * 53).round().long()
        tested = (test[:, 0] / test[:, 1] * 53).round().long()
        assert sorted([*rows.tolist(), *tested.tolist()]) == list(range(53))
        seen.append(rows.tolist())
        assert torch.bincount(targets).tolist() == [5, 5, 5]  # one of the rare class is left to test
        return torch.from_numpy(labels)[tested]

    monkeypatch.setattr(module, "ridge_predict", remember)
    found = few_shot(features, labels, None, None, shots=5, num_draws=3)
    assert (found.mean, found.std, found.accuracies) == (1.0, 0.0, (1.0, 1.0, 1.0))
    assert len({tuple(rows) for rows in seen}) == 3
    again = seen.copy()
    seen.clear()
    few_shot(features, labels, None, None, shots=5, num_draws=3)
    assert seen == again
    few_shot(features, labels, None, None, shots=5, num_draws=1, seed=1)
    assert seen[-1] not in again


@pytest.mark.parametrize(("smallest", "has_test", "most"), [(4, True, 4), (4, False, 3), (1, False, 0)])
def test_no_more_are_drawn_than_the_smallest_class_has(smallest: int, has_test: bool, most: int) -> None:
    labels = np.array([0] * 9 + [1] * smallest)
    assert module.most_shots(labels, has_test) == most
    features = torch.eye(len(labels))
    test, answers = (features, labels) if has_test else (None, None)
    with pytest.raises(ValueError, match=f"shots={most + 1}: the smallest class allows {most}"):
        few_shot(features, labels, test, answers, shots=most + 1)
    if most:
        assert few_shot(features, labels, test, answers, shots=most, num_draws=2).shots == most


def test_more_labels_tell_more() -> None:
    (train, labels), (test, answers) = blobs(500, 20, 5), blobs(300, 20, 5, seed=1)
    found = [few_shot(train - 3, labels.numpy(), test - 3, answers.numpy(), shots=n, num_draws=4) for n in (1, 20)]
    assert found[0].mean + 0.1 < found[1].mean
    assert found[0].std == pytest.approx(np.std(found[0].accuracies, ddof=1))
    assert found[0].mean == pytest.approx(np.mean(found[0].accuracies))
