"""Reads a trained backbone from a run's checkpoints (at any time), an export or published weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from torch import Tensor

from ssl_vit.core.manifest import hash_file
from ssl_vit.core.reading import entry, read_json, read_tensors, read_yaml, readable, settings_of
from ssl_vit.core.settings import section
from ssl_vit.data.augment.evaluation import CROP_PCT
from ssl_vit.data.sources.source import DataConfig
from ssl_vit.data.transform import Normalization
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.weights.backbone import CONFIG_FILE as CONFIG_JSON
from ssl_vit.models.weights.backbone import (
    WEIGHTS_HASH,
    check_asked,
    check_sizes,
    describe,
    load_backbone,
    load_strictly,
    own_file,
    place_of,
    read_config,
    read_normalisation,
)
from ssl_vit.models.weights.pretrained import load_pretrained, open_pretrained
from ssl_vit.objectives.objective import Pooled, Reconstructs
from ssl_vit.objectives.stored import config_class, with_traits
from ssl_vit.runs.best import Best, best_checkpoint, ended_with
from ssl_vit.runs.checkpoint import (
    MODEL_FILE,
    STATE_FILE,
    KeepBest,
    find_damage,
    list_checkpoints,
    newest_checkpoint,
    step_of,
)
from ssl_vit.runs.folder import CONFIG_FILE
from ssl_vit.runs.provenance import provenance

AVERAGE = "average-last-"


@dataclass(frozen=True)
class Trained:
    """A trained backbone and the facts known about it."""

    encoder: Encoder
    """In eval mode, on the CPU."""
    normalization: Normalization
    crop_pct: float
    """Share of a resized image's sides that the centre crop of evaluation keeps."""
    provenance: dict[str, Any]
    folder: Path
    """Folder of the run or export, which holds its scores; for published weights their name."""
    objective: Reconstructs | None = None
    """The objective with its decoder, if it reconstructs images and was read from a checkpoint; else None."""

    @property
    def pooled(self) -> Pooled:
        """The feature that stands for an image, as the objective defines it."""
        return self.provenance.get("pooled", "cls")

    @property
    def feature(self) -> Pooled:
        """The feature that scored the run, if known; else `pooled`."""
        scored = self.provenance.get("feature")
        return scored if scored in ("cls", "mean") else self.pooled

    def described(self, weights: Path | None = None) -> dict[str, Any]:
        """The content of an export's config.json, with the SHA-256 of its weights."""
        described = describe(
            self.encoder, normalization=self.normalization, provenance=self.provenance, crop_pct=self.crop_pct
        )
        if weights is not None:
            described["ssl_vit"][WEIGHTS_HASH] = hash_file(weights)
        return described


def open_trained(path: str | Path, weights: str | None = None) -> Trained:
    """Read a backbone from a run, from one of its checkpoints, from an export or from published weights.

    Of a run it is the newest checkpoint; once the run has finished with its best one, that one.

    Args:
        path: folder of a run, checkpoint or export, or anything else that `encoder.pretrained` takes, such as the name
            of a timm model.
        weights: "teacher" or "student", for objectives with both; "average-last-K": the mean of the last K checkpoints;
            "best": of the checkpoint that the run kept as its best; None: the teacher, or the only backbone.

    Raises:
        ValueError: there is no backbone, or none with these weights.
    """
    path = Path(path)
    folder, checkpoint = (path.parent.parent, path) if (path / STATE_FILE).is_file() else (path, None)
    if not (folder / CONFIG_FILE).is_file():
        return _open_exported(path, weights)
    settings = read_settings(folder)
    checkpoints, choice, best = _choose_checkpoints(folder, settings, checkpoint, weights)
    state = read_state(checkpoints[-1])
    if state["leaves"] == "nothing":
        backbone = settings["encoder"].get("pretrained")
        raise ValueError(f"{folder}: is an attentive probe, which does not change its backbone; use {backbone}")
    if state["leaves"] == "classifier":
        raise ValueError(f"{path}: is a fine-tuned classifier; `ssl-vit export {folder} --to timm` writes its newest")
    tensors = average([checkpoint / MODEL_FILE for checkpoint in checkpoints])
    prefix, file = _prefix(state, choice, folder), checkpoints[-1] / MODEL_FILE
    encoder_tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    with section("encoder"):
        config = EncoderConfig.from_plain(settings["encoder"])
        check_sizes(config.build, encoder_tensors, file)
        encoder = config.build()
    load_strictly(encoder, encoder_tensors, file)
    objective, kind = None, config_class(state["objective"])
    if state["reconstructs"] and kind is not None:
        with section("objective"):
            objective = settings_of(kind, settings["objective"]).build(encoder).eval()
        load_strictly(objective, tensors, file)
    if best is not None:
        state["best"] = {**best.to_plain(), "of_steps": step_of(list_checkpoints(folder)[-1])}
    known = provenance(settings, state)
    if weights is not None:
        known["weights"] = weights
    if len(checkpoints) > 1:
        known["averaged_steps"] = [int(checkpoint.name.removeprefix("step-")) for checkpoint in checkpoints]
    data = _data_config(settings)
    return Trained(
        encoder=encoder.eval(),
        normalization=data.normalization,
        crop_pct=entry(settings, "evaluation.crop_pct", float, folder / CONFIG_FILE),
        provenance=known,
        folder=folder,
        objective=cast("Reconstructs | None", objective),
    )


def read_settings(run: Path) -> dict[str, Any]:
    """The settings of a run, checked for the sections and values that an export needs.

    Raises:
        ValueError: config.yaml cannot be read, or lacks one of these.
    """
    file = run / CONFIG_FILE
    with readable(file):
        settings = read_yaml(file)
    for name in ("objective", "encoder", "data", "batch", "optim", "evaluation"):
        entry(settings, name, dict, file)
    for name, kind in {"batch.size": int, "encoder.arch": str, "seed": int, "data.source": str | dict}.items():
        entry(settings, name, kind, file)
    return settings


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state.json of a checkpoint, checked for the values that an export needs; see `with_traits`.

    Raises:
        ValueError: state.json cannot be read, or lacks one of these.
    """
    file = checkpoint / STATE_FILE
    with readable(file):
        state = read_json(file)
    for name, kind in {"objective": str, "backbone": str, "step": int}.items():
        entry(state, name, kind, file)
    return with_traits(state, file)


def _data_config(settings: dict[str, Any]) -> DataConfig:
    with section("data"):
        return settings_of(DataConfig, settings["data"])


def data_settings(trained: Trained, source: str | None = None, *, asked: bool = False) -> DataConfig:
    """Settings that read the images of `source` or, without it, the backbone's training images.

    Args:
        source: as `data.source` on the command line.
        asked: whether the user asked to open the training images; see `check_asked`.

    Raises:
        ValueError: `source` is None, and the training images are unknown or the user did not ask to open them.
    """
    settings_file = trained.folder / CONFIG_FILE
    known = _data_config(read_settings(trained.folder)) if settings_file.is_file() else DataConfig()
    if source is None and settings_file.is_file():
        check_asked(known.source, trained.folder, asked=asked)
        return known
    named = yaml.safe_load(source) if source and source.startswith("{") and source.endswith("}") else source
    recorded = None if named else place_of(trained.provenance.get("source"))
    if recorded is not None:
        check_asked(recorded, trained.folder, asked=asked)
        named = recorded
    if named is None:
        raise ValueError(f"{trained.folder}: does not say where its training images lie; name a source of images")
    return DataConfig(named, **trained.normalization._asdict(), pages=known.pages, label_column="none")


def is_fine_tuned(path: Path) -> bool:
    """Whether a folder holds a run that trains a classifier."""
    checkpoint = newest_checkpoint(path) if (path / CONFIG_FILE).is_file() else None
    return checkpoint is not None and read_state(checkpoint)["leaves"] == "classifier"


def average(files: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of the tensors of several files, summed in float64; a single file's tensors are returned unchanged.

    Raises:
        ValueError: a file is damaged, or the files do not hold the same tensors.
    """
    newest = read_tensors(files[-1])
    if len(files) == 1:
        return newest
    sums = {name: value.double() for name, value in newest.items() if value.is_floating_point()}
    for file in files[:-1]:
        found = read_tensors(file)
        if {name: value.shape for name, value in found.items()} != {name: v.shape for name, v in newest.items()}:
            raise ValueError(f"{file}: holds other tensors than {files[-1]}; average checkpoints of one run")
        for name, total in sums.items():
            total += found[name]
    return {**newest, **{name: (total / len(files)).to(newest[name].dtype) for name, total in sums.items()}}


def _choose_checkpoints(
    folder: Path, settings: dict[str, Any], checkpoint: Path | None, weights: str | None
) -> tuple[list[Path], str | None, Best | None]:
    """The checkpoints to average, oldest first; the choice between teacher and student; what it is the best by."""
    best: Best | None
    if weights == "best":
        by = entry(settings, "checkpoint.keep_best", KeepBest, folder / CONFIG_FILE)
        best = best_checkpoint(folder, by)
        if best is None:
            raise ValueError(
                f"weights='best': {folder} keeps none (checkpoint.keep_best={by!r}), or none was scored yet"
            )
        return [best.folder], None, best
    if weights is None or not weights.startswith(AVERAGE):
        if weights not in (None, "teacher", "student"):
            raise ValueError(f"weights={weights!r}: choose teacher, student, best or {AVERAGE}K, K checkpoints")
        if checkpoint is not None and (problem := find_damage(checkpoint)) is not None:
            raise ValueError(f"{checkpoint}: is damaged: {problem}")
        best = ended_with(folder, settings) if checkpoint is None else None
        chosen = checkpoint or (newest_checkpoint(folder) if best is None else best.folder)
        if chosen is None:
            raise ValueError(f"{folder}: has no complete checkpoint yet")
        return [chosen], weights, best
    number = weights.removeprefix(AVERAGE)
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"weights={weights!r}: K in {AVERAGE}K must be a number of checkpoints, such as {AVERAGE}3")
    whole = [path for path in list_checkpoints(folder) if find_damage(path) is None]
    if checkpoint is not None:
        whole = [path for path in whole if path.name <= checkpoint.name]
    if len(whole) < int(number):
        raise ValueError(
            f"weights={weights!r}: {folder} has {len(whole)} complete checkpoints; --checkpoint.keep N keeps N"
        )
    return whole[-int(number) :], None, None


def _prefix(state: dict[str, Any], choice: str | None, folder: Path) -> str:
    """Prefix of the chosen backbone's parameter names in the objective."""
    if choice is None:
        return state["backbone"]
    if not state["backbone"].startswith("teacher_"):
        raise ValueError(f"weights={choice!r}: {state['objective']} in {folder} has no teacher; omit weights")
    return state["backbone"].removeprefix("teacher_") if choice == "student" else state["backbone"]


def _open_exported(path: Path, weights: str | None) -> Trained:
    if weights is not None:
        raise ValueError(
            f"weights={weights!r}: {path} is one backbone; name the folder of the run, whose checkpoints hold both"
        )
    file = own_file(path)
    if file is None:
        return _open_published(str(path))
    encoder = load_backbone(file)
    described = read_config(file.parent)
    left_out = ("encoder", "version", "torch", "timm", WEIGHTS_HASH)
    known = {name: value for name, value in described["ssl_vit"].items() if name not in left_out}
    known["pooled"] = with_traits(known, file.parent / CONFIG_JSON)["pooled"]
    return Trained(encoder, *read_normalisation(described, file.parent / CONFIG_JSON), known, file.parent)


def _open_published(name: str) -> Trained:
    found = open_pretrained(name)
    if found.config is None:
        raise ValueError(f"{name}: cannot infer the architecture from these weights; only the papers' widths are known")
    encoder = found.config.build()
    load_pretrained(encoder, name)
    normalization = found.normalization or DataConfig().normalization
    known = {"pretrained": name}
    if name.endswith(".mae") and not Path(name).exists():  # timm's tag; no loss of MAE's trains the class token
        known["pooled"] = "mean"
    return Trained(encoder.eval(), normalization, found.crop_pct or CROP_PCT, known, Path(name))
