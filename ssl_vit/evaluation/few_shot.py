"""Few-shot classification: ridge regression in closed form on a few drawn images of each class."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ssl_vit.evaluation.scores import Score

ALPHAS = tuple(10.0**exponent for exponent in range(-4, 3))
"""Penalties tried, for features of length 1."""


class FewShot(NamedTuple):
    """Accuracy from a few images of each class. Shares, not percent."""

    shots: int
    mean: float
    """Mean over the draws."""
    std: float
    """Standard deviation over the draws, of a sample (n - 1); 0 for a single draw."""
    accuracies: tuple[float, ...]
    """Accuracy of each draw."""


def few_shot(
    train: Float[Tensor, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test: Float[Tensor, "m d"] | None,
    test_labels: Int[np.ndarray, " m"] | None,
    *,
    shots: int,
    num_draws: int = 5,
    seed: int = 0,
) -> FewShot:
    """Draw `shots` images of each class several times, fit a ridge classifier to each draw and test it.

    Features are scaled to length 1. Without a test set the images that were not drawn are tested.

    Args:
        train, test: finite features.
        shots: images of each class, at most `most_shots`.
        num_draws: how often; each draw is another seed.

    Raises:
        ValueError: a class has too few images.
    """
    if shots > most_shots(train_labels, test is not None):
        raise ValueError(f"shots={shots}: the smallest class allows {most_shots(train_labels, test is not None)}")
    train = F.normalize(train.double(), dim=1)
    test = None if test is None else F.normalize(test.double(), dim=1)
    accuracies = []
    for draw in range(num_draws):
        rng = np.random.default_rng((seed, shots, draw))
        chosen = []
        for label in np.unique(train_labels):
            chosen.append(rng.permutation(np.flatnonzero(train_labels == label))[:shots])
        rows = np.sort(np.concatenate(chosen))
        if test is None or test_labels is None:
            rest = np.setdiff1d(np.arange(len(train)), rows)
            queries, answers = train[torch.from_numpy(rest)], train_labels[rest]
        else:
            queries, answers = test, test_labels
        targets = torch.from_numpy(train_labels[rows]).to(train.device)
        predicted = ridge_predict(train[torch.from_numpy(rows)], targets, queries, alphas=ALPHAS)
        accuracies.append(Score.of(answers, predicted.cpu().numpy()).accuracy)
    std = float(np.std(accuracies, ddof=1)) if num_draws > 1 else 0.0
    return FewShot(shots, float(np.mean(accuracies)), std, tuple(accuracies))


def most_shots(train_labels: Int[np.ndarray, " n"], has_test: bool) -> int:
    """Return how many images of every class can be drawn; without a test set each keeps one to be tested on."""
    return int(np.unique(train_labels, return_counts=True)[1].min()) - (not has_test)


def ridge_predict(
    train: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    *,
    alphas: Sequence[float],
) -> Int[Tensor, " m"]:
    """Classify by least squares towards +1 for a row's own class and -1 for the others, with an L2 penalty.

    The intercept is not penalised. Of several penalties the one with the least squared error in leave-one-out
    cross-validation is taken, which the singular values give in closed form (as in scikit-learn's RidgeClassifierCV).
    In fp64.

    Args:
        alphas: factors of the weights' squared norm, in the sum of squares over rows.

    Raises:
        ValueError: no training rows.
    """
    if len(train) == 0:
        raise ValueError("the ridge classifier needs at least one training row")
    classes, targets = train_labels.unique(return_inverse=True)
    if len(classes) == 1:
        return classes.expand(len(test))
    signs = F.one_hot(targets, len(classes)).double() * 2 - 1
    mean, offset = train.double().mean(dim=0), signs.mean(dim=0)
    left, values, right = torch.linalg.svd(train.double() - mean, full_matrices=False)
    inner = left.T @ (signs - offset)
    best, weights = float("inf"), torch.empty(0)
    for alpha in alphas:
        shrunk = values.square() / (values.square() + alpha)
        residual = signs - offset - left @ (shrunk[:, None] * inner)
        # The share of itself in a row's own prediction; with one row for each dimension it nears 1.
        own = left.square() @ shrunk + 1 / len(train)
        error = float((residual / (1 - own).clamp_min(1e-12)[:, None]).square().mean())
        if error < best:
            best, weights = error, right.T @ ((values / (values.square() + alpha))[:, None] * inner)
    scores = (test.double() - mean) @ weights + offset
    return classes[scores.argmax(dim=1)]
