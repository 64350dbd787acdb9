import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from ssl_vit.evaluation import retrieval
from ssl_vit.evaluation.retrieval import retrieve


def data(n: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(5, (n,), generator=generator).numpy()


def by_hand(gallery, labels, queries, answers, own, ks):
    """One query at a time, with scikit-learn's average precision."""
    gallery, queries = (torch.nn.functional.normalize(x, dim=1) for x in (gallery, queries))
    precision, hits = [], []
    for number, (query, answer) in enumerate(zip(queries, answers, strict=True)):
        others = np.array([row for row in range(len(gallery)) if not own or row != number])
        similarity, same = (gallery[others] @ query).numpy(), labels[others] == answer
        if same.any():
            precision.append(average_precision_score(same, similarity))
            hits.append([same[np.argsort(-similarity)[:k]].any() for k in ks])
    return np.mean(precision), np.mean(hits, axis=0), len(precision)


@pytest.mark.parametrize("chunk_size", [1, 7, 256])
@pytest.mark.parametrize("own", [False, True])
def test_equals_a_loop(own: bool, chunk_size: int) -> None:
    (gallery, labels), (queries, answers) = data(40), data(15, seed=1)
    answers[3] = 9  # a class that the gallery lacks
    if own:
        labels[5] = 8  # a class of one
    expected = by_hand(gallery, labels, gallery if own else queries, labels if own else answers, own, (1, 3))
    given = (None, None) if own else (queries, answers)
    found = retrieve(gallery, labels, *given, ks=(1, 3), chunk_size=chunk_size)
    assert found.mean_average_precision == pytest.approx(expected[0])
    assert list(found.recall.values()) == pytest.approx(expected[1].tolist())
    assert found.num_queries == expected[2] < len(answers if not own else labels)


def test_a_large_gallery_is_compared_with_fewer_queries_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (gallery, labels), sizes, sort = data(40), [], torch.Tensor.argsort

    def remember(values: torch.Tensor, *args, **settings) -> torch.Tensor:
        sizes.append(len(values))
        return sort(values, *args, **settings)

    expected = retrieve(gallery, labels, None, None)
    monkeypatch.setattr(torch.Tensor, "argsort", remember)
    for pairs, rows in ((130, 3), (10, 1)):
        monkeypatch.setattr(retrieval, "_PAIRS", pairs)
        sizes.clear()
        found = retrieve(gallery, labels, None, None)
        assert max(sizes) == rows
        assert found.recall == expected.recall
        assert found.mean_average_precision == pytest.approx(expected.mean_average_precision)


def test_perfect_features_and_useless_ones() -> None:
    labels = np.arange(300) % 3
    perfect = retrieve(torch.eye(3)[labels], labels, None, None)
    assert (perfect.mean_average_precision, perfect.recall) == (1.0, {1: 1.0, 5: 1.0, 10: 1.0})
    noise = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    assert retrieve(noise, labels, None, None).mean_average_precision == pytest.approx(1 / 3, abs=0.05)


def test_of_equal_ones_the_earlier_comes_first() -> None:
    found = retrieve(torch.ones(4, 2), np.array([0, 1, 1, 0]), torch.ones(1, 2), np.array([1]), ks=(1, 2))
    assert found.recall == {1: 0.0, 2: 1.0}
    assert found.mean_average_precision == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_nothing_to_find_is_refused() -> None:
    with pytest.raises(ValueError, match="no query has an image of its class"):
        retrieve(torch.eye(3), np.arange(3), None, None)
