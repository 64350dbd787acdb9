"""Linear probes trained by gradient descent: many heads at once, the best one picked on a part of the training set.

As Oquab et al., "DINOv2" (2023) do, a head for each learning rate and kind of feature sees the same batches, so that a
grid costs one pass. `PRESETS["mae"]` is the protocol of He et al., "Masked Autoencoders Are Scalable Vision Learners"
(2022): batch norm without affine in front of the classifier, and LARS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.optim.lars import Lars
from torch import Tensor, nn

from ssl_vit.core.schedules import warmup_cosine
from ssl_vit.core.settings import check_given, check_ranges
from ssl_vit.evaluation.features import FEATURES, select_feature, take
from ssl_vit.evaluation.splits import held_out_rows


@dataclass(frozen=True)
class LinearProbeConfig:
    """How the heads are trained."""

    features: tuple[str, ...] = FEATURES
    """Kinds of features, each with heads of its own: cls, mean, cls+mean, cls4, cls4+mean."""
    base_lrs: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    """Learning rates for a batch of 256, each with heads of its own; they grow in proportion to the batch."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    """Both with momentum .9 and without weight decay."""
    batch_norm: bool = False
    """Standardise the features by a batch norm without affine."""
    epochs: int = 100
    """Passes over the training part."""
    warmup: float = 0.0
    """Share of the passes over which the learning rate grows from 0; a cosine to 0 follows."""
    batch_size: int = 1024
    """Images of a step; at most a tenth of those there are, and at least 2."""
    views: int = 0
    """Random crops and flips of each training image, encoded once and taken in turns; 0 = the centre crop alone."""
    held_out: int = 10
    """One part in so many of the training images picks the best head, which is then trained again on all of them."""

    def __post_init__(self) -> None:
        for kind in self.features:
            if kind not in FEATURES:
                raise ValueError(f"features={self.features!r}: no feature {kind!r}; choose of {', '.join(FEATURES)}")
        check_given(self, "features", "base_lrs")
        check_ranges(self, base_lrs="(0, inf)", epochs="[1, inf)", batch_size="[1, inf)", views="[0, inf)")
        check_ranges(self, held_out="[2, inf)", warmup="[0, 1); it is a share of the passes")


PRESETS = {
    "dinov2": LinearProbeConfig(),
    "mae": LinearProbeConfig(
        features=("cls", "mean"),
        # The paper's is the first. What LARS changes in a step is tiny, and small data have few steps.
        base_lrs=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
        optimizer="lars",
        batch_norm=True,
        epochs=90,
        warmup=10 / 90,
        batch_size=16384,
    ),
}


class Head(NamedTuple):
    """One of the heads."""

    feature: str
    base_lr: float
    model: nn.Module


class LinearProbe(NamedTuple):
    """The best head, what it predicts, and how all of them fared where it was picked."""

    predictions: Int[Tensor, " m"]
    feature: str
    base_lr: float
    held_out: dict[tuple[str, float], float]
    """Accuracy of each feature and learning rate on the held-out part, a share; empty if nothing was held out."""


def linear_probe(
    train: Sequence[Mapping[str, Tensor]],
    train_labels: Int[np.ndarray, " n"],
    test: Mapping[str, Tensor],
    config: LinearProbeConfig,
    *,
    num_classes: int,
    clean: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> LinearProbe:
    """Train heads on a part of `train`, pick the best on the rest, train it again on all, and classify `test`.

    Of heads with the same accuracy the one of lower loss is picked. Where nothing can be held out, since no class has
    two images, it is the first kind of feature with the middle learning rate. The same call gives the same result.

    Args:
        train: what `extract_features` returned for the training images, once for each view.
        train_labels: classes, 0 to `num_classes` - 1.
        test: the same of the images to classify, of the centre crop.
        clean: the training images' centre crop, on which heads are compared; None = the first of `train`.
        seed: draws the held-out part, the heads' first weights and the batches.
        device: where the heads are trained; None = where the features are.
        on_step: called after each step; `num_steps` says how many there are.

    Raises:
        ValueError: a batch norm is to learn from a single image.
    """
    if config.batch_norm and len(train_labels) < 2:
        raise ValueError("batch_norm=True: needs at least 2 training images; give more, or --probe.batch_norm false")
    clean = train[0] if clean is None else clean
    device = device or clean["mean"].device
    labels = torch.from_numpy(train_labels).to(device)
    everything = np.arange(len(train_labels))
    settings = {"num_classes": num_classes, "seed": seed, "on_step": on_step}
    held_out = held_out_rows(train_labels, None, config.held_out, seed)
    grid = [(kind, base_lr) for kind in config.features for base_lr in config.base_lrs]
    found: dict[tuple[str, float], float] = {}
    if len(grid) > 1 and held_out.any() and (~held_out).sum() > 1:
        heads = _train_heads(train, labels, everything[~held_out], grid, config, **settings)
        rows = torch.from_numpy(everything[held_out])
        answers = labels[rows.to(device)]
        losses = {}
        for head in heads:
            logits, key = _logits(head, clean, rows, device), (head.feature, head.base_lr)
            found[key] = float((logits.argmax(dim=1) == answers).float().mean())
            # A head that diverged has none, and is to win no tie.
            losses[key] = float(F.cross_entropy(logits, answers).nan_to_num(nan=torch.inf))
        best = max(found, key=lambda key: (found[key], -losses[key]))
    else:
        best = config.features[0], sorted(config.base_lrs)[len(config.base_lrs) // 2]
    head = _train_heads(train, labels, everything, [best], config, **settings)[0]
    predictions = _logits(head, test, torch.arange(len(test["mean"])), device).argmax(dim=1)
    return LinearProbe(predictions.cpu(), *best, found)


def num_steps(num_rows: int, config: LinearProbeConfig) -> int:
    """Optimizer steps over `num_rows` training images, in both rounds together."""
    fit = num_rows - -(-num_rows // config.held_out)
    grid = len(config.features) * len(config.base_lrs)
    rounds = [fit, num_rows] if grid > 1 else [num_rows]
    return sum(config.epochs * _steps_per_epoch(rows, config) for rows in rounds)


def _batch_size(num_rows: int, config: LinearProbeConfig) -> int:
    return max(2, min(config.batch_size, num_rows // 10))


def _steps_per_epoch(num_rows: int, config: LinearProbeConfig) -> int:
    """So few that none of evenly cut parts has a single row, from which a batch norm cannot learn."""
    return max(1, min(-(-num_rows // _batch_size(num_rows, config)), num_rows // 2))


def _train_heads(
    views: Sequence[Mapping[str, Tensor]],
    labels: Int[Tensor, " n"],
    rows: Int[np.ndarray, " r"],
    grid: Sequence[tuple[str, float]],
    config: LinearProbeConfig,
    *,
    num_classes: int,
    seed: int,
    on_step: Callable[[], object],
) -> list[Head]:
    """A head for each kind of feature and learning rate, all trained on the same batches of `rows`."""
    device = labels.device
    batch_size = _batch_size(len(rows), config)
    heads = []
    for kind, base_lr in grid:
        generator = torch.Generator().manual_seed(seed)  # anew, so that no head depends on which others there are
        linear = nn.Linear(select_feature(take(views[0], slice(1)), kind).shape[1], num_classes)
        nn.init.normal_(linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(linear.bias)
        norm = nn.BatchNorm1d(linear.in_features, eps=1e-6, affine=False) if config.batch_norm else nn.Identity()
        heads.append(Head(kind, base_lr, nn.Sequential(norm, linear).to(device)))
    optimizer = _optimizer(heads, config)
    order = np.random.default_rng((seed, 1))
    steps_per_epoch = _steps_per_epoch(len(rows), config)
    for step in range(config.epochs * steps_per_epoch):
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0:
            shuffled = order.permutation(rows)
        chosen = torch.from_numpy(np.array_split(shuffled, steps_per_epoch)[position])
        batch = take(views[epoch % len(views)], chosen)
        targets = labels[chosen.to(device)]
        inputs = {kind: select_feature(batch, kind).to(device) for kind in dict.fromkeys(kind for kind, _ in grid)}
        # Each head's loss has gradients for this head alone, so their sum trains all of them.
        loss = torch.stack([F.cross_entropy(head.model(inputs[head.feature]), targets) for head in heads]).sum()
        rate = warmup_cosine(step / (config.epochs * steps_per_epoch), config.warmup, 1.0, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["base_lr"] * batch_size / 256
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_step()
    return heads


def _optimizer(heads: Sequence[Head], config: LinearProbeConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        groups = [{"params": list(head.model.parameters()), "base_lr": head.base_lr} for head in heads]
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    groups = [
        # LARS adapts the rate of weights, not that of biases.
        {"params": [parameter], "base_lr": head.base_lr, "always_adapt": parameter.ndim > 1}
        for head in heads
        for parameter in head.model.parameters()
    ]
    return Lars(groups, lr=0.0, momentum=0.9, trust_coeff=0.001)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def _logits(
    head: Head, pieces: Mapping[str, Tensor], rows: Int[Tensor, " r"], device: torch.device
) -> Float[Tensor, "r classes"]:
    head.model.eval()
    return torch.cat(
        [head.model(select_feature(take(pieces, part), head.feature).to(device)) for part in rows.split(16384)]
    )
