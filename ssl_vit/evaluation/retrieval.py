"""Retrieval: do the images of a query's own class come first when all are sorted by similarity?

Mean average precision and recall@k as in image retrieval and metric learning (Musgrave et al., "A Metric Learning
Reality Check", 2020): a query retrieves from a gallery, without itself where both are the same set.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_PAIRS = 2**26  # of query and image at once; each takes about 40 bytes


class Retrieval(NamedTuple):
    """How well images of the same class are found. Shares, not percent."""

    mean_average_precision: float
    """Mean over the queries of the average of the precision at the rank of each image of their class."""
    recall: dict[int, float]
    """For each k, the share of queries with an image of their class among the k nearest."""
    num_queries: int
    """Queries whose class the gallery holds; others cannot be answered and are left out."""


def retrieve(
    gallery: Float[Tensor, "n d"],
    gallery_labels: Int[np.ndarray, " n"],
    queries: Float[Tensor, "m d"] | None,
    query_labels: Int[np.ndarray, " m"] | None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 256,
) -> Retrieval:
    """Sort a gallery by cosine similarity to each query and score the order.

    Of equally similar images the earlier one in the gallery comes first. At most `chunk_size` x n similarities exist
    at once, and at most 2^26.

    Args:
        gallery, queries: finite features. Without `queries` each image of the gallery is one and finds the others.
        gallery_labels, query_labels: classes.
        ks: for recall@k.

    Raises:
        ValueError: no query has an image of its class to find.
    """
    device = gallery.device
    gallery = F.normalize(gallery.float(), dim=1)
    own = queries is None
    queries = gallery if queries is None else F.normalize(queries.float(), dim=1)
    labels = torch.from_numpy(gallery_labels).to(device)
    answers = labels if query_labels is None else torch.from_numpy(query_labels).to(device)
    precision, found = [], []
    ranks = torch.arange(1, len(gallery) + 1 - own, device=device, dtype=torch.float64)
    rows_at_once = max(1, min(chunk_size, _PAIRS // max(1, len(gallery))))
    for start in range(0, len(queries), rows_at_once):
        similarity = queries[start : start + rows_at_once] @ gallery.T
        if own:
            rows = torch.arange(len(similarity), device=device)
            similarity[rows, rows + start] = -torch.inf
        order = similarity.argsort(dim=1, descending=True, stable=True)
        same = labels[order] == answers[start : start + rows_at_once, None]
        if own:
            same = same[:, :-1]  # the query itself
        same = same[same.any(dim=1)]
        at_rank = same.cumsum(dim=1) / ranks
        precision.append((at_rank * same).sum(dim=1) / same.sum(dim=1))
        found.append(torch.stack([same[:, :k].any(dim=1) for k in ks], dim=1))
    average, hits = torch.cat(precision), torch.cat(found).double()
    if len(average) == 0:
        raise ValueError("no query has an image of its class to find: give at least two images of a class")
    recall = dict(zip(ks, hits.mean(dim=0).tolist(), strict=True))
    return Retrieval(float(average.mean()), recall, len(average))
