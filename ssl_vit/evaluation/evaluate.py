"""Score frozen features: k-NN and linear probe with intervals, on a test set or without one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssl_vit.core.distributed import process_index
from ssl_vit.core.settings import check_ranges
from ssl_vit.data.augment.evaluation import EvalTransform
from ssl_vit.data.sources.source import Source
from ssl_vit.evaluation.features import (
    EncodeSettings,
    check_finite,
    extract_features,
    pixel_features,
    select_feature,
)
from ssl_vit.evaluation.knn import knn_predict
from ssl_vit.evaluation.logistic import logistic_predict
from ssl_vit.evaluation.scores import Score
from ssl_vit.evaluation.splits import split_sources, stratified_folds
from ssl_vit.models.encoder import Encoder


@dataclass(frozen=True)
class EvaluationConfig:
    """Which labelled images score the features, and how."""

    every_steps: int | None = None
    """During training: evaluate after every so many steps; `null` = only at the end."""
    pictures_every_steps: int | None = None
    """During pre-training: draw a few images after every so many steps into `pictures/`; `null` = never."""
    source: str | dict[str, float] | None = None
    """Labelled images the probes learn from; `null` = the run's `data.source`."""
    test_source: str | dict[str, float] | None = None
    """Labelled images they are tested on; `null` = `source`: leave-one-out (k-NN), cross-validation (linear)."""
    test_split: str | None = None
    """Split of the test source; `null` = `data.split`. Given alone, it is one of `data.source`."""
    feature: Literal["cls", "mean"] = "mean"
    """Feature of an image: the class token (of Swin and ConvNeXt their pooled feature), or the mean of the patch
    tokens."""
    k: int = 20
    """Neighbours that vote in the k-NN."""
    temperature: float = 0.07
    """Temperature of the k-NN's weights."""
    folds: int = 5
    """Folds of the cross-validation."""
    crop_pct: float = 0.875
    """Share of the resized image's sides that the centre crop keeps: .875 = resize to 256, crop to 224. Where
    encoder.pretrained is given, that of these weights unless set."""
    batch_size: int = 256
    """Images encoded at once."""
    max_images: int | None = 10_000
    """Evaluate on a seeded random subset of at most so many images of each source; `null` = all."""

    def __post_init__(self) -> None:
        no_number = "[1, inf); null sets no number"
        check_ranges(
            self,
            every_steps=no_number,
            pictures_every_steps=no_number,
            max_images=no_number,
            k="[1, inf)",
            batch_size="[1, inf)",
            temperature="(0, inf); the usual value is 0.07",
            folds="[2, inf); the usual number is 5",
            crop_pct="(0, 1]; 1 keeps the largest centre crop",
        )


def cross_validate(
    labels: Int[np.ndarray, " n"],
    folds: int,
    seed: int,
    predict: Callable[[Int[Tensor, " r"], Int[Tensor, " s"]], Int[np.ndarray, " s"]],
) -> Int[np.ndarray, " n"]:
    """Predict every row once, by a classifier that has seen no row of its fold.

    Args:
        labels: classes; they stratify the folds.
        folds: number of folds; at most one for each row is used.
        seed: draws the folds.
        predict: learns from the first rows and predicts the second ones.
    """
    fold_of_row = stratified_folds(labels, None, min(folds, len(labels)), seed)
    predictions = np.full_like(labels, -1)
    for fold in np.unique(fold_of_row):
        test = fold_of_row == fold
        train_rows, test_rows = (torch.from_numpy(np.flatnonzero(rows)) for rows in (~test, test))
        predictions[test] = predict(train_rows, test_rows)
    return predictions


def evaluate_features(
    features: Float[Tensor, "n d"],
    labels: Int[np.ndarray, " n"],
    *,
    test_features: Float[Tensor, "m d"] | None = None,
    test_labels: Int[np.ndarray, " m"] | None = None,
    k: int = 20,
    temperature: float = 0.07,
    folds: int = 5,
    seed: int = 0,
) -> dict[str, Score]:
    """Score features by k-NN and by linear probe (logistic regression).

    With a test set the probes learn from `features` and predict the test set. Without one every image is predicted
    once: by k-NN from all other images (leave-one-out), by linear probe from the other folds.

    Args:
        features, labels: images to learn from; without a test set also to test on.
        test_features, test_labels: the test set.
        k, temperature: of the k-NN.
        folds: of the cross-validation.
        seed: draws the folds and the part that the linear probe holds out to choose its strength.

    Returns:
        the scores "knn" and "linear", over the same images in the same order.

    Raises:
        ValueError: features that are not finite.
    """
    check_finite(features)
    targets = torch.from_numpy(labels).to(features.device)
    num_classes = int(labels.max()) + 1
    if test_features is not None:
        check_finite(test_features)
    knn = knn_predict(features, targets, test_features, num_classes=num_classes, ks=(k,), temperature=temperature)[k]

    def linear(train_rows: Tensor, test: Tensor) -> np.ndarray:
        train, train_targets = features[train_rows], targets[train_rows.to(targets.device)]
        return logistic_predict(train, train_targets, test, num_classes=num_classes, seed=seed).cpu().numpy()

    if test_features is not None and test_labels is not None:
        found = linear(torch.arange(len(features)), test_features)
    else:
        test_labels = labels
        found = cross_validate(labels, folds, seed, lambda train, test: linear(train, features[test]))
    return {"knn": Score.of(test_labels, knn.cpu().numpy()), "linear": Score.of(test_labels, found)}


def evaluate_encoder(
    encoder: Encoder,
    train_source: Source,
    test_source: Source | None,
    config: EvaluationConfig,
    transform: EvalTransform,
    settings: EncodeSettings,
    *,
    seed: int = 0,
) -> dict[str, Score]:
    """Score an encoder's features: `extract_features`, then `evaluate_features`, on the GPU if that is the device.

    Every process calls this and encodes its share; only the main one returns scores.

    Args:
        encoder: the backbone, already on the device.
        train_source: labelled images for the probes.
        test_source: labelled images to test on; None = see `evaluate_features`.
        config: feature and probes; its `source` and `test_source` are not read here.
        seed: draws the subset, the folds and what the linear probe holds out.

    Raises:
        ValueError: see `split_sources` and `evaluate_features`.
    """

    def encode(source: Source, rows: np.ndarray) -> Tensor:
        pieces = extract_features(encoder, source, rows, transform, settings)
        if process_index() != 0:
            return torch.empty(0)
        features = select_feature(pieces, config.feature)
        # Apple's GPUs lack the probes' fp64.
        return features.to(settings.device) if settings.device.type == "cuda" else features

    return _evaluate(encode, train_source, test_source, config, seed)


def evaluate_pixels(
    train_source: Source,
    test_source: Source | None,
    config: EvaluationConfig,
    *,
    num_channels: int,
    num_workers: int = 0,
    seed: int = 0,
) -> dict[str, Score]:
    """Score raw pixels on the images, crops and folds that `evaluate_encoder` uses with these arguments.

    Only the main process works and returns scores.
    """

    def shrink(source: Source, rows: np.ndarray) -> Tensor:
        if process_index() != 0:
            return torch.empty(0)
        return pixel_features(source, rows, num_channels, crop_pct=config.crop_pct, num_workers=num_workers)["mean"]

    return _evaluate(shrink, train_source, test_source, config, seed)


def _evaluate(
    featurise: Callable[[Source, np.ndarray], Tensor],
    train_source: Source,
    test_source: Source | None,
    config: EvaluationConfig,
    seed: int,
) -> dict[str, Score]:
    # Find everything that can be wrong with the labels before the first image is decoded.
    split = split_sources(train_source, test_source, config.max_images, seed)
    test_features = None
    if test_source is not None and split.test_rows is not None:
        test_features = featurise(test_source, split.test_rows)
    features = featurise(train_source, split.rows)
    if process_index() != 0:
        return {}
    return evaluate_features(
        features,
        split.labels,
        test_features=test_features,
        test_labels=split.test_labels,
        k=config.k,
        temperature=config.temperature,
        folds=config.folds,
        seed=seed,
    )
