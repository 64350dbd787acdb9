"""Reads a sample of a source, builds the run that a config makes of it, measures and judges."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import psutil
import torch

from ssl_vit.core.machine import device_name, num_cpus, use_all_cpus
from ssl_vit.data.decode.formats import Contents
from ssl_vit.data.sources.source import Source
from ssl_vit.data.tiles import cut_into_tiles
from ssl_vit.data.transform import pair
from ssl_vit.doctor.cost import PacedStep, measure_crops, measure_step, pace
from ssl_vit.doctor.facts import Facts, RunFacts, Sizes
from ssl_vit.doctor.findings import (
    channels_to_read,
    normalisation,
    problems_of_images,
    suggested_channels,
    warnings_of_images,
    warnings_of_run,
)
from ssl_vit.doctor.images import Images, choose_rows, count_labels, read_images
from ssl_vit.training.config import RunConfig
from ssl_vit.training.device.memory import build_on_meta, model_memory

Measure = Literal["auto", "true", "false"]
_CROPPED = 64  # images whose crops are timed
_SMALL_MODEL = 50_000_000  # trainable parameters up to which a step is measured on a CPU unasked


def diagnose(
    config: RunConfig, source: Source, *, sample: int | None, step: Measure = "auto", adopts: bool = False
) -> Facts:
    """Read a sample of the images, build the model, measure, and judge.

    Args:
        config: a run's settings.
        source: what `config.data` names.
        sample: images to read; None for all.
        step: whether to measure a training step; auto: with a GPU, or if the model is small.
        adopts: whether the run is judged with the mean, deviation and channels that were measured.

    Returns:
        The same facts for the same arguments, but for rates and what follows from them.
    """
    load = psutil.getloadavg()[0] / (psutil.cpu_count() or 1)  # before any of ours
    learned = cut_into_tiles(source, config.data)
    rows = choose_rows(len(source), sample, config.seed)
    labels = count_labels(source)
    with _threads_restored():
        torch.set_num_threads(1)  # as in a loader's worker
        images = read_images(source, rows, channels_to_read(config, source, rows))
    settings = suggest_settings(config, images)
    judged = config
    if settings is not None and (adopts or images.num_channels != config.encoder.in_chans):
        judged = adopt(config, settings)
    run, problems, warnings = _examine_run(judged, learned, rows, images, step)
    return Facts(
        source=source.name,
        notes=list(learned.notes),
        num_images=len(source),
        num_read=images.num_read,
        sizes=_sizes(images),
        files=_counts(images.files, _as_text),
        formats=_counts(images.files, lambda held: held.format),
        channels=_counts(images.contents, lambda held: held.kind),
        num_16_bit=images.count(lambda held: held.bits == 16),
        dropped=dict(images.dropped.most_common()),
        unreadable=images.unreadable,
        duplicates=images.duplicates,
        near_duplicates=images.near_duplicates,
        pixels=images.pixels,
        decode_rate=images.num_readable / images.seconds if images.num_readable else None,
        labels=labels,
        pretrained=config.encoder.pretrained,
        settings=settings,
        run=run,
        load_per_core=load,
        problems=[*problems_of_images(config, images, len(learned), adopts), *problems],
        warnings=[*warnings_of_images(images, labels, len(source), config.data.drop_duplicates), *warnings],
    )


def _as_text(held: Contents) -> str:
    """As `TIFF, 12 channels of 16 bits`."""
    return f"{held.format}, {held.kind} of {held.bits} bits" if held.bits else held.format


def _counts(found: Counter[Contents], name: Callable[[Contents], str]) -> dict[str, int]:
    """How many have each name, the most frequent first."""
    counts: Counter[str] = Counter()
    for held, count in found.items():
        counts[name(held)] += count
    return dict(counts.most_common())


def _sizes(images: Images) -> Sizes | None:
    if not images.sizes:
        return None
    by_area = sorted(images.sizes, key=lambda size: (size[0] * size[1], size))
    not_square = sum(height != width for height, width in by_area) / len(by_area)
    return Sizes(by_area[0], by_area[len(by_area) // 2], by_area[-1], len(set(by_area)), not_square)


def suggest_settings(config: RunConfig, images: Images) -> dict[str, Any] | None:
    """Mean, deviation and channels that suit the images, by section; None if no image can be read.

    A pretrained backbone keeps the normalisation that it was trained with.
    """
    if not images.num_readable:
        return None
    channels = suggested_channels(config, images)
    keeps = config.encoder.pretrained is not None and len(config.data.mean) == channels
    mean, std = (config.data.mean, config.data.std) if keeps else normalisation(images)
    data = {"mean": list(mean[:channels]), "std": list(std[:channels])}
    return {"data": data} if channels == 3 else {"encoder": {"in_chans": channels}, "data": data}


def adopt(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """Return the config with the settings that `suggest_settings` gives."""
    data = {name: tuple(values) for name, values in settings["data"].items()}
    return dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, **settings.get("encoder", {})),
        data=dataclasses.replace(config.data, **data),
    )


def _examine_run(
    given: RunConfig, learned: Source, rows: np.ndarray, images: Images, step: Measure
) -> tuple[RunFacts | None, list[str], list[str]]:
    """The run that a config makes of these images or tiles, with its problems and warnings."""
    problems = []
    try:
        config, _ = given.resolve(len(learned), len(learned.class_names))
        objective = build_on_meta(config)
    except ValueError as error:
        return None, [str(error)], []
    encoder = objective.encoder
    try:
        config.build_transform(encoder)
    except ValueError as error:
        problems.append(str(error))
    # What is measured does not depend on these numbers, but there must be one for each channel.
    grey = (0.5,) * encoder.in_chans
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mean=grey, std=grey))
    try:
        transform = config.build_transform(encoder)
    except ValueError:
        return None, problems, []  # not the normalisation alone
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainable = sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    num_steps = config.num_steps(len(learned))
    run = RunFacts(
        objective=type(objective).__name__,
        arch=config.encoder.arch,
        image_size=encoder.image_size,
        patch_size=encoder.stride,
        num_parameters=trainable,
        batch_size=config.batch.size,
        num_steps=num_steps,
        epochs=num_steps * config.batch.size / len(learned),
        device=device_name(device),
        cores=num_cpus(),
        memory_mib=model_memory(objective, config.optim),
    )
    if not images.num_readable:
        return run, problems, []
    with _threads_restored():
        torch.set_num_threads(1)
        crops = measure_crops(learned, rows[:_CROPPED], transform, encoder.in_chans)
    decoding = images.seconds / images.num_readable if config.data.cache == "none" else 0.0
    run.input_rate = 1 / (decoding + crops)
    warnings = list(warnings_of_run(given, encoder, _as_learned(given, images), len(learned)))
    if step == "false" or (step == "auto" and device.type != "cuda" and trainable > _SMALL_MODEL):
        return run, problems, warnings
    try:
        with _threads_restored():
            use_all_cpus(device)
            cost = measure_step(config, device)
    except ValueError as error:
        return run, [*problems, str(error)], warnings
    workers, rate = pace(cost.rate, run.input_rate, device)
    run.step = PacedStep(
        **vars(cost), num_workers=workers, run_rate=rate, hours=num_steps * run.batch_size / rate / 3600
    )
    if device.type != "cpu" and rate < cost.rate:
        warnings.append(
            f"input: {workers} loader workers, as many as there are cores for, give {rate:,.0f} images/s, and the step "
            f"could take {cost.rate:,.0f}; store smaller images, or decode each once with --data.cache disk"
        )
    return run, problems, warnings


def _as_learned(config: RunConfig, images: Images) -> Images:
    """The images with the sizes of their tiles, if they are cut."""
    if config.data.tile_size is None:
        return images
    height, width = pair(config.data.tile_size)
    return dataclasses.replace(images, sizes=[(min(own[0], height), min(own[1], width)) for own in images.sizes])


@contextmanager
def _threads_restored() -> Iterator[None]:
    """Restore the number of torch's threads afterwards."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
