"""Score a backbone by k-NN, linear probe, few-shot classification and retrieval: the scripts call these functions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ssl_vit.core.distributed import process_index
from ssl_vit.core.settings import check_given, check_ranges
from ssl_vit.evaluation import linear_probe
from ssl_vit.evaluation.command import LabelledConfig
from ssl_vit.evaluation.evaluate import cross_validate
from ssl_vit.evaluation.features import check_feature, num_layers_for, select_feature, take
from ssl_vit.evaluation.few_shot import FewShot, few_shot, most_shots
from ssl_vit.evaluation.knn import knn_predict
from ssl_vit.evaluation.linear_probe import LinearProbeConfig
from ssl_vit.evaluation.logistic import logistic_predict
from ssl_vit.evaluation.retrieval import Retrieval, retrieve
from ssl_vit.evaluation.scores import Score, format_classes, format_table, lay_out, per_class, scores_to_json
from ssl_vit.evaluation.task import Task


@dataclass(frozen=True)
class KNNConfig(LabelledConfig):
    """Weighted k-NN."""

    feature: str | None = None
    """Feature of an image: cls, mean, cls+mean, cls4 or cls4+mean; `null` = mean for MAE, else cls."""
    ks: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours that vote."""
    temperature: float = 0.07
    """Temperature of the votes' weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_feature(self.feature)
        check_given(self, "ks")
        check_ranges(self, ks="[1, inf)", temperature="(0, inf); the usual value is 0.07")


@dataclass(frozen=True)
class RetrievalConfig(LabelledConfig):
    """Retrieval; the source is the gallery, the test source the queries."""

    feature: str | None = None
    """Feature of an image: cls, mean, cls+mean, cls4 or cls4+mean; `null` = mean for MAE, else cls."""
    ks: tuple[int, ...] = (1, 5, 10)
    """Numbers of nearest images for recall@k."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_feature(self.feature)
        check_given(self, "ks")
        check_ranges(self, ks="[1, inf)")


@dataclass(frozen=True)
class LinearConfig(LabelledConfig):
    """Linear probe, few-shot classification, and both together."""

    logistic: bool = False
    """Fit a logistic regression to its optimum instead of training heads: for small data, on `feature` alone."""
    feature: str | None = None
    """Feature for the logistic regression and the few-shot classification; `null` = mean for MAE, else cls."""
    shots: tuple[int, ...] = (1, 5, 10)
    """Labelled images of each class for few-shot classification; [] = none."""
    draws: int = 5
    """How many times these images are drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_feature(self.feature)
        check_ranges(self, shots="[1, inf)", draws="[1, inf)")


def evaluate_knn(path: Path, config: KNNConfig) -> None:
    """Score a backbone by k-NN for several k: a table, and a JSON file."""
    task = Task.open(path, config)
    feature = config.feature or task.backbone.feature
    rows: dict[str, dict[str, Score]] = {}
    for name, train, test in _features(task, feature):
        split = task.split  # without the images that could not be decoded
        labels = torch.from_numpy(split.labels).to(train.device)
        predictions = knn_predict(
            train, labels, test, num_classes=split.num_classes, ks=config.ks, temperature=config.temperature
        )
        rows[name] = {f"k={k}": Score.of(split.scored_labels, found.cpu().numpy()) for k, found in predictions.items()}
    if process_index() == 0:
        print(format_table(rows))
        task.write("knn.json", {"feature": feature, **scores_to_json(rows)})


def evaluate_retrieval(path: Path, config: RetrievalConfig) -> None:
    """Score a backbone by retrieval: a table, and a JSON file."""
    task = Task.open(path, config)
    feature = config.feature or task.backbone.feature
    found: dict[str, Retrieval] = {}
    for name, gallery, queries in _features(task, feature):
        found[name] = retrieve(gallery, task.split.labels, queries, task.split.test_labels, ks=config.ks)
    if process_index() == 0:
        lines = [["%", "mAP", *(f"recall@{k}" for k in config.ks), "queries"]]
        for name, item in found.items():
            shares = [item.mean_average_precision, *item.recall.values()]
            lines.append([name, *(f"{100 * share:.1f}" for share in shares), str(item.num_queries)])
        print(lay_out(lines))
        rows = {name: item._asdict() for name, item in found.items()}
        task.write("retrieval.json", {"feature": feature, **rows})


def _features(task: Task, feature: str) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield the name and the training and test features of each baseline and of the backbone, in the main process."""
    for name in (*task.config.baselines, "backbone"):
        train, test = task.features(name, num_layers_for([feature], task.backbone.encoder))
        if process_index() == 0:
            yield name, *_select(task, name, feature, train[0], test)


def _select(
    task: Task, name: str, feature: str, train: Mapping[str, Tensor], test: Mapping[str, Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """Select one kind of feature and move it to the device; pixels have one kind alone."""
    kind, device = "mean" if name == "pixels" else feature, task.backbone.settings.device
    return select_feature(train, kind).to(device), None if test is None else select_feature(test, kind).to(device)


def evaluate_linear(path: Path, config: LinearConfig, probe: LinearProbeConfig) -> None:
    """Score a backbone by a linear probe and from few labels: tables, and a JSON file.

    Raises:
        ValueError: settings of heads for a logistic regression, which has none.
    """
    if config.logistic and probe != LinearProbeConfig():
        raise ValueError("logistic=True: fits one regression and trains no heads; leave --protocol and --probe.* out")
    task = Task.open(path, config)
    feature = config.feature or task.backbone.feature
    kinds = [feature] if config.logistic else [feature, *probe.features]
    views = 0 if config.logistic else probe.views
    rows: dict[str, dict[str, Score]] = {}
    few: dict[str, list[FewShot]] = {}
    heads: dict[str, Any] = {}
    for name in (*config.baselines, "backbone"):
        train, test = task.features(name, num_layers_for(kinds, task.backbone.encoder), views)
        if process_index() == 0:
            score, heads[name] = _linear(task, name, feature, train, test, config, probe)
            rows[name] = {"linear": score}
            few[name] = _few_shot(task, *_select(task, name, feature, train[0], test), config)
    if process_index() != 0:
        return
    print(format_table(rows))
    for name, chosen in heads.items():
        if chosen is not None:
            edge = chosen["base_lr"] == max(probe.base_lrs) and len(probe.base_lrs) > 1
            hint = ", the largest of the grid: try larger --probe.base_lrs or more --probe.epochs" if edge else ""
            why = "best on the held-out part is"
            if not chosen["held_out"]:
                why = "nothing was held out to choose a head, so it is"
            print(f"{name}: {why} {chosen['feature']} at base_lr {chosen['base_lr']:g}{hint}")
    classes = per_class(rows["backbone"]["linear"], task.split.class_names)
    print(f"\n{format_classes(classes)}")
    balanced = rows["backbone"]["linear"].balanced_accuracy
    print(f"balanced accuracy {100 * balanced:.1f} %")
    if few["backbone"]:
        print(f"\n{_format_few_shot(few, config.draws)}")
    most = most_shots(task.split.labels, task.test is not None)
    if lacking := [str(shots) for shots in config.shots if shots > most]:
        print(f"\nnot from {', '.join(lacking)} of each class: the smallest class has {most} to give")
    method = {} if config.logistic else {"probe": asdict(probe)}
    result = {"feature": feature, **method, **scores_to_json(rows), "heads": heads}
    result["few_shot"] = {name: [item._asdict() for item in items] for name, items in few.items()}
    result["classes"] = [item._asdict() for item in classes]
    task.write("linear.json", result)


def _linear(
    task: Task,
    name: str,
    feature: str,
    train: Sequence[Mapping[str, Tensor]],
    test: Mapping[str, Tensor] | None,
    config: LinearConfig,
    probe: LinearProbeConfig,
) -> tuple[Score, dict[str, Any] | None]:
    """Return the score of the linear probe and, where heads were trained, the one that was chosen."""
    split, device = task.split, task.backbone.settings.device
    if name == "pixels":
        probe = replace(probe, features=("mean",), views=0)
    elif feature in probe.features:  # the first is taken where nothing can be held out
        probe = replace(probe, features=tuple(dict.fromkeys((feature, *probe.features))))
    chosen: dict[str, Any] | None = None
    clean, views = train[0], list(train[1:]) or [train[0]]
    seed = config.seed

    def predict(fit: Tensor, query: Mapping[str, Tensor]) -> np.ndarray:
        nonlocal chosen
        labels = split.labels[fit.numpy()]
        if config.logistic:
            targets = torch.from_numpy(labels).to(device)
            known, asked = _select(task, name, feature, take(clean, fit), query)
            assert asked is not None
            return logistic_predict(known, targets, asked, num_classes=split.num_classes, seed=seed).cpu().numpy()
        total = linear_probe.num_steps(len(fit), probe)
        with tqdm(total=total, desc=f"linear probe, {name}", unit="step", leave=False, disable=None) as bar:
            result = linear_probe.linear_probe(
                [take(view, fit) for view in views],
                labels,
                query,
                probe,
                num_classes=split.num_classes,
                clean=take(clean, fit),
                seed=seed,
                device=device,
                on_step=bar.update,
            )
        if chosen is None:  # of a cross-validation the first fold's
            grid = [{"feature": key[0], "base_lr": key[1], "accuracy": share} for key, share in result.held_out.items()]
            chosen = {"feature": result.feature, "base_lr": result.base_lr, "held_out": grid}
        return result.predictions.numpy()

    if test is not None and split.test_labels is not None:
        return Score.of(split.test_labels, predict(torch.arange(len(split.labels)), test)), chosen
    predictions = cross_validate(split.labels, config.folds, seed, lambda fit, rows: predict(fit, take(clean, rows)))
    return Score.of(split.labels, predictions), chosen


def _few_shot(task: Task, train: Tensor, test: Tensor | None, config: LinearConfig) -> list[FewShot]:
    labels, test_labels = task.split.labels, task.split.test_labels
    most = most_shots(labels, test is not None)
    settings = {"num_draws": config.draws, "seed": config.seed}
    return [
        few_shot(train, labels, test, test_labels, shots=shots, **settings) for shots in config.shots if shots <= most
    ]


def _format_few_shot(few: Mapping[str, Sequence[FewShot]], draws: int) -> str:
    heading = [f"% from so few of each class, {draws} draws", *(str(item.shots) for item in next(iter(few.values())))]
    lines = [
        [name, *(f"{100 * item.mean:.1f} ± {100 * item.std:.1f}" for item in items)] for name, items in few.items()
    ]
    return lay_out([heading, *lines])
