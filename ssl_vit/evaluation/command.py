"""What the evaluation scripts share: their settings, the backbone, the front and the written result."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import PartialState
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from ssl_vit.core import front
from ssl_vit.core.distributed import end_processes, process_index, start_processes
from ssl_vit.core.front import stoppable
from ssl_vit.core.machine import autocast_dtype, resolve_precision
from ssl_vit.core.settings import as_flags, check_ranges, in_one_line, read_words, renamed_settings, section
from ssl_vit.core.text import plain
from ssl_vit.core.usage import answer_help
from ssl_vit.core.writing import FAULTS, replace_text, report_error
from ssl_vit.data.augment.evaluation import EvalTransform, fit_size
from ssl_vit.data.sources.source import DataConfig, Source
from ssl_vit.data.transform import pair
from ssl_vit.data.workers import check_num_workers, choose_num_workers
from ssl_vit.evaluation.features import EncodeSettings
from ssl_vit.evaluation.left_out import write_bad
from ssl_vit.evaluation.untrained import objective_of, untrained_encoder
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.weights.backbone import (
    CONFIG_FILE,
    backbone_file,
    load_backbone,
    own_source,
    read_config,
    read_encoder_config,
    read_normalisation,
)
from ssl_vit.objectives.stored import with_traits

set_parsing_settings(docstring_parse_attribute_docstrings=True)

BASELINES = ("pixels", "untrained")


@dataclass(frozen=True)
class PicturesConfig:
    """Images that a script reads, and how they are encoded."""

    source: str | dict[str, float] | None = None
    """Images, as in pre-training's data.source but no stream; labelled, where they are learned from; `null` = the
    run's, where open_source says so."""
    open_source: bool = False
    """Open the images that the run was trained on, which its folder names: a stranger may have written it."""
    split: str = "train"
    """Split of the source."""
    image_column: str | None = None
    """Column that holds the images; found by its type where there is only one."""
    pages: Literal["first", "channels", "images"] = "first"
    """Of files of several pages or frames: the first, a TIFF's as channels of one image, or each as an image."""
    allow_outside_paths: bool = False
    """Whether rows of tables may name image files outside the folder of their source. Only for those that you trust."""
    image_size: int | tuple[int, int] | None = None
    """Size in pixels at which images are encoded: one number, or [height, width]; `null` = the backbone's own."""
    indivisible: Literal["refuse", "resize", "pad"] = "refuse"
    """What to do with a size that the encoder's stride (of a ViT the size of a patch) does not divide: refuse, take the
    nearest, or pad up to the next."""
    crop_pct: float | None = None
    """Share of the resized image's sides that the centre crop keeps: .875 = resize to 256, crop to 224; `null` = the
    backbone's own, at any image_size."""
    on_bad_image: Literal["skip", "raise"] = "skip"
    """An image that cannot be decoded: leave it out and list it beside the output, or stop."""
    max_bad_share: float = 0.05
    """Stop when more than this share of the images cannot be decoded."""
    batch_size: int = 256
    """Images that a process encodes at once."""
    precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    """Number format of the encoder. auto: bf16 where the device computes it in hardware, else fp32 (no)."""
    num_workers: int | Literal["auto"] = "auto"
    """Loader processes of each process; auto = chosen from the machine."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            image_size="[1, inf) pixel",
            crop_pct="(0, 1]; 1 keeps the largest centre crop",
            max_bad_share="[0, 1]; 1 never stops",
            batch_size="[1, inf)",
        )
        object.__setattr__(self, "num_workers", check_num_workers(self.num_workers))

    @property
    def skipped_share(self) -> float | None:
        """Share of images that may be left out; None = the first bad one raises."""
        return self.max_bad_share if self.on_bad_image == "skip" else None


@dataclass(frozen=True)
class LabelledConfig(PicturesConfig):
    """Which labelled images score a backbone, and beside which baselines."""

    test_source: str | dict[str, float] | None = None
    """Labelled images to test on; `null` = the source itself, where each image is predicted from other images."""
    test_split: str | None = None
    """Split of the test source; `null` = that of the source. Given alone, it is one of the source."""
    label_column: str | None = None
    """Column that holds the classes; found where possible."""
    max_images: int | None = None
    """Use a seeded random subset of at most so many images of each source; `null` = all."""
    folds: int = 5
    """Folds of the cross-validation, where there is no test source."""
    baselines: tuple[str, ...] = ("pixels",)
    """Baselines shown beside the backbone: pixels (16 x 16), untrained (the architecture with fresh weights)."""
    seed: int = 0
    """Seed of everything random."""
    cache: bool = True
    """Keep features beside the backbone, and read them again while weights, images and settings are the same."""
    output: str | None = None
    """JSON file to write; `null` = one beside the backbone, named after the evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, folds="[2, inf); the usual number is 5", max_images="[1, inf)", seed="[0, inf)")
        for name in self.baselines:
            if name not in BASELINES:
                raise ValueError(f"baselines={self.baselines!r}: no {name!r}; choose of {', '.join(BASELINES)}")


@dataclass
class Backbone:
    """A backbone on its device, and how images are prepared for it."""

    file: Path
    encoder: Encoder
    transform: EvalTransform
    settings: EncodeSettings
    provenance: dict[str, Any]
    """How it was trained, as far as its export says; see `ssl_vit.runs.provenance`."""

    @property
    def folder(self) -> Path:
        return self.file.parent

    @property
    def encoder_settings(self) -> dict[str, Any]:
        """Settings that the encoder is built with, as in config.json."""
        return asdict(read_encoder_config(self.folder))

    @property
    def feature(self) -> str:
        """Default feature of an image: the one that its run was scored by, else the one that its objective pools."""
        return self.provenance.get("feature") or self.provenance["pooled"]

    def untrained(self, seed: int) -> Encoder:
        """Build the same architecture with fresh weights, initialised as for its training.

        Seed 0 gives those that its own run began with, unless that began with trained ones.
        """
        own = self.provenance.get("seed") or 0
        objective = objective_of(self.provenance)
        return untrained_encoder(read_encoder_config(self.folder), objective, own + seed).to(self.settings.device)

    @classmethod
    def load(cls, path: Path, config: PicturesConfig) -> "Backbone":
        """Load an exported backbone.

        Raises:
            ValueError: no whole backbone there, or an image size that does not fit it.
        """
        file = backbone_file(path)
        encoder = load_backbone(file)
        described = read_config(file.parent)
        device = cast(torch.device, PartialState().device)
        size = encoder.image_size if config.image_size is None else pair(config.image_size)
        size, padding = fit_size(size, encoder.stride, config.indivisible)
        normalization, own_crop_pct = read_normalisation(described, file.parent / CONFIG_FILE)
        crop_pct = config.crop_pct if config.crop_pct is not None else own_crop_pct
        dtype = autocast_dtype(resolve_precision(config.precision, device))
        settings = EncodeSettings(config.batch_size, device, choose_num_workers(config.num_workers, device), dtype)
        transform = EvalTransform(size, normalization, crop_pct, padding)
        return cls(file, encoder.to(device), transform, settings, with_traits(described["ssl_vit"], file))


def data_config(backbone: Backbone, config: PicturesConfig, label_column: str | None = None) -> DataConfig:
    """Return the settings of the images that a script names.

    Raises:
        ValueError: none are named, and the backbone does not say what it was trained on, or it is not to be opened.
    """
    source = config.source or own_source(backbone.folder, asked=config.open_source)
    if source is None:
        raise ValueError("--source: name the images")
    mean, std = backbone.transform.normalization
    outside, pages = config.allow_outside_paths, config.pages
    return DataConfig(source, config.split, config.image_column, label_column, mean, std, outside, pages=pages)


@contextmanager
def naming_own(config: PicturesConfig) -> Iterator[None]:
    """Add to an error that the images are those of the run, if the user named none."""
    try:
        yield
    except ValueError as error:
        if config.source is not None or "data.source=" not in str(error):
            raise
        raise ValueError(f"{error}; the backbone was trained on these: name others with --source") from error


def naming_test(config: Any) -> AbstractContextManager[None]:
    """Let an error about the source or split name the test source or test split, if the user gave one."""
    names = {"source": config.test_source, "split": config.test_split}
    return renamed_settings({f"data.{name}": f"data.test_{name}" for name, given in names.items() if given is not None})


def tell_notes(*sources: Source | None) -> None:
    """Print the notes of the sources, each once."""
    notes = dict.fromkeys(note for source in sources if source is not None for note in source.notes)
    if process_index() == 0:
        print("".join(f"note       {plain(note)}\n" for note in notes), end="")


@stoppable()
def main(
    evaluate: Callable[..., None],
    configs: Mapping[str, Any],
    description: str | None,
    args: Sequence[str] | None = None,
) -> int:
    """Entry point of the evaluation scripts: read the settings, evaluate, return the exit code.

    Args:
        evaluate: called with the backbone's path and the settings, by name.
        configs: the default settings, or their class where nothing has a default; those named "" are flags by
            themselves, the others have their name in front.
        description: shown by --help.
        args: the command line; None takes the process's own.

    Returns:
        2, after one line, where something named cannot be used.
    """
    parser = ArgumentParser(prog=front.program, exit_on_error=False, description=description)
    parser.add_argument(
        "backbone", type=str, help="folder of a run or of an exported backbone, or its safetensors file"
    )
    keys: dict[str, Any] = {}
    kinds = {name: default if isinstance(default, type) else type(default) for name, default in configs.items()}
    for name, default in configs.items():
        parser.add_class_arguments(kinds[name], name or None)
        keys |= {f"{name}.{item.name}" if name else item.name: item.default for item in fields(kinds[name])}
        if not isinstance(default, type):
            prefix = f"{name}." if name else ""
            parser.set_defaults({f"{prefix}{key}": value for key, value in vars(default).items()})
    try:
        words = read_words(sys.argv[1:] if args is None else args, keys)
        given = parser.parse_args(answer_help(parser, words))
        settings = {}
        for name, kind in kinds.items():
            values = vars(given[name]) if name else {item.name: given[item.name] for item in fields(kind)}
            with section(name) if name else nullcontext():
                settings[name or "config"] = kind(**values)
        start_processes()
        evaluate(Path(given.backbone), **settings)
    except (ValueError, ArgumentError) as error:
        text = in_one_line(str(error), keys) if isinstance(error, ArgumentError) else str(error)
        return report_error(ValueError(as_flags(text, keys)))
    except FAULTS as error:
        return report_error(error)
    finally:
        end_processes()
    return 0


def write_result(
    default: Path, output: str | None, result: Mapping[str, Any], bad: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write a result to the file that was named, or to the default one, and say where.

    Args:
        bad: images that were left out; they are listed beside it, see `write_bad`.

    Raises:
        ValueError: the file cannot be written.
    """
    file = default if output is None else Path(output)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(result, indent=2) + "\n")
        write_bad(file, bad)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{file}: the result cannot be written ({reason}); name another file with --output") from error
    print(f"written to {plain(file)}")
