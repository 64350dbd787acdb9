"""What a run ends with: a backbone, scores beside an untrained one and raw pixels, and a figure."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from accelerate import Accelerator

from ssl_vit.core.distributed import process_index
from ssl_vit.core.machine import autocast_dtype
from ssl_vit.core.settings import renamed_settings
from ssl_vit.core.text import plain
from ssl_vit.data.augment.device import normalize
from ssl_vit.data.augment.evaluation import EvalTransform, centre_crop
from ssl_vit.data.bad_images import leave_out_bad
from ssl_vit.data.sources.source import DataConfig, Source, open_source
from ssl_vit.data.sources.stream import Stream
from ssl_vit.data.workers import choose_num_workers
from ssl_vit.evaluation.evaluate import evaluate_encoder, evaluate_pixels
from ssl_vit.evaluation.features import EncodeSettings
from ssl_vit.evaluation.scores import Gain, Score, format_table, scores_to_json
from ssl_vit.evaluation.splits import check_apart, split_sources
from ssl_vit.evaluation.start import first_fall, what_to_change
from ssl_vit.evaluation.untrained import untrained_encoder
from ssl_vit.models.encoder import Encoder, eval_mode
from ssl_vit.models.weights.backbone import BACKBONE_FILE, export_backbone
from ssl_vit.objectives.objective import Objective, Reconstructs
from ssl_vit.runs.best import Best
from ssl_vit.runs.folder import METRICS_FILE, PICTURES_FOLDER, RESULTS_FILE, write_results
from ssl_vit.runs.provenance import facts, provenance
from ssl_vit.runs.trained import Trained
from ssl_vit.training.config import RunConfig, as_stored
from ssl_vit.training.faults import by_product
from ssl_vit.training.observe.metrics import MetricLog

NUM_IMAGES = 8
NEIGHBOURS_FILE = "neighbours.png"
LEAST_GALLERY = 200  # images among which neighbours are worth a look
MOST_GALLERY = 1000  # images that are decoded and encoded for it
UNTRAINED_SEEDS = 3  # the verdict uses their mean; each costs one more encoding of the labelled images


class EvalSources(NamedTuple):
    """Labelled images that probes learn from, and those they are tested on (None: cross-validation)."""

    labelled: Source
    test: Source | None


def evaluate_in_training(
    config: RunConfig, accelerator: Accelerator, objective: Objective, eval_data: EvalSources, step: int, log: MetricLog
) -> None:
    """Score the backbone as it is now: all processes encode, the main one scores."""
    eval_data = _readable(config, accelerator, eval_data, objective.encoder.in_chans)
    scores = _evaluate(objective.backbone(), config, eval_data, accelerator)
    if accelerator.is_main_process:
        log.write({"step": step, **{f"eval_{name}": score.accuracy for name, score in scores.items()}})
        log.report(f"step {step}  " + "  ".join(f"{name} {score.accuracy:.1%}" for name, score in scores.items()))
        fall = first_fall(log.scores(), next(iter(scores.values())).n)
        if fall is not None and fall[0] == step:  # said once
            log.report(f"WARNING: at step {step:,} {fall[1]}. {advice(config)}")
    accelerator.wait_for_everyone()


def is_figure_due(config: RunConfig, step: int, num_steps: int) -> bool:
    """Whether to draw a figure at this step."""
    every = config.evaluation.pictures_every_steps
    return every is not None and (step % every == 0 or step == num_steps)


def draw_in_training(
    config: RunConfig,
    accelerator: Accelerator,
    objective: Objective,
    source: Source | Stream,
    step: int,
    log: MetricLog,
) -> None:
    """Draw a figure of the state before `step`, always of the same images and masks.

    Only the main process draws, from random numbers of its own, which training does not use.
    """
    if not accelerator.is_main_process:
        return
    path = Path(config.output_dir) / PICTURES_FOLDER / f"step-{step:08d}.webp"
    if step == log.start_step and path.exists():  # drawn before the run was interrupted
        return
    if draw(config, objective, source, path, accelerator.device, num_images=4):
        log.figure(path, step)


def finish(
    config: RunConfig,
    accelerator: Accelerator,
    objective: Objective,
    source: Source | Stream,
    eval_data: EvalSources | None,
    step: int,
    collapse: str = "",
    best: Best | None = None,
) -> None:
    """Export the backbone, draw the figure and print the scores; all processes encode, the main one does the rest.

    A figure or scores that fail are left out with a warning; scores on a source that was named end the run.
    """
    folder = Path(config.output_dir)
    backbone = objective.backbone()
    written = []
    if accelerator.is_main_process:
        known = facts(objective, source, accelerator.device, accelerator.num_processes)
        known |= {"step": step, "faults": {"collapse": collapse}}
        if best is not None:
            known |= {"step": best.step, "best": {**best.to_plain(), "of_steps": step}}
        export_backbone(
            backbone,
            folder,
            normalization=config.data.normalization,
            provenance=provenance(as_stored(config), known),
            crop_pct=config.evaluation.crop_pct,
        )
        written = [f"backbone   {folder / BACKBONE_FILE} (+ config.json)", f"metrics    {folder / METRICS_FILE}"]
        figure = folder / objective.figure_file
        with by_product(f"figure {figure}"):
            if draw(config, objective, source, figure, accelerator.device):
                written.insert(1, f"figure     {figure}")
        if _has_neighbours(source) and not isinstance(objective, Reconstructs):
            figure = folder / NEIGHBOURS_FILE
            with by_product(f"figure {figure}"):
                _draw_neighbours(config, backbone, source, figure)
                written.insert(1, f"figure     {figure}")
    scores: dict[str, Any] = {"scores": None}
    streamed = "a stream has no labelled images; evaluation.source can name some"
    why = streamed if isinstance(source, Stream) else _why_none(config, source)
    if eval_data is not None:
        why = "they could not be computed"
        settings = config.evaluation
        named = settings.source is not None or settings.test_source is not None or settings.test_split is not None
        with nullcontext() if named else by_product("scores", shared=True):
            eval_data = _readable(config, accelerator, eval_data, objective.encoder.in_chans)
            scores, text = compare(config, accelerator, backbone, eval_data)
            written.append(f"scores     {folder / RESULTS_FILE}")
    if scores.get("scores", ...) is None:
        text = f"No scores: {plain(why)}. `ssl-vit probe knn` takes a labelled source."
    if accelerator.is_main_process:
        of_best = {} if best is None else {"best": best.to_plain()}
        write_results(folder, {"step": step, **of_best, **scores, **({"collapse": collapse} if collapse else {})})
    accelerator.print("\n".join([text, *written]), flush=True)
    accelerator.wait_for_everyone()


def draw(
    config: RunConfig,
    objective: Objective,
    source: Source | Stream,
    path: Path,
    device: torch.device,
    num_images: int = NUM_IMAGES,
) -> bool:
    """Draw what was learned about a few images, the same ones for the same seed; of a stream, its first ones.

    Returns:
        Whether there was anything to draw.
    """
    from ssl_vit.visualize.preview import draw_preview  # matplotlib takes a second to import

    encoder = objective.encoder
    rng = np.random.default_rng((config.seed, 2))
    if isinstance(source, Stream):
        decoded = source.first_images(num_images, encoder.in_chans)
    else:
        chosen = rng.choice(len(source), size=min(NUM_IMAGES, len(source)), replace=False)
        decoded = [
            source.next_image(int(index), encoder.in_chans)[0]
            if config.data.on_bad_image == "skip"
            else source.image(int(index), encoder.in_chans)
            for index in chosen[:num_images]
        ]
    size, crop_pct = encoder.image_size, config.evaluation.crop_pct
    images = torch.stack([centre_crop(image, size, crop_pct) for image in decoded])
    objective.eval()
    try:
        normalised = normalize(images.to(device), config.data.normalization)
        preview = objective.preview(normalised, rng)
    finally:
        objective.train()
    if preview is None:
        return False
    draw_preview(preview, normalised, config.data.normalization, path)
    return True


def _has_neighbours(source: Source | Stream) -> TypeGuard[Source]:
    """Whether neighbours say something: not of few images, nor of tiles, which lie beside each other in an image."""
    return isinstance(source, Source) and source.tiles is None and len(source) >= LEAST_GALLERY


def _draw_neighbours(config: RunConfig, backbone: Encoder, source: Source, path: Path) -> None:
    """Draw a few images beside those whose features are nearest: what an objective has learned that draws nothing."""
    from ssl_vit.visualize.inputs import ShownImages
    from ssl_vit.visualize.neighbours import draw_neighbours

    rng = np.random.default_rng((config.seed, 3))
    evaluation, normalization = config.evaluation, config.data.normalization
    rows = rng.choice(len(source), size=NUM_IMAGES, replace=False).tolist()
    decoded = [source.next_image(row, backbone.in_chans) for row in rows]
    cropped = [centre_crop(image, backbone.image_size, evaluation.crop_pct) for image, _ in decoded]
    shown = ShownImages(
        normalize(torch.stack(cropped), normalization),
        tuple(str(row) for _, row in decoded),
        source,
        tuple(row for _, row in decoded),
    )
    trained = Trained(backbone, normalization, evaluation.crop_pct, {"pooled": evaluation.feature}, path.parent)
    with eval_mode(backbone):
        draw_neighbours(trained, shown, source, path, most=MOST_GALLERY, seed=config.seed)


def compare(
    config: RunConfig,
    accelerator: Accelerator,
    trained: Encoder,
    eval_data: EvalSources,
) -> tuple[dict[str, Any], str]:
    """Score raw pixels, the backbone at the start and the trained one: numbers for results.json, and a table as text.

    Fresh weights are scored for `UNTRAINED_SEEDS` seeds, those of the run first: the table shows these, and the verdict
    is about the mean of all. Every process calls this; only the main one gets the scores. A baseline that fails is left
    out with a warning.
    """
    start = "untrained" if config.encoder.pretrained is None else "pretrained"
    rows: dict[str, dict[str, Score]] = {}
    before = []
    with by_product("scores of raw pixels", shared=True):
        rows["raw pixels"] = evaluate_pixels(
            *eval_data, config.evaluation, num_channels=trained.in_chans, seed=config.seed
        )
    with by_product(f"scores of the {start} backbone", shared=True):
        for number in range(UNTRAINED_SEEDS if start == "untrained" else 1):
            if start == "untrained":
                encoder = untrained_encoder(config.encoder, config.objective, config.seed + number)
            else:
                encoder = config.build_objective().backbone()
            before.append(_evaluate(encoder.to(accelerator.device), config, eval_data, accelerator))
        rows[start] = before[0]
    rows["trained"] = _evaluate(trained, config, eval_data, accelerator)
    if not accelerator.is_main_process:
        return {}, ""
    results: dict[str, Any] = {"scores": scores_to_json(rows), "judged_on": _judged_on(config, eval_data)}
    lines = [format_table(rows, {"knn": f"k-NN (k={config.evaluation.k})"})]
    baselines = {start: before if start in rows else [], "raw pixels": [rows[n] for n in rows if n == "raw pixels"]}
    for baseline, scores in ((name, scores) for name, scores in baselines.items() if scores):
        gains = {name: Gain.of(score, [other[name] for other in scores]) for name, score in rows["trained"].items()}
        key = baseline.replace(" ", "_")
        results[f"trained_minus_{key}"] = {name: gain.to_json() for name, gain in gains.items()}
        if len(scores) > 1:
            results[f"{key}_seeds"] = {
                name: {"mean": float(np.mean(gain.others)), "std": float(np.std(gain.others, ddof=1))}
                | {"accuracies": list(gain.others)}
                for name, gain in gains.items()
            }
        lines += [f"{name}: trained - {gain.sentence(baseline)}" for name, gain in gains.items()]
        if baseline == "pretrained" and any(gain.high < 0 for gain in gains.values()):
            lines.append(f"WARNING: the weights that the run started from are better. {advice(config)}")
    return results, "\n".join(lines)


def advice(config: RunConfig) -> str:
    """What a run that fell below the weights that it started from should set otherwise."""
    settings = as_stored(config)
    return f"To keep what they know: {what_to_change(settings['optim'], settings['objective'])}."


def _why_none(config: RunConfig, source: Source) -> str:
    if source.labels is not None:
        return "the labels cannot be used; the note at the start says why"
    return f"the source has no labels: {source.unlabelled}"


def _judged_on(config: RunConfig, eval_data: EvalSources) -> dict[str, Any]:
    """What the scores were measured on, for results.json and the model card."""
    split = split_sources(*eval_data, config.evaluation.max_images, config.seed)
    tested = split.labels if split.test_labels is None else split.test_labels
    return {
        "source": eval_data.labelled.name,
        "split": config.data.split,
        "test_source": None if eval_data.test is None else eval_data.test.name,
        "test_split": None if eval_data.test is None else config.evaluation.test_split or config.data.split,
        "num_train": len(split.labels),
        "num_test": len(tested),
        "num_classes": split.num_classes,
    }


def prepare(config: RunConfig, source: Source | Stream) -> tuple[Source | Stream, EvalSources | None]:
    """The images to learn from, all of them, and the labelled images that the run is scored on, if there are any.

    A run on a stream is evaluated only on `evaluation.source`.

    Raises:
        ValueError: a source that was named for it cannot be used.
    """
    settings = config.evaluation
    if isinstance(source, Stream) and settings.source is None:
        if process_index() == 0:
            print("note       no scores at the end: a stream needs evaluation.source, which is not set")
        return source, None
    test = open_test_source(config)
    named = settings.source is not None or test is not None
    if isinstance(source, Source) and source.labels is None and not named:
        return source, None
    labelled, setting = source, "data.source"
    if settings.source is not None:
        setting = "evaluation.source"
        with renamed_settings({"data.source": setting}):
            may_lack = ("split", "columns") if settings.source != config.data.source else ()
            labelled = open_source(_judging(config, settings.source), may_lack=may_lack)
    assert isinstance(labelled, Source)
    try:
        split_sources(labelled, test, settings.max_images, config.seed, setting)
        check_apart(labelled, test)
    except ValueError as error:
        if named:
            raise
        if process_index() == 0:
            print(f"note       no scores at the end: {plain(error)}")
        return source, None
    return source, EvalSources(labelled, test)


def open_test_source(config: RunConfig) -> Source | None:
    """The labelled images that a run is tested on; None if none are named."""
    settings = config.evaluation
    if settings.test_source is None and settings.test_split is None:
        return None
    data = _judging(config, settings.test_source or config.data.source)
    names = {"source": settings.test_source, "split": settings.test_split}
    may_lack = ("split", "columns") if settings.test_source not in (None, config.data.source) else ()
    if settings.test_split is not None:
        may_lack = may_lack[1:]
    with renamed_settings(
        {f"data.{name}": f"evaluation.test_{name}" for name, given in names.items() if given is not None}
    ):
        data = dataclasses.replace(data, split=settings.test_split or data.split)
        return open_source(data, may_lack=may_lack)


def _judging(config: RunConfig, source: str | dict[str, float]) -> DataConfig:
    # `none` is said of the images that are learned from, and so is what is said of streams.
    column = None if config.data.label_column == "none" else config.data.label_column
    return dataclasses.replace(config.data, source=source, label_column=column, streaming=False, num_samples=None)


def _readable(config: RunConfig, accelerator: Accelerator, eval_data: EvalSources, num_channels: int) -> EvalSources:
    """The labelled images, chosen as always, without those that cannot be decoded if bad images are skipped."""
    if config.data.on_bad_image == "raise":
        return eval_data
    split = split_sources(*eval_data, config.evaluation.max_images, config.seed)
    num_workers = choose_num_workers(config.data.num_workers, accelerator.device)
    rows = {"labelled": split.rows, "test": split.test_rows}
    found = {}
    for name, source in eval_data._asdict().items():
        if source is not None:
            chosen = source.subset(rows[name])
            readable = leave_out_bad(chosen, num_channels, num_workers)
            found[name] = source if readable is chosen else readable
    return eval_data._replace(**found)


def _evaluate(
    encoder: Encoder, config: RunConfig, eval_data: EvalSources, accelerator: Accelerator
) -> dict[str, Score]:
    return evaluate_encoder(
        encoder,
        *eval_data,
        config.evaluation,
        eval_transform(config, encoder),
        encode_settings(config, accelerator),
        seed=config.seed,
    )


def eval_transform(config: RunConfig, encoder: Encoder) -> EvalTransform:
    """The centre crop that images are evaluated on."""
    return EvalTransform(encoder.image_size, config.data.normalization, config.evaluation.crop_pct)


def encode_settings(config: RunConfig, accelerator: Accelerator) -> EncodeSettings:
    """How a run encodes images to evaluate."""
    device = accelerator.device
    num_workers = choose_num_workers(config.data.num_workers, device)
    return EncodeSettings(
        config.evaluation.batch_size, device, num_workers, autocast_dtype(accelerator.mixed_precision)
    )
