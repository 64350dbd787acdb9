"""All that can be told of a source and a config, as plain values."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import psutil
import torch

from ssl_vit.core.machine import num_cpus, use_all_cpus
from ssl_vit.data.decode.formats import Contents
from ssl_vit.data.sources.source import Source
from ssl_vit.doctor.cost import build_on_meta, measure_crops, measure_step, model_memory, pace
from ssl_vit.doctor.findings import (
    channels_to_read,
    normalisation,
    problems_of_channels,
    problems_of_pictures,
    problems_of_size,
    suggested_channels,
    warnings_of_pictures,
    warnings_of_run,
)
from ssl_vit.doctor.images import Pictures, Repeats, choose_rows, count_labels, read_pictures
from ssl_vit.evaluation.scores import wilson_interval
from ssl_vit.runs.facts import device_name
from ssl_vit.training.config import RunConfig

Measure = Literal["auto", "true", "false"]
_CROPPED = 64  # pictures whose crops are timed
_SMALL_MODEL = 50_000_000  # trainable parameters up to which a step is measured on a CPU unasked


def diagnose(
    config: RunConfig, source: Source, *, sample: int | None, step: Measure = "auto", adopts: bool = False
) -> dict[str, Any]:
    """Read a sample of the pictures, build the model, measure, and judge.

    Args:
        config: a run's settings.
        source: what `config.data` names.
        sample: pictures to read; None for all.
        step: whether to measure a training step; auto where there is a GPU or the model is small.
        adopts: whether the run is judged with the mean, deviation and channels that were measured.

    Returns:
        Plain values that JSON takes, the same for the same arguments but for rates and what follows from them.
            "problems" and "warnings" are lists of sentences; "run" is None where the config's run cannot be built.
    """
    load = psutil.getloadavg()[0] / (psutil.cpu_count() or 1)  # before there is any of ours
    rows = choose_rows(len(source), sample, config.seed)
    labels = count_labels(source)
    with _restored_threads():
        torch.set_num_threads(1)  # as a loader's worker
        pictures = read_pictures(source, rows, channels_to_read(config, source, rows))
    problems = problems_of_pictures(pictures) + problems_of_size(config, len(source))
    warnings = warnings_of_pictures(pictures, labels, len(source), config.data.drop_duplicates)
    settings = suggest_settings(config, pictures)
    judged = config
    if settings is not None and (adopts or pictures.num_channels != config.encoder.in_chans):
        judged = adopt(config, settings)
        problems += [] if adopts else problems_of_channels(config, pictures)
    run, more_problems, more_warnings = _examine_run(judged, source, rows, pictures, step)
    return {
        "source": source.name,
        "notes": list(source.notes),
        "num_images": len(source),
        **_describe(pictures, len(source)),
        "labels": None if labels is None else _plain(labels),
        "pretrained": config.encoder.pretrained,
        "settings": settings,
        "run": run,
        "load_per_core": load,
        "problems": problems + more_problems,
        "warnings": warnings + more_warnings,
    }


def _describe(pictures: Pictures, num_images: int) -> dict[str, Any]:
    """What was found by reading."""
    unreadable, read = pictures.num_unreadable, pictures.num_read
    return {
        "num_read": read,
        "sizes": _sizes(pictures),
        "files": _counts(pictures.files, as_text),
        "formats": _counts(pictures.files, lambda held: held.format),
        "channels": _counts(pictures.contents, lambda held: held.kind),
        "num_16_bit": sum(count for held, count in pictures.contents.items() if held.bits == 16),
        "dropped": dict(pictures.dropped.most_common()),
        "unreadable": {
            "count": unreadable,
            "share": unreadable / read,
            "interval": list(wilson_interval(unreadable, read)) if read < num_images else None,
            "examples": [{**item.place._asdict(), "reason": item.reason} for item in pictures.unreadable],
        },
        "duplicates": _repeats(pictures.repeats),
        "near_duplicates": None if pictures.near_repeats is None else _repeats(pictures.near_repeats),
        "pixels": {"count": pictures.num_pixels, "mean": list(pictures.mean), "std": list(pictures.std)},
        "decode_rate": pictures.num_readable / pictures.seconds if pictures.num_readable else None,
    }


def as_text(held: Contents) -> str:
    """As `TIFF, 12 channels of 16 bits`."""
    return f"{held.format}, {held.kind} of {held.bits} bits" if held.bits else held.format


def _counts(found: Counter[Contents], name: Callable[[Contents], str]) -> dict[str, int]:
    """How many have each name, the most frequent first."""
    counts: Counter[str] = Counter()
    for held, count in found.items():
        counts[name(held)] += count
    return dict(counts.most_common())


def _repeats(repeats: Repeats) -> dict[str, Any]:
    """How many, of how many other pictures, and a few of them."""
    return {
        "count": repeats.count,
        "groups": len(repeats.firsts),
        "examples": [{**item.place._asdict(), "same_as": item.first._asdict()} for item in repeats.examples],
    }


def _sizes(pictures: Pictures) -> dict[str, Any] | None:
    """Sizes as [height, width]; the smallest, median and largest picture are those by area."""
    if not pictures.sizes:
        return None
    by_area = sorted(pictures.sizes, key=lambda size: (size[0] * size[1], size))
    return {
        "smallest": list(by_area[0]),
        "median": list(by_area[len(by_area) // 2]),
        "largest": list(by_area[-1]),
        "num_distinct": len(set(by_area)),
        "share_not_square": sum(height != width for height, width in by_area) / len(by_area),
    }


def suggest_settings(config: RunConfig, pictures: Pictures) -> dict[str, Any] | None:
    """Mean, deviation and channels that suit the pictures, by section; None if none can be read.

    Weights to start from keep the normalisation that they were trained with.
    """
    if not pictures.num_readable:
        return None
    channels = suggested_channels(config, pictures)
    keeps = config.encoder.pretrained is not None and len(config.data.mean) == channels
    mean, std = (config.data.mean, config.data.std) if keeps else normalisation(pictures)
    data = {"mean": list(mean[:channels]), "std": list(std[:channels])}
    return {"data": data} if channels == 3 else {"encoder": {"in_chans": channels}, "data": data}


def adopt(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """A config with what `suggest_settings` gives."""
    data = {name: tuple(values) for name, values in settings["data"].items()}
    return dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, **settings.get("encoder", {})),
        data=dataclasses.replace(config.data, **data),
    )


def _examine_run(
    given: RunConfig, source: Source, rows: np.ndarray, pictures: Pictures, step: Measure
) -> tuple[dict[str, Any] | None, list[str], list[str]]:
    """The run that a config gives on this source, with its problems and warnings."""
    problems = []
    try:
        config, _ = given.resolve(len(source), len(source.class_names))
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
    memory = model_memory(objective)
    trainable = sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    num_steps = config.num_steps(len(source))
    run: dict[str, Any] = {
        "objective": type(objective).__name__,
        "arch": config.encoder.arch,
        "image_size": list(encoder.image_size),
        "patch_size": list(encoder.patch_size),
        "num_parameters": trainable,
        "batch_size": config.batch.size,
        "num_steps": num_steps,
        "epochs": num_steps * config.batch.size / len(source),
        "device": device_name(device),
        "cores": num_cpus(),
        "memory_mib": {**_plain(memory), "total": memory.total},
        "input_rate": None,
        "step": None,
    }
    if not pictures.num_readable:
        return run, problems, []
    with _restored_threads():
        torch.set_num_threads(1)
        crops = measure_crops(source, rows[:_CROPPED], transform, encoder.in_chans)
    run["input_rate"] = 1 / (pictures.seconds / pictures.num_readable + crops)
    warnings = warnings_of_run(given, encoder, pictures, len(source))
    if step == "true" or (step == "auto" and (device.type == "cuda" or trainable <= _SMALL_MODEL)):
        try:
            with _restored_threads():
                use_all_cpus(device)
                cost = measure_step(config, device)
        except ValueError as error:
            return run, [*problems, str(error)], warnings
        together = pace(cost.rate, run["input_rate"], device)
        hours = num_steps * config.batch.size / together.rate / 3600
        run["step"] = {**_plain(cost), "num_workers": together.num_workers, "run_rate": together.rate, "hours": hours}
        if device.type != "cpu" and together.input_rate < cost.rate:
            warnings.append(
                f"input: {together.num_workers} loader workers, as many as there are cores for, give "
                f"{together.input_rate:,.0f} images/s, and the step could take {cost.rate:,.0f}; store smaller pictures"
            )
    return run, problems, warnings


def _plain(values: Any) -> dict[str, Any]:
    """A dataclass as dictionaries, named tuples in it too."""
    return {key: value._asdict() if hasattr(value, "_asdict") else value for key, value in vars(values).items()}


@contextmanager
def _restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
