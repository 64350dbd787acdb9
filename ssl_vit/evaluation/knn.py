"""Weighted k-nearest-neighbour classification on frozen features.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018), in the form that
Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021), made the field's standard.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def knn_predict(
    train: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 1024,
) -> Int[Tensor, " m"]:
    """Classify each test row by the vote of its k most similar training rows.

    Similarity is the cosine, the weight of a vote exp(similarity / temperature). Among training rows of equal
    similarity the earlier ones are the neighbours; among classes of equal votes the lower number wins. At
    most `chunk_size` x (16 `chunk_size` + k) similarities exist at once, whatever the sizes of the sets.

    Args:
        train, test: finite features, not yet normalised.
        train_labels: classes, 0 to `num_classes` - 1.
        k: neighbours that vote; all training rows where there are fewer.
        temperature: above 0; the lower, the more the nearest neighbours count.
        chunk_size: test rows compared at once.

    Raises:
        ValueError: no training rows.
    """
    if len(train) == 0:
        raise ValueError("k-NN needs at least one training row")
    k = min(k, len(train))
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    predictions = []
    for queries in test.split(chunk_size):
        similarity, neighbours = _nearest(queries, train, k, 16 * chunk_size)
        # Relative to the nearest one: the same winner, and no overflow at a low temperature.
        weights = ((similarity - similarity.amax(dim=1, keepdim=True)).double() / temperature).exp()
        votes = weights.new_zeros(len(queries), num_classes)
        votes.scatter_add_(1, train_labels[neighbours], weights)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def _nearest(
    queries: Float[Tensor, "r d"], train: Float[Tensor, "n d"], k: int, chunk_size: int
) -> tuple[Float[Tensor, "r k"], Int[Tensor, "r k"]]:
    """Similarity and index of the k nearest training rows of each query, in the order of their indices."""
    similarity = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(train), chunk_size):
        chunk = train[start : start + chunk_size]
        chunk_indices = torch.arange(start, start + len(chunk), device=queries.device)
        similarity = torch.cat([similarity, queries @ chunk.T], dim=1)
        indices = torch.cat([indices, chunk_indices.expand(len(queries), -1)], dim=1)
        best = _first_top_k(similarity, min(k, similarity.shape[1]))
        similarity, indices = similarity.gather(1, best), indices.gather(1, best)
    return similarity, indices


def _first_top_k(values: Float[Tensor, "r n"], k: int) -> Int[Tensor, "r k"]:
    """Positions of the k largest values of each row, ascending; of equal values the first ones.

    `torch.topk` leaves open which of several equal values it picks, so only its k-th value is used.
    """
    threshold = values.topk(k, dim=1).values[:, -1:]
    above, equal = values > threshold, values == threshold
    places_left = k - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1) <= places_left))
    return chosen.nonzero()[:, 1].view(len(values), k)
