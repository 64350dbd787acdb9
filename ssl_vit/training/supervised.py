"""Evaluate a run with labels: accuracy on a test set and, after fine-tuning, an exported classifier."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from ssl_vit.core.distributed import process_index
from ssl_vit.core.settings import as_plain
from ssl_vit.core.text import plain
from ssl_vit.data.sources.source import Source
from ssl_vit.data.sources.stream import Stream
from ssl_vit.evaluation.features import stream
from ssl_vit.evaluation.scores import Score, format_classes, format_table, per_class, scores_to_json
from ssl_vit.evaluation.splits import (
    PICK_FOLDS,
    TEST_FOLDS,
    align_classes,
    check_apart,
    held_out_rows,
    independent_rows,
    split_sources,
)
from ssl_vit.export.run import write_classifier
from ssl_vit.objectives.deit import check_class_names
from ssl_vit.objectives.finetune import FineTune, FineTuneConfig, Supervised
from ssl_vit.runs.best import Best
from ssl_vit.runs.folder import METRICS_FILE, RESULTS_FILE, write_results
from ssl_vit.training.config import RunConfig
from ssl_vit.training.ending import encode_settings, eval_transform, open_test_source
from ssl_vit.training.observe.metrics import MetricLog


class EvalSplit(NamedTuple):
    """Labelled images that nothing was learned from."""

    test: Source
    pick: Source | None
    """Images that pick the best of several heads and are not tested; None with a single head."""
    test_name: str
    """Name of the test images in messages."""


def prepare(config: RunConfig, source: Source | Stream) -> tuple[Source, EvalSplit]:
    """Split a source into disjoint images to learn from, to pick among heads and to test on.

    Raises:
        ValueError: see `split_sources`.
    """
    settings, seed = config.evaluation, config.seed
    if isinstance(source, Stream):
        raise ValueError("data.streaming=True: the labels of a stream are not read; leave this setting out")
    if config.data.tile_size is not None:
        raise ValueError(
            f"data.tile_size={config.data.tile_size}: a class belongs to a whole image, so runs with labels learn from "
            "whole ones; leave this setting out"
        )
    if settings.source is not None:
        raise ValueError(
            f"evaluation.source={settings.source!r}: a run with labels learns from data.source; leave this setting out"
        )
    if getattr(config.objective, "keep_head", False) and config.encoder.pretrained is None:
        raise ValueError("objective.keep_head=True: name the classifier to go on from with encoder.pretrained")
    if config.encoder.pretrained is None and process_index() == 0:
        print("note       no encoder.pretrained is given, so the encoder starts from fresh weights")
    test = open_test_source(config)
    if test is not None:
        test = align_classes(source, test)
    # Only to check the labels: all labelled images are learned from, all pages of one file too.
    split_sources(source, test, None, seed, "data.source")
    check_apart(source, test)
    if isinstance(config.objective, FineTuneConfig) and config.objective.distils:
        check_class_names(str(config.objective.teacher), source.class_names)
    assert source.labels is not None
    train = source.subset(np.flatnonzero(source.labels >= 0))
    name = ""
    if test is None:
        train, test = _hold_out(train, TEST_FOLDS, seed, "for a test; give evaluation.test_source")
        name = f"a held-out {len(test) / (len(train) + len(test)):.0%} of {source.name}"
    pick = None
    if len(getattr(config.objective, "lr_scales", ())) > 1:
        train, pick = _hold_out(train, PICK_FOLDS, seed + 1, "to choose among objective.lr_scales; give one")
    assert test.labels is not None
    rows = independent_rows(test.labels, test.groups)
    if settings.max_images is not None and len(rows) > settings.max_images:
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[: settings.max_images])
    return train, EvalSplit(test.subset(rows), pick, name or test.name)


def _hold_out(source: Source, folds: int, seed: int, why: str) -> tuple[Source, Source]:
    assert source.labels is not None
    held_out = held_out_rows(source.labels, source.groups, folds, seed)
    if not held_out.any():
        raise ValueError(f"data.source={source.name!r}: too few images of each class to hold some out {why}")
    return source.subset(np.flatnonzero(~held_out)), source.subset(np.flatnonzero(held_out))


def evaluate_in_training(
    config: RunConfig, accelerator: Accelerator, objective: Supervised, eval_data: EvalSplit, step: int, log: MetricLog
) -> None:
    """Test the current classifier, only for the log: nothing is chosen by this score."""
    scores = _test(config, accelerator, objective, eval_data.test)
    if accelerator.is_main_process:
        log.write({"step": step, **{f"eval_{name}": score.accuracy for name, score in scores.items()}})
        log.report(
            f"step {step}  test accuracy  " + "  ".join(f"{name} {s.accuracy:.1%}" for name, s in scores.items())
        )
    accelerator.wait_for_everyone()


def finish(
    config: RunConfig,
    accelerator: Accelerator,
    objective: Supervised,
    source: Source | Stream,
    eval_data: EvalSplit,
    step: int,
    collapse: str = "",
    best: Best | None = None,
) -> None:
    """Pick the best head, test it, print the tables, and export the classifier of a fine-tuning."""
    folder = Path(config.output_dir)
    picked = {} if eval_data.pick is None else _test(config, accelerator, objective, eval_data.pick)
    scores = _test(config, accelerator, objective, eval_data.test)
    if accelerator.is_main_process:
        head = max(picked, key=lambda name: picked[name].accuracy) if picked else next(iter(scores))
        classes = per_class(scores[head], source.class_names)
        kind = "fine-tuned" if isinstance(objective, FineTune) else "attentive"
        rows = {kind: {"test": scores[head]}}
        print(f"tested on {plain(eval_data.test_name)}\n{format_table(rows)}")
        if picked:
            shown = ", ".join(f"{name} {score.accuracy:.1%}" for name, score in picked.items())
            print(f"{head} was picked on {len(eval_data.pick or ())} held-out training images: {shown}")
        print(f"\n{format_classes(classes)}\nbalanced accuracy {100 * scores[head].balanced_accuracy:.1f} %")
        written = [f"scores     {folder / RESULTS_FILE}", f"metrics    {folder / METRICS_FILE}"]
        if isinstance(objective, FineTune):
            file = write_classifier(objective, as_plain(config), source.class_names, step, folder)
            written.insert(0, f"classifier {file} (+ config.json)")
        results: dict[str, Any] = {
            "step": step,
            "source": source.name,
            "test_source": eval_data.test_name,
            "num_train": source.num_samples,
            "num_test": scores[head].n,
            "num_classes": len(source.class_names),
            "pretrained": config.encoder.pretrained,
            "teacher": getattr(config.objective, "teacher", None),
            "scores": scores_to_json(rows),
            "picked_on_held_out": {name: score.accuracy for name, score in picked.items()},
            "classes": [item._asdict() for item in classes],
        }
        write_results(folder, results)
        print("\n".join(written), flush=True)
    accelerator.wait_for_everyone()


def _test(config: RunConfig, accelerator: Accelerator, objective: Supervised, source: Source) -> dict[str, Score]:
    """Score each head; every process calls this, only the main one returns scores."""
    encoder = objective.encoder

    def classify(images: Tensor) -> dict[str, Tensor]:
        return {name: values.argmax(dim=1) for name, values in objective.logits(images).items()}

    batches = stream(
        classify,
        objective,
        source,
        np.arange(len(source)),
        eval_transform(config, encoder),
        encode_settings(config, accelerator),
        encoder.in_chans,
        skip_bad=config.data.on_bad_image == "skip",
    )
    parts: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for name, values in batch.items():
            parts.setdefault(name, []).append(values.numpy())
    found = {name: np.concatenate(values) for name, values in parts.items()}
    good = found.pop("good", np.zeros(0, dtype=bool))  # empty but in the main process
    assert source.labels is not None
    if len(good) and not good.any():
        raise ValueError(f"{source.where(0)}: this and all other test images cannot be decoded")
    if not good.all():
        print(f"note       {(~good).sum():,} of the {len(good):,} test images cannot be decoded and are left out")
    return {name: Score.of(source.labels[good], values[good]) for name, values in found.items()}
