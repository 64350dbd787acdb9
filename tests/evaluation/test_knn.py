import math
from collections import defaultdict

import pytest
import torch

from ssl_vit.evaluation.knn import knn_predict


def knn_by_hand(train, labels, test, k, temperature):
    """One test row, one neighbour and one vote at a time."""
    predictions = []
    for query in test:
        similarity = [float(torch.dot(query, row) / (query.norm() * row.norm())) for row in train]
        nearest = sorted(range(len(train)), key=lambda i: (-similarity[i], i))[:k]
        votes = defaultdict(float)
        for i in nearest:
            votes[int(labels[i])] += math.exp(similarity[i] / temperature)
        predictions.append(min(votes, key=lambda label: (-votes[label], label)))
    return torch.tensor(predictions)


def random_data(n=150, m=70, d=6, num_classes=7):
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(n, d, generator=generator, dtype=torch.float64)
    test = torch.randn(m, d, generator=generator, dtype=torch.float64)
    return train, torch.randint(num_classes, (n,), generator=generator), test


@pytest.mark.parametrize("k", [1, 5, 20, 150])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_a_loop(k, temperature):
    train, labels, test = random_data()
    predicted = knn_predict(train, labels, test, num_classes=7, ks=(k,), temperature=temperature)[k]
    assert torch.equal(predicted, knn_by_hand(train, labels, test, k, temperature))


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 1000])
def test_chunks_change_nothing(chunk_size):
    train, labels, test = random_data()
    expected = knn_by_hand(train, labels, test, 20, 0.07)
    predicted = knn_predict(train, labels, test, num_classes=7, chunk_size=chunk_size)[20]
    assert torch.equal(predicted, expected)


def test_similarity_is_the_cosine():
    train = torch.tensor([[100.0, 100.0], [0.01, 0.0]])
    test = torch.tensor([[5.0, 0.1]])  # the second row points its way; the first has the larger product
    assert knn_predict(train, torch.tensor([0, 1]), test, num_classes=2, ks=(1,))[1].tolist() == [1]


def test_near_neighbours_outvote_many_far_ones_only_at_a_low_temperature():
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]])
    labels, test = torch.tensor([1, 0, 0, 0]), torch.tensor([[1.0, 0.0]])
    assert knn_predict(train, labels, test, num_classes=2, ks=(4,), temperature=0.07)[4].tolist() == [1]
    assert knn_predict(train, labels, test, num_classes=2, ks=(4,), temperature=10.0)[4].tolist() == [0]


def test_a_very_low_temperature_does_not_overflow():
    train, labels, test = random_data()
    nearest = knn_by_hand(train, labels, test, 1, 1.0)
    assert torch.equal(knn_predict(train, labels, test, num_classes=7, temperature=1e-4)[20], nearest)


@pytest.mark.parametrize("chunk_size", [1, 2, 1024])
def test_ties_go_to_the_earlier_row_and_the_lower_class(chunk_size):
    same = torch.ones(60, 2)
    labels = torch.tensor([3] * 2 + [1] * 2 + [2] * 56)
    for k, winner in ((1, 3), (3, 3), (4, 1), (6, 1), (7, 2)):
        predicted = knn_predict(same, labels, same[:5], num_classes=4, ks=(k,), chunk_size=chunk_size)[k]
        assert predicted.tolist() == [winner] * 5


def test_fewer_training_rows_than_neighbours():
    train, labels, test = random_data(n=4)
    predicted = knn_predict(train, labels, test, num_classes=7, ks=(20,))[20]
    assert torch.equal(predicted, knn_by_hand(train, labels, test, 4, 0.07))


def test_no_training_rows_are_refused():
    with pytest.raises(ValueError, match="at least 1 training rows, there are 0"):
        knn_predict(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(3, 2), num_classes=2)


@pytest.mark.parametrize("chunk_size", [2, 7, 1024])
def test_several_k_in_one_pass_are_those_of_each_alone(chunk_size):
    train, labels, test = random_data()
    together = knn_predict(train, labels, test, num_classes=7, ks=(10, 1, 200), chunk_size=chunk_size)
    for k in (10, 1, 200):
        assert torch.equal(together[k], knn_by_hand(train, labels, test, k, 0.07))


@pytest.mark.parametrize("chunk_size", [2, 7, 1024])
@pytest.mark.parametrize("k", [1, 10, 200])
def test_leave_one_out_asks_all_others(k, chunk_size):
    train, labels, _ = random_data(n=40)
    train[7] = train[3]  # a copy is a neighbour, the row itself is not
    expected = [
        knn_by_hand(
            torch.cat([train[:i], train[i + 1 :]]), torch.cat([labels[:i], labels[i + 1 :]]), train[i : i + 1], k, 0.07
        )
        for i in range(40)
    ]
    predicted = knn_predict(train, labels, None, num_classes=7, ks=(k,), chunk_size=chunk_size)[k]
    assert torch.equal(predicted, torch.cat(expected))


def test_a_single_row_cannot_be_left_out():
    with pytest.raises(ValueError, match="at least 2 training rows, there are 1"):
        knn_predict(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64), None, num_classes=1)


def test_very_many_classes_are_voted_on_in_small_parts():
    train, test = torch.eye(3), torch.eye(3)
    labels = torch.tensor([0, 2**25, 5])
    assert knn_predict(train, labels, test, num_classes=2**25 + 1, ks=(1,))[1].tolist() == labels.tolist()
