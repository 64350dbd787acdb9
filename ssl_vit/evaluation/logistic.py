"""Linear classification of frozen features: multinomial logistic regression, solved to its optimum.

Features are standardised as by the batch norm without affine in front of the linear probe of He et al., "Masked
Autoencoders Are Scalable Vision Learners" (2022). MAE trains the classifier with a schedule; here it is the minimum of
a convex loss, as in Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021): no
learning rate, and nothing to tune but the L2 strength, which is chosen on a part of the training set.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ssl_vit.evaluation.splits import held_out_rows

L2_GRID = tuple(10.0 ** (exponent / 2) for exponent in range(2, -11, -1))
"""Strengths tried, 10 to 1e-5. Strongest first: each fit starts from the one before, near its solution."""

_HELD_OUT_FOLDS = 5  # one fifth of the training set chooses the strength
_CHUNK_ROWS = 16384  # rows whose logits exist at once


@torch.inference_mode(False)
def logistic_predict(
    train: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    *,
    num_classes: int,
    seed: int = 0,
    l2: float | None = None,
) -> Int[Tensor, " m"]:
    """Classify test rows with a logistic regression fitted to the training rows.

    The loss is the mean cross-entropy plus `l2 / 2` times the squared norm of the weights (not of the biases), so
    `l2 = 1 / (C n)` in the terms of scikit-learn. Computed in fp64; the same call gives the same result.

    Args:
        train, test: finite features; both are standardised with the statistics of `train`.
        train_labels: classes, 0 to `num_classes` - 1. A class without training rows is never predicted.
        seed: draws the part of `train` that is held out to choose `l2`.
        l2: the strength; None = the value of `L2_GRID` with the lowest loss on a held-out fifth of `train`; the
            regression is then fitted again on all of `train`.

    Raises:
        ValueError: no training rows, or labels outside the classes.
    """
    if len(train) == 0:
        raise ValueError("the logistic regression needs at least one training row")
    # Leave out classes without rows, whose biases would go to minus infinity.
    present, targets = train_labels.unique(return_inverse=True)
    if present[0] < 0 or present[-1] >= num_classes:
        raise ValueError(f"labels range from {present[0]} to {present[-1]}, but num_classes is {num_classes}")
    train, test = _standardise(train, test)
    # Rotate to uncorrelated features: penalty and solution stay the same, but `_fit`, which scales each feature by
    # itself, then needs tens of steps where correlated features can take thousands.
    rotation = torch.linalg.eigh(train.T @ train).eigenvectors
    train, test = train @ rotation, test @ rotation
    if l2 is None:
        l2 = _choose_l2(train, targets, len(present), seed)
    weights = _fit(train, targets, l2, train.new_zeros(len(present), train.shape[1] + 1), tolerance=1e-5)
    return present[_logits(weights, test).argmax(dim=1)]


def _standardise(
    train: Float[Tensor, "n d"], test: Float[Tensor, "m d"]
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    train, test = train.double(), test.double()
    mean = train.mean(dim=0)
    std = (train.var(dim=0, correction=0) + 1e-6).sqrt()  # the epsilon of MAE's batch norm
    return (train - mean) / std, (test - mean) / std


def _choose_l2(train: Float[Tensor, "n d"], targets: Int[Tensor, " n"], num_classes: int, seed: int) -> float:
    held_out = held_out_rows(targets.cpu().numpy(), None, _HELD_OUT_FOLDS, seed)
    if not held_out.any():
        return L2_GRID[len(L2_GRID) // 2]
    fit, check = (torch.from_numpy(rows).to(train.device) for rows in (~held_out, held_out))
    weights = train.new_zeros(num_classes, train.shape[1] + 1)
    losses = []
    for l2 in L2_GRID:
        weights = _fit(train[fit], targets[fit], l2, weights, tolerance=1e-3)
        losses.append(float(F.cross_entropy(_logits(weights, train[check]), targets[check])))
        if len(losses) - int(np.argmin(losses)) > 2:  # twice past the minimum; the weakest strengths take longest
            break
    return L2_GRID[int(np.argmin(losses))]


@torch.enable_grad()
def _fit(
    features: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"],
    l2: float,
    start: Float[Tensor, "classes d1"],
    tolerance: float,
) -> Float[Tensor, "classes d1"]:
    """Minimise the loss with L-BFGS from `start`; the last column of the weights holds the biases."""
    # Scale the weights so that all have about the same curvature, that of the loss at equal probabilities.
    probability = 1 / len(start)
    spread = max(probability * (1 - probability), 1e-3)  # 0 for a single class
    unit = F.pad(features.square().mean(dim=0) * spread + l2, (0, 1), value=spread).rsqrt()
    scaled = (start / unit).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [scaled],
        max_iter=500,
        max_eval=1000,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        penalty = 0.5 * l2 * (scaled * unit)[:, :-1].square().sum()
        penalty.backward()
        total = penalty.detach()
        for rows, labels in zip(features.split(_CHUNK_ROWS), targets.split(_CHUNK_ROWS), strict=True):
            loss = F.cross_entropy(_logits(scaled * unit, rows), labels, reduction="sum") / len(features)
            loss.backward()
            total += loss.detach()
        return float(total)

    optimizer.step(closure)
    return (scaled * unit).detach()


def _logits(weights: Float[Tensor, "classes d1"], features: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
    return F.linear(features, weights[:, :-1], weights[:, -1])
