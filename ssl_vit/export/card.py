"""The model card of an export: what the backbone is, where it comes from, how good it is, and how to load it."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

import ssl_vit
from ssl_vit.core.privacy import public
from ssl_vit.core.reading import read_json, read_metrics
from ssl_vit.core.text import cell, code, plain
from ssl_vit.data.sampler import as_text
from ssl_vit.export.graph import is_channels_last
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.weights.backbone import read_config
from ssl_vit.runs.folder import CONFIG_FILE as SETTINGS_FILE
from ssl_vit.runs.folder import METRICS_FILE, RESULTS_FILE
from ssl_vit.runs.record import found_scores, training_hours
from ssl_vit.runs.trained import Trained

_PAPERS = {
    "MAE": "masked autoencoder (He et al. 2022, arXiv:2111.06377)",
    "SimMIM": "masked image modelling, SimMIM (Xie et al. 2022, arXiv:2111.09886)",
    "FCMAE": "masked autoencoder of convolutions, FCMAE (Woo et al. 2023, arXiv:2301.00808)",
    "DINO": "self-distillation, DINO (Caron et al. 2021, arXiv:2104.14294)",
    "DINOv2": "self-distillation with masked patches, DINOv2 (Oquab et al. 2023, arXiv:2304.07193)",
    "Distill": "distillation of a frozen backbone on images without labels",
    "DINO, coding_rate": "self-distillation with a coding rate, SimDINO (Wu et al. 2025, arXiv:2502.10385)",
    "DINOv2, coding_rate": "self-distillation with masked patches and a coding rate, SimDINOv2 (Wu et al. 2025, "
    "arXiv:2502.10385)",
    "LeJEPA": "agreement of views with a regulariser, LeJEPA (Balestriero & LeCun 2025, arXiv:2511.08544)",
}


def write_card(
    trained: Trained, *, library: str, loading_code: str, difference: float, proved_on: str, license: str
) -> str:
    """The card as Markdown, with the header that the Hugging Face hub reads.

    Values from files and settings are escaped: by `cell` and `code` in Markdown, by the dumper in YAML.

    Args:
        library: the hub's name of the library that loads the export.
        loading_code: Python that loads the export from its own folder.
        difference: largest difference between the library's features and the trained ones.
        proved_on: the images that were compared, as Markdown.
        license: a license identifier of the hub; "unknown" where the user named none.
    """
    encoder, known = trained.encoder, public(trained.provenance)
    objective = str(known["objective"]) if known.get("objective") else None
    name = encoder.config.arch + (f", pre-trained by {objective}" if objective else "")
    kind = "vision-transformer" if "Vision Transformer" in encoder.title else encoder.title.lower().replace(" ", "-")
    tags = ["image-feature-extraction", "self-supervised-learning", kind, "ssl_vit"]
    header = ModelCardData(
        license=license,
        library_name=library,
        pipeline_tag="image-feature-extraction",
        tags=[*tags, *([plain(objective.lower(), 60)] if objective else [])],
    )
    licence = code(license) if license != "unknown" else "not stated; `--license` of the export names it"
    if known.get("attribution"):
        licence += f". Of the images: {cell(known['attribution'])}"
    rows = [*_describe(trained), ("licence", licence)]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows if value is not None)
    left_out = _of_other_weights(trained)
    told = f"Left out, since of other weights: {', '.join(left_out)}." if left_out else ""
    scores = "\n\n".join(part for part in ("\n".join(_scores(trained.folder, left_out)), told) if part)
    text = [
        f"---\n{header.to_yaml()}\n---",
        f"# {cell(name)}",
        f"A {encoder.title}"
        + (" pre-trained without labels" if objective else ", converted")
        + f" by [ssl_vit](https://pypi.org/project/ssl-vit) {ssl_vit.__version__}.",
        f"```python\n{loading_code.rstrip()}\n```",
        f"| | |\n|---|---|\n{table}",
        *(_pyramid(trained.encoder) if library == "timm" else []),
        "## Scores\n\n" + (scores or "None were found beside it."),
        f"## Proof\n\nLoaded through {library} after it was written; largest difference of a feature from the trained "
        f"backbone's: {difference:.1e}, on {proved_on}.",
    ]
    return "\n\n".join(text) + "\n"


_PYRAMID = """\
import timm
import torch

pyramid = timm.create_model("local-dir:.", pretrained=True, features_only=True).eval()
channels, strides = pyramid.feature_info.channels(), pyramid.feature_info.reduction()  # {channels}, {strides}
with torch.inference_mode():
    maps = {maps}  # each of [b, c, h, w]
"""


def _pyramid(encoder: Encoder) -> list[str]:
    """The section on the maps of all stages, where there are several."""
    if len(encoder.strides) == 1:
        return []
    model: Any = encoder.model
    images = f"pyramid(torch.randn(1, {encoder.in_chans}, {encoder.image_size[0]}, {encoder.image_size[1]}))"
    maps = f"[rows.permute(0, 3, 1, 2) for rows in {images}]" if is_channels_last(model) else images
    channels = [stage["num_chs"] for stage in model.feature_info]
    code = _PYRAMID.format(channels=channels, strides=encoder.strides, maps=maps)
    return [
        "## Feature pyramid for detection and segmentation\n\nWith `features_only=True` timm returns "
        "the output of every stage, before the final norm, for images of any size that the largest stride divides.",
        f"```python\n{code.rstrip()}\n```",
    ]


def _describe(trained: Trained) -> Iterator[tuple[str, Any]]:
    encoder, known = trained.encoder, public(trained.provenance)
    height, width = encoder.image_size
    size = f"{height} x {width} pixels, {encoder.in_chans} channels"
    mean, std = map(list, trained.normalization)
    yield "input", f"{size}; scaled to [0, 1], mean {mean}, deviation {std}"
    tokens = f"{'class token and ' if encoder.has_cls_token else ''}{encoder.num_patches} patch tokens"
    tokens += f", one for {' x '.join(map(str, encoder.stride))} pixels"
    pooled = encoder.cls_in_words if trained.feature == "cls" else "the mean of the patch tokens"
    yield "features", f"{encoder.embed_dim} wide; {tokens}; {pooled} stands for an image"
    yield "parameters", f"{sum(value.numel() for value in encoder.parameters()) / 1e6:.1f} M"
    objective = known.get("objective")
    if known.get("pretrained"):
        yield "weights of" if objective is None else "started from", code(known["pretrained"])
    if objective is None:
        return
    settings = known.get("objective_config")
    loss = settings.get("loss") if isinstance(settings, dict) else None
    yield "objective", _PAPERS.get(f"{objective}, {loss}") or _PAPERS.get(str(objective)) or cell(objective)
    if known.get("collapse"):
        yield "warning", f"its features collapsed at {cell(known['collapse'])}"
    if known.get("weights"):
        yield "weights", cell(known["weights"])
    images = f", {_number(known['num_images'])} images" if known.get("num_images") else ""
    source = known.get("source")
    yield "data", code(as_text(source) if isinstance(source, dict) else source) + images
    if known.get("steps"):
        yield "training", f"{_number(known['steps'])} steps of {_number(known.get('batch_size'))} images"
    if isinstance(best := known.get("best"), dict):
        yield "chosen", f"the best of {_number(best.get('of_steps'))} steps by {cell(best.get('by'))}"
    batch_size, metrics = known.get("batch_size"), trained.folder / METRICS_FILE
    hours = None if batch_size is None else training_hours(read_metrics(metrics), batch_size)[-1:]
    if known.get("hardware"):
        yield "hardware", cell(known["hardware"]) + (f", {hours[-1]:.2g} hours" if hours and hours[-1] else "")
    for title, key in (("recipe", "objective_config"), ("optimizer", "optim")):
        if isinstance(known.get(key), dict):
            yield title, cell(", ".join(f"{name} {value}" for name, value in known[key].items()))


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else cell(value)


def _of_other_weights(trained: Trained) -> list[str]:
    """Files with scores of other weights of the run than these: of another step, or of teacher, student or a mean."""
    if not (trained.folder / SETTINGS_FILE).is_file() or trained.provenance.get("steps") is None:
        return []
    found = []
    for name in dict.fromkeys(name for name, *_ in found_scores(trained.folder)):
        if name == RESULTS_FILE:
            results = read_json(trained.folder / name)
            best = results.get("best")
            scored = {"steps": (best if isinstance(best, dict) else results).get("step")}
        else:  # of the backbone that lies there
            scored = _read_known(trained.folder)
        if _identity(scored) != _identity(trained.provenance):
            found.append(name)
    return found


def _identity(known: dict[str, Any]) -> tuple[Any, Any]:
    weights = known.get("weights")
    return known.get("steps"), None if weights in ("teacher", "best") else weights


def _read_known(folder: Path) -> dict[str, Any]:
    try:
        return read_config(folder)["ssl_vit"]
    except ValueError:
        return {}


def _scores(folder: Path, left_out: Collection[str] = ()) -> Iterator[str]:
    """The lines of a table of all scores in a backbone's folder, but for those of some files."""
    heading = "| file | features | score | value | 95 % interval | measured on |\n|---|---|---|---|---|---|"
    for name, row, column, value, interval in found_scores(folder):
        if name in left_out:
            continue
        if heading:
            yield heading
            heading = ""
        data = measured_on(public(read_json(folder / name)))
        yield f"| {name} | {cell(row)} | {cell(column)} | {100 * value:.1f} % | {cell(interval)} | {data} |"


def measured_on(result: dict[str, Any]) -> str:
    """As Markdown, the images that a result was measured on and those that its probes learned from, where recorded."""
    settings: dict[str, Any] = {}
    for part in (result.get("settings"), result, result.get("judged_on")):
        settings |= part if isinstance(part, dict) else {}
    source, test = settings.get("source"), settings.get("test_source") or settings.get("test")
    if not isinstance(source, str) and test is None:
        return "not recorded"
    tested = _data(str(test or source), settings.get("test_split") or settings.get("split"), settings.get("num_test"))
    tested += f" of {_number(settings['num_classes'])} classes" if settings.get("num_classes") else ""
    if test is None:
        return f"{tested}, each by what was learned from others"
    learned = _data(source, settings.get("split"), settings.get("num_train")) if isinstance(source, str) else ""
    return f"{tested}; learned from {learned}" if learned else tested


def _data(name: str, split: str | None, number: int | None) -> str:
    """A source without its parent folders, its split and its number of images."""
    held_out, _, rest = name.rpartition(" of ") if name.startswith("a held-out") else ("", "", name)
    short = re.sub(r"[^\s,{]*/", "", rest) if rest.startswith("{") else rest.rstrip("/").rpartition("/")[2]
    text = f"{cell(held_out)} of {code(short)}" if held_out else code(short)
    return text + (f" ({cell(split)})" if split else "") + (f", {number:,} images" if isinstance(number, int) else "")
