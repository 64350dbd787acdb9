"""How good are frozen features? k-NN and linear probe with intervals, on a test set or cross-validated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssl_vit.data.sources import Source
from ssl_vit.evaluation.features import extract_features, pixel_features
from ssl_vit.evaluation.knn import knn_predict
from ssl_vit.evaluation.linear_probe import linear_predict, stratified_folds
from ssl_vit.evaluation.scores import Score
from ssl_vit.models.encoder import Encoder

PROBES = ("knn", "linear")


@dataclass(frozen=True)
class EvaluationConfig:
    """Which labelled pictures judge the features, and how."""

    every_steps: int | None = None
    """During training: evaluate after every so many steps; `null` = only at the end."""
    source: str | None = None
    """Labelled pictures the probes learn from; `null` = the run's `data.source`."""
    test_source: str | None = None
    """Labelled pictures they are tested on; `null` = cross-validation over `source`."""
    feature: Literal["cls", "mean"] = "mean"
    """What stands for a picture: the class token, or the mean of the patch tokens."""
    k: int = 20
    """Neighbours that vote in the k-NN."""
    temperature: float = 0.07
    """Temperature of the k-NN's weights."""
    folds: int = 5
    """Folds of the cross-validation."""
    crop_pct: float = 0.875
    """Share of the resized picture's sides that the centre crop keeps: .875 = resize to 256, crop to 224."""
    batch_size: int = 256
    """Pictures encoded at once."""
    max_images: int | None = 10_000
    """Evaluate on a seeded random subset of at most so many pictures of each source; `null` = all."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "max_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r}: must be at least 1; leave it at null to set no number")
        for name in ("k", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be at least 1")
        if self.feature not in ("cls", "mean"):
            raise ValueError(f"feature={self.feature!r}: no such feature; choose 'cls' or 'mean'")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r}: must be above 0; the usual value is 0.07")
        if self.folds < 2:
            raise ValueError(f"folds={self.folds!r}: cross-validation needs at least 2; the usual number is 5")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct={self.crop_pct!r}: must lie in (0, 1]; 1 keeps the largest centre crop")


def evaluate_features(
    features: Float[Tensor, "n d"],
    labels: Int[np.ndarray, " n"],
    *,
    groups: Int[np.ndarray, " n"] | None = None,
    test_features: Float[Tensor, "m d"] | None = None,
    test_labels: Int[np.ndarray, " m"] | None = None,
    test_groups: Int[np.ndarray, " m"] | None = None,
    class_names: Sequence[str] = (),
    k: int = 20,
    temperature: float = 0.07,
    folds: int = 5,
    seed: int = 0,
    probes: Sequence[str] = PROBES,
) -> dict[str, Score]:
    """Score features by k-NN and by linear probe.

    With a test set the probes learn from `features` and predict the test set. Without one, `features` are
    cross-validated: in stratified folds drawn from `seed`, every picture is predicted once, by probes that
    have seen none of its fold. Rows without a label (-1) are left out. Of each group only the first
    labelled row is used: variants of one picture are no independent samples and would make the intervals
    too narrow.

    Args:
        features, labels, groups: the pictures to learn from, and those to test on where there is no test set.
        test_features, test_labels, test_groups: the test set.
        class_names: for messages.
        k, temperature: of the k-NN.
        folds: of the cross-validation; at most one for each picture is used.
        seed: draws the folds and what the linear probe holds out to choose its strength.
        probes: which of "knn" and "linear" to run.

    Returns:
        the scores of the probes, all over the same pictures in the same order.

    Raises:
        ValueError: features that are not finite, no labels, fewer than two classes, or classes in the test
            set that the training set lacks.
    """
    rows = independent_rows(labels, groups)
    features, labels = features[torch.from_numpy(rows)], labels[rows]
    _check_classes(labels, class_names)
    _check_finite(features)
    num_classes = int(labels.max()) + 1

    def predict(train: Tensor, train_labels: np.ndarray, test: Tensor) -> dict[str, np.ndarray]:
        targets = torch.from_numpy(train_labels).to(train.device)
        predicted: dict[str, np.ndarray] = {}
        if "knn" in probes:
            knn = knn_predict(train, targets, test, num_classes=num_classes, k=k, temperature=temperature)
            predicted["knn"] = knn.cpu().numpy()
        if "linear" in probes:
            linear = linear_predict(train, targets, test, num_classes=num_classes, seed=seed)
            predicted["linear"] = linear.cpu().numpy()
        return predicted

    if test_features is not None and test_labels is not None:
        rows = independent_rows(test_labels, test_groups)
        test_features, test_labels = test_features[torch.from_numpy(rows)], test_labels[rows]
        _check_test_classes(labels, test_labels, class_names)
        _check_finite(test_features)
        predictions = predict(features, labels, test_features)
        return {probe: Score.of(test_labels, predicted) for probe, predicted in predictions.items()}

    fold_of_row = stratified_folds(labels, None, min(folds, len(labels)), seed)
    predictions = {probe: np.full_like(labels, -1) for probe in probes}
    for fold in np.unique(fold_of_row):
        test = fold_of_row == fold
        test_rows, train_rows = torch.from_numpy(test), torch.from_numpy(~test)
        for probe, predicted in predict(features[train_rows], labels[~test], features[test_rows]).items():
            predictions[probe][test] = predicted
    return {probe: Score.of(labels, predicted) for probe, predicted in predictions.items()}


def evaluate_encoder(
    encoder: Encoder,
    train_source: Source,
    test_source: Source | None,
    config: EvaluationConfig,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    num_workers: int = 0,
    autocast_dtype: torch.dtype | None = None,
    seed: int = 0,
    probes: Sequence[str] = PROBES,
) -> dict[str, Score]:
    """Score an encoder's features: `extract_features`, then `evaluate_features`, on the GPU where that is the device.

    Args:
        encoder: the backbone, already on `device`.
        train_source: labelled pictures for the probes.
        test_source: labelled pictures to test on; None = cross-validation over `train_source`.
        config: feature, probes and crop; its `source` and `test_source` are not read here.
        mean, std: of the channels, for pixel values in [0, 1].
        num_workers, autocast_dtype: see `extract_features`.
        seed: draws the subset, the folds and what the linear probe holds out.

    Raises:
        ValueError: see `evaluate_features`; sources without labels or with different classes.
    """

    def encode(source: Source, rows: np.ndarray) -> Tensor:
        features = extract_features(
            encoder,
            source,
            rows,
            mean=mean,
            std=std,
            crop_pct=config.crop_pct,
            batch_size=config.batch_size,
            device=device,
            num_workers=num_workers,
            autocast_dtype=autocast_dtype,
        )
        features = features[config.feature]
        return features.to(device) if device.type == "cuda" else features  # Apple's GPUs lack the probes' fp64

    return _evaluate(encode, train_source, test_source, config, seed, probes)


def evaluate_pixels(
    train_source: Source,
    test_source: Source | None,
    config: EvaluationConfig,
    *,
    num_channels: int,
    num_workers: int = 0,
    seed: int = 0,
    probes: Sequence[str] = PROBES,
) -> dict[str, Score]:
    """Score raw pixels on the pictures, crops and folds that `evaluate_encoder` uses with these arguments."""

    def shrink(source: Source, rows: np.ndarray) -> Tensor:
        return pixel_features(source, rows, num_channels, crop_pct=config.crop_pct, num_workers=num_workers)

    return _evaluate(shrink, train_source, test_source, config, seed, probes)


def check_sources(train_source: Source, test_source: Source | None) -> None:
    """Find what is wrong with the labels before anything is trained or decoded.

    Raises:
        ValueError: no labels, fewer than two classes, or other classes in the test source.
    """
    labels = _labels(train_source, "source")
    _check_classes(labels[labels >= 0], train_source.class_names)
    if test_source is not None:
        _check_names(train_source, test_source)
        test_labels = _labels(test_source, "test_source")
        _check_test_classes(labels[labels >= 0], test_labels[test_labels >= 0], train_source.class_names)


def independent_rows(labels: Int[np.ndarray, " n"], groups: Int[np.ndarray, " n"] | None) -> Int[np.ndarray, " r"]:
    """Rows that count, ascending: those with a label, and of each group only the first of them."""
    rows = np.flatnonzero(labels >= 0)
    if groups is None:
        return rows
    return rows[np.sort(np.unique(groups[rows], return_index=True)[1])]


def _evaluate(
    featurise: Callable[[Source, np.ndarray], Tensor],
    train_source: Source,
    test_source: Source | None,
    config: EvaluationConfig,
    seed: int,
    probes: Sequence[str],
) -> dict[str, Score]:
    # Everything that can be wrong with the labels is found before the first picture is decoded.
    labels = _labels(train_source, "source")
    rows = _subset(train_source, labels, config.max_images, seed)
    _check_classes(labels[rows], train_source.class_names)
    settings = {"k": config.k, "temperature": config.temperature, "folds": config.folds, "seed": seed}
    settings["probes"] = probes
    if test_source is not None:
        _check_names(train_source, test_source)
        test_labels = _labels(test_source, "test_source")
        test_rows = _subset(test_source, test_labels, config.max_images, seed)
        _check_test_classes(labels[rows], test_labels[test_rows], train_source.class_names)
        settings["test_features"] = featurise(test_source, test_rows)
        settings["test_labels"] = test_labels[test_rows]
    return evaluate_features(
        featurise(train_source, rows), labels[rows], class_names=train_source.class_names, **settings
    )


def _subset(source: Source, labels: np.ndarray, max_images: int | None, seed: int) -> np.ndarray:
    """At most `max_images` of the rows that count, drawn at random, each class with its share of them."""
    rows = independent_rows(labels, source.groups)
    if max_images is None or len(rows) <= max_images:
        return rows
    rows = np.random.default_rng(seed).permutation(rows)
    rows = rows[np.argsort(labels[rows], kind="stable")]
    return np.sort(rows[np.arange(max_images) * len(rows) // max_images])


def _labels(source: Source, setting: str) -> np.ndarray:
    if source.labels is None or not (source.labels >= 0).any():
        raise ValueError(
            f"evaluation.{setting}={source.name!r}: has no labels, and an evaluation needs them; name a "
            "labelled source there, or the column that holds the classes in data.label_column"
        )
    return source.labels


def _name(label: int, class_names: Sequence[str]) -> str:
    return repr(class_names[label]) if label < len(class_names) else str(label)


def _check_classes(labels: np.ndarray, class_names: Sequence[str]) -> None:
    present = np.unique(labels)
    if len(present) == 0:
        raise ValueError("no picture has a label, and an evaluation needs them: evaluate on a labelled source")
    if len(present) == 1:
        raise ValueError(
            f"all {len(labels)} labelled pictures are of class {_name(int(present[0]), class_names)}: "
            "an evaluation needs at least two classes"
        )


def _check_test_classes(labels: np.ndarray, test_labels: np.ndarray, class_names: Sequence[str]) -> None:
    if len(test_labels) == 0:
        raise ValueError("no picture of the test set has a label: test on a labelled source")
    missing = np.setdiff1d(test_labels, labels)
    if len(missing):
        names = ", ".join(_name(label, class_names) for label in missing[:10].tolist())
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise ValueError(
            f"the test set has classes that the training set lacks: {names}{more}; add labelled pictures of "
            "them to the training source, or raise evaluation.max_images where it is set"
        )


def _check_names(train_source: Source, test_source: Source) -> None:
    train_names, test_names = train_source.class_names, test_source.class_names
    if not train_names or not test_names or train_names == test_names:
        return
    first = next((i for i, names in enumerate(zip(train_names, test_names, strict=False)) if len(set(names)) > 1), None)
    detail = (
        f"has {len(test_names)} classes instead of {len(train_names)}"
        if first is None
        else f"class {first} is {test_names[first]!r} instead of {train_names[first]!r}"
    )
    raise ValueError(
        f"evaluation.test_source={test_source.name!r}: must have the classes of evaluation.source="
        f"{train_source.name!r}, in the same order, but {detail}"
    )


def _check_finite(features: Tensor) -> None:
    if not features.isfinite().all():
        raise ValueError("some features are NaN or infinite: the encoder's weights or the pictures are broken")
