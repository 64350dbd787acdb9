"""Weighted k-nearest-neighbour classification on frozen features.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018), in the form that
Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021), made the field's standard.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def knn_predict(
    train: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"] | None,
    *,
    num_classes: int,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    chunk_size: int = 1024,
) -> dict[int, Int[Tensor, " m"]]:
    """Classify each test row by the vote of its k most similar training rows, for several k in one pass.

    Similarity is the cosine, the weight of a vote exp(similarity / temperature). Among training rows of equal
    similarity the earlier ones are the neighbours; among classes of equal votes the lower number wins. At
    most `chunk_size` x (16 `chunk_size` + k) similarities exist at once, whatever the sizes of the sets, and the votes
    of at most 2^26 pairs of row and class.

    Args:
        train, test: finite features, not yet normalised. Without `test` each training row is classified by the other
            ones (leave-one-out).
        train_labels: classes, 0 to `num_classes` - 1.
        ks: numbers of neighbours that vote; all training rows where there are fewer.
        temperature: above 0; the lower, the more the nearest neighbours count.
        chunk_size: test rows compared at once.

    Returns:
        the predictions of each k.

    Raises:
        ValueError: no training rows, or only the one that is left out.
    """
    leave_one_out = test is None
    if len(train) < 1 + leave_one_out:
        raise ValueError(f"k-NN needs at least {1 + leave_one_out} training rows, there are {len(train)}")
    train = F.normalize(train.float(), dim=1)
    test = train if test is None else F.normalize(test.float(), dim=1)
    most = min(max(ks), len(train) - leave_one_out)
    predictions: dict[int, list[Tensor]] = {k: [] for k in ks}
    rows_at_once = max(1, min(chunk_size, 2**26 // num_classes))
    for start in range(0, len(test), rows_at_once):
        queries = test[start : start + rows_at_once]
        similarity, neighbours = _nearest(queries, train, most, 16 * chunk_size, start if leave_one_out else None)
        # Relative to the nearest one: the same winner, and no overflow at a low temperature.
        weights = ((similarity - similarity.amax(dim=1, keepdim=True)).double() / temperature).exp()
        labels = train_labels[neighbours]
        for k in ks:
            chosen = _first_top_k(similarity, min(k, most))
            votes = weights.new_zeros(len(queries), num_classes)
            votes.scatter_add_(1, labels.gather(1, chosen), weights.gather(1, chosen))
            predictions[k].append(votes.argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in predictions.items()}


def _nearest(
    queries: Float[Tensor, "r d"],
    train: Float[Tensor, "n d"],
    k: int,
    chunk_size: int,
    first_row: int | None,
) -> tuple[Float[Tensor, "r k"], Int[Tensor, "r k"]]:
    """Similarity and index of the k nearest training rows of each query, in the order of their indices.

    first_row: the training row that the first query is, the next ones following it; none is its own neighbour.
    """
    similarity = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(train), chunk_size):
        chunk = train[start : start + chunk_size]
        chunk_indices = torch.arange(start, start + len(chunk), device=queries.device)
        found = queries @ chunk.T
        if first_row is not None:
            own = torch.arange(first_row, first_row + len(queries), device=queries.device)
            found.masked_fill_(own[:, None] == chunk_indices, -torch.inf)
        similarity = torch.cat([similarity, found], dim=1)
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
