"""How good are frozen features? k-NN and linear probe with intervals, on a test set or without one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple
from unicodedata import normalize

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssl_vit.core.distributed import process_index
from ssl_vit.data.augment.evaluation import EvalTransform
from ssl_vit.data.config import clamp_rounding
from ssl_vit.data.sources.source import Source
from ssl_vit.evaluation.features import (
    EncodeSettings,
    check_finite,
    extract_features,
    pixel_features,
    select_feature,
)
from ssl_vit.evaluation.knn import knn_predict
from ssl_vit.evaluation.logistic import logistic_predict, stratified_folds
from ssl_vit.evaluation.scores import Score, class_name
from ssl_vit.models.encoder import Encoder


@dataclass(frozen=True)
class EvaluationConfig:
    """Which labelled pictures judge the features, and how."""

    every_steps: int | None = None
    """During training: evaluate after every so many steps; `null` = only at the end."""
    pictures_every_steps: int | None = None
    """During pre-training: draw a few pictures after every so many steps into `pictures/`; `null` = never."""
    source: str | dict[str, float] | None = None
    """Labelled pictures the probes learn from; `null` = the run's `data.source`."""
    test_source: str | dict[str, float] | None = None
    """Labelled pictures they are tested on; `null` = `source`: leave-one-out (k-NN), cross-validation (linear)."""
    test_split: str | None = None
    """Split of the test source; `null` = `data.split`. Given alone, it is one of `data.source`."""
    feature: Literal["cls", "mean"] = "mean"
    """What stands for a picture: the class token, or the mean of the patch tokens."""
    k: int = 20
    """Neighbours that vote in the k-NN."""
    temperature: float = 0.07
    """Temperature of the k-NN's weights."""
    folds: int = 5
    """Folds of the cross-validation."""
    crop_pct: float = 0.875
    """Share of the resized picture's sides that the centre crop keeps: .875 = resize to 256, crop to 224. Where
    encoder.pretrained is given, that of these weights unless set."""
    batch_size: int = 256
    """Pictures encoded at once."""
    max_images: int | None = 10_000
    """Evaluate on a seeded random subset of at most so many pictures of each source; `null` = all."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "pictures_every_steps", "max_images"):
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
        clamp_rounding(self, "crop_pct")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct={self.crop_pct!r}: must lie in (0, 1]; 1 keeps the largest centre crop")


class Split(NamedTuple):
    """Rows of the sources that an evaluation learns from and is tested on, and their classes."""

    rows: Int[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    test_rows: Int[np.ndarray, " m"] | None
    """None: there is no test source."""
    test_labels: Int[np.ndarray, " m"] | None
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1

    def keep(self, places: Int[np.ndarray, " k"]) -> "Split":
        """The same with some of the rows to learn from."""
        return self._replace(rows=self.rows[places], labels=self.labels[places])

    def keep_test(self, places: Int[np.ndarray, " k"]) -> "Split":
        """The same with some of the rows to test on."""
        assert self.test_rows is not None
        assert self.test_labels is not None
        return self._replace(test_rows=self.test_rows[places], test_labels=self.test_labels[places])


def split_sources(
    train_source: Source,
    test_source: Source | None,
    max_images: int | None,
    seed: int = 0,
    setting: str = "evaluation.source",
) -> Split:
    """Choose the labelled pictures that count; of variants of one picture the first alone.

    Test labels are those of the training source, see `align_classes`.

    Args:
        max_images: a seeded random subset of at most so many of each source, each class with its share; None = all.
        setting: that named the training source, for what is said of it.

    Raises:
        ValueError: no labels, fewer than two classes, classes in the test set that the training set lacks, or no test
            set and no class of more than one picture.
    """
    labels = _labels(train_source, setting)
    rows = _subset(train_source, labels, max_images, seed)
    _check_classes(labels[rows], train_source, setting)
    if test_source is None:
        _check_repeats(labels[rows], train_source, setting)
        return Split(rows, labels[rows], None, None, train_source.class_names)
    test_source = align_classes(train_source, test_source)
    test_labels = _labels(test_source, "evaluation.test_source")
    test_rows = _subset(test_source, test_labels, max_images, seed)
    _check_test_classes(labels[rows], test_labels[test_rows], train_source.class_names)
    return Split(rows, labels[rows], test_rows, test_labels[test_rows], train_source.class_names)


def align_classes(train_source: Source, test_source: Source) -> Source:
    """The test source with the classes of the training source, matched by name, however its letters are composed.

    Raises:
        ValueError: pictures of classes that the training source does not know.
    """
    names, test_names = train_source.class_names, test_source.class_names
    if test_source.labels is None or not names or not test_names or names == test_names:
        return test_source
    number = {normalize("NFC", name): index for index, name in enumerate(names)}
    wanted = [normalize("NFC", name) for name in test_names]
    present = np.unique(test_source.labels[test_source.labels >= 0])
    unknown = [test_names[label] for label in present.tolist() if wanted[label] not in number]
    if unknown:
        raise ValueError(
            f"evaluation.test_source={test_source.name!r}: has classes that the training source "
            f"{train_source.name!r} lacks: {_listed(unknown)}; there it is {_listed(names)}: rename them, or add "
            "labelled pictures of them to the training source"
        )
    found = np.array([number.get(name, -1) for name in wanted], dtype=np.int64)
    labels = np.where(test_source.labels >= 0, found[test_source.labels], -1)
    return replace(test_source, labels=labels, class_names=names)


def cross_validate(
    labels: Int[np.ndarray, " n"],
    folds: int,
    seed: int,
    predict: Callable[[Int[Tensor, " r"], Int[Tensor, " s"]], Int[np.ndarray, " s"]],
) -> Int[np.ndarray, " n"]:
    """Predict every row once, by a classifier that has seen none of its fold.

    Args:
        labels: classes, by which the folds are stratified.
        folds: how many; at most one for each row is used.
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

    With a test set the probes learn from `features` and predict the test set. Without one every picture is predicted
    once: in the k-NN by all others (leave-one-out), in the linear probe by one that has seen none of its fold.

    Args:
        features, labels: the pictures to learn from, and those to test on where there is no test set.
        test_features, test_labels: the test set.
        k, temperature: of the k-NN.
        folds: of the cross-validation.
        seed: draws the folds and what the linear probe holds out to choose its strength.

    Returns:
        the scores "knn" and "linear", over the same pictures in the same order.

    Raises:
        ValueError: features that are not finite.
    """
    check_finite(features)
    targets = torch.from_numpy(labels).to(features.device)
    num_classes = int(labels.max()) + 1
    neighbours = {"num_classes": num_classes, "ks": (k,), "temperature": temperature}
    if test_features is not None and test_labels is not None:
        check_finite(test_features)
        knn = knn_predict(features, targets, test_features, **neighbours)[k].cpu().numpy()
        linear = logistic_predict(features, targets, test_features, num_classes=num_classes, seed=seed)
        return {"knn": Score.of(test_labels, knn), "linear": Score.of(test_labels, linear.cpu().numpy())}

    def predict(train_rows: Tensor, test_rows: Tensor) -> np.ndarray:
        train, train_targets = features[train_rows], targets[train_rows.to(targets.device)]
        found = logistic_predict(train, train_targets, features[test_rows], num_classes=num_classes, seed=seed)
        return found.cpu().numpy()

    knn = knn_predict(features, targets, None, **neighbours)[k].cpu().numpy()
    return {"knn": Score.of(labels, knn), "linear": Score.of(labels, cross_validate(labels, folds, seed, predict))}


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
    """Score an encoder's features: `extract_features`, then `evaluate_features`, on the GPU where that is the device.

    Every process calls this and encodes its share; only the main one is given the scores.

    Args:
        encoder: the backbone, already on `device`.
        train_source: labelled pictures for the probes.
        test_source: labelled pictures to test on; None = see `evaluate_features`.
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
    """Score raw pixels on the pictures, crops and folds that `evaluate_encoder` uses with these arguments.

    The main process does it, the others return nothing.
    """

    def shrink(source: Source, rows: np.ndarray) -> Tensor:
        if process_index() != 0:
            return torch.empty(0)
        return pixel_features(source, rows, num_channels, crop_pct=config.crop_pct, num_workers=num_workers)["mean"]

    return _evaluate(shrink, train_source, test_source, config, seed)


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
) -> dict[str, Score]:
    # Everything that can be wrong with the labels is found before the first picture is decoded.
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
            f"{setting}={source.name!r}: has no labels, and evaluating needs them: "
            f"{source.unlabelled or 'name a labelled source'}"
        )
    return source.labels


def _check_classes(labels: np.ndarray, source: Source, setting: str) -> None:
    present = np.unique(labels)
    if len(present) == 1:
        raise ValueError(
            f"{setting}={source.name!r}: all {len(labels)} labelled pictures are of class "
            f"{class_name(int(present[0]), source.class_names)!r}: an evaluation needs at least two classes"
        )


def _check_repeats(labels: np.ndarray, source: Source, setting: str) -> None:
    if np.bincount(labels).max() < 2:
        raise ValueError(
            f"{setting}={source.name!r}: each of the {len(labels)} labelled pictures has a class of its own, "
            "so none can be told by another one. If the labels are identifiers, name the column of classes in "
            "data.label_column; else name a test source, or raise evaluation.max_images where it is set"
        )


def _check_test_classes(labels: np.ndarray, test_labels: np.ndarray, class_names: Sequence[str]) -> None:
    if len(test_labels) == 0:
        raise ValueError("no picture of the test set has a label: test on a labelled source")
    missing = np.setdiff1d(test_labels, labels)
    if len(missing):
        names = _listed([class_name(label, class_names) for label in missing.tolist()])
        raise ValueError(
            f"the test set has classes that the training set lacks: {names}; add labelled pictures of "
            "them to the training source, or raise evaluation.max_images where it is set"
        )


def _listed(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
