"""What the evaluation scripts share: a backbone, labelled pictures, and features of them that are extracted once."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import PartialState
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from torch import Tensor

from ssl_vit.data.config import clamp_rounding
from ssl_vit.data.sources import DataConfig, Source, open_source
from ssl_vit.data.workers import check_num_workers, choose_num_workers
from ssl_vit.distributed import autocast_dtype, process_index, resolve_precision, start_processes
from ssl_vit.evaluation.cache import cached_features, feature_key, hash_file
from ssl_vit.evaluation.evaluate import Split, check_finite, split_sources
from ssl_vit.evaluation.features import EvalTransform, extract_features, fit_size, pixel_features
from ssl_vit.export.backbone import BACKBONE_FILE, load_backbone, read_config, read_encoder_config
from ssl_vit.front import stoppable
from ssl_vit.models.encoder import Encoder

set_parsing_settings(docstring_parse_attribute_docstrings=True)

BASELINES = ("pixels", "untrained")


@dataclass(frozen=True)
class PicturesConfig:
    """Which pictures a script is given, and how they are encoded."""

    source: str | None = None
    """Pictures, as in pre-training's data.source; labelled, where they are learned from; `null` = the run's."""
    split: str = "train"
    """Split of the source."""
    image_column: str | None = None
    """Column that holds the images; found by its type where there is only one."""
    pages: Literal["first", "channels", "images"] = "first"
    """Of files of several pages or frames: the first, a TIFF's as channels of one image, or each as an image."""
    allow_outside_paths: bool = False
    """Whether rows of tables may name image files outside the folder of their source. Only for those that you trust."""
    image_size: int | tuple[int, int] | None = None
    """Size in pixels at which pictures are encoded: one number, or [height, width]; `null` = the backbone's own."""
    indivisible: Literal["refuse", "resize", "pad"] = "refuse"
    """What to do with a size that the patch size does not divide: refuse, take the nearest, or pad up to the next."""
    crop_pct: float = 0.875
    """Share of the resized picture's sides that the centre crop keeps: .875 = resize to 256, crop to 224."""
    batch_size: int = 256
    """Pictures that a process encodes at once."""
    precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    """Number format of the encoder. auto: bf16 where the device computes it in hardware, else fp32 (no)."""
    num_workers: int | Literal["auto"] = "auto"
    """Loader processes of each process; auto = chosen from the machine."""

    def __post_init__(self) -> None:
        clamp_rounding(self, "crop_pct")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct={self.crop_pct!r}: must lie in (0, 1]; 1 keeps the largest centre crop")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size!r}: must be at least 1")
        object.__setattr__(self, "num_workers", check_num_workers(self.num_workers))
        if self.image_size is not None and min(_pair(self.image_size)) < 1:
            raise ValueError(f"image_size={self.image_size!r}: must be at least 1 pixel")


@dataclass(frozen=True)
class LabelledConfig(PicturesConfig):
    """Which labelled pictures judge a backbone, and beside what."""

    test_source: str | None = None
    """Labelled pictures to test on; `null` = the source itself, each picture by what was learned from others."""
    test_split: str | None = None
    """Split of the test source; `null` = that of the source. Given alone, it is one of the source."""
    label_column: str | None = None
    """Column that holds the classes; found where possible."""
    max_images: int | None = None
    """Use a seeded random subset of at most so many pictures of each source; `null` = all."""
    folds: int = 5
    """Folds of the cross-validation, where there is no test source."""
    baselines: tuple[str, ...] = ("pixels",)
    """What stands beside the backbone: pixels (16 x 16), untrained (the architecture with fresh weights)."""
    seed: int = 0
    """Everything random follows from it."""
    cache: bool = True
    """Keep features beside the backbone, and read them where nothing they follow from has changed."""
    output: str | None = None
    """JSON file to write; `null` = one beside the backbone, named after the evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds < 2:
            raise ValueError(f"folds={self.folds!r}: cross-validation needs at least 2; the usual number is 5")
        for name, least in {"max_images": 1, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value!r}: must be at least {least}")
        for name in self.baselines:
            if name not in BASELINES:
                raise ValueError(f"baselines={self.baselines!r}: no {name!r}; choose of {', '.join(BASELINES)}")


@dataclass
class Backbone:
    """A backbone on its device, and how pictures are brought to it."""

    file: Path
    encoder: Encoder
    transform: EvalTransform
    device: torch.device
    autocast_dtype: torch.dtype | None
    own_source: str | dict[str, float] | None
    """What it was trained on."""
    feature: str
    """What stands for a picture unless another feature is named: patch mean of an MAE, class token of others."""

    @property
    def folder(self) -> Path:
        return self.file.parent

    @property
    def encoder_settings(self) -> dict[str, Any]:
        """What the encoder is built with, as in config.json."""
        return asdict(read_encoder_config(self.folder))

    @classmethod
    def load(cls, path: Path, config: PicturesConfig) -> "Backbone":
        """Load what a run exported.

        Raises:
            ValueError: no whole backbone there, or an image size that does not fit it.
        """
        file = path / BACKBONE_FILE if path.is_dir() else path
        encoder = load_backbone(file)
        described = read_config(file.parent)
        device = cast(torch.device, PartialState().device)
        size = encoder.image_size if config.image_size is None else _pair(config.image_size)
        size, padding = fit_size(size, encoder.patch_size, config.indivisible)
        mean, std = (tuple(described["pretrained_cfg"][name]) for name in ("mean", "std"))
        dtype = autocast_dtype(resolve_precision(config.precision, device))
        transform = EvalTransform(size, mean, std, config.crop_pct, padding)
        provenance = described["ssl_vit"]
        feature = "mean" if provenance.get("objective") == "MAE" else "cls"
        return cls(file, encoder.to(device), transform, device, dtype, provenance.get("source"), feature)


@dataclass
class Task:
    """A backbone and the labelled pictures that judge it."""

    backbone: Backbone
    config: LabelledConfig
    train: Source
    test: Source | None
    split: Split

    @classmethod
    def open(cls, path: Path, config: LabelledConfig) -> "Task":
        """Load and open everything, and find what is wrong with it before the first picture is decoded."""
        backbone = Backbone.load(path, config)
        data = data_config(backbone, config, label_column=config.label_column)
        # Other processes wait until the first one has filled the caches.
        with PartialState().main_process_first():
            train = open_source(data)
            test = None
            if config.test_source is not None or config.test_split is not None:
                named = config.test_source or data.source
                test = open_source(replace(data, source=named, split=config.test_split or data.split))
        return cls(backbone, config, train, test, split_sources(train, test, config.max_images, config.seed))

    def features(
        self, name: str, num_layers: int, views: int = 0
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor] | None]:
        """Features of the training and of the test pictures; see `extract_features`. Every process calls this.

        Args:
            name: "backbone", or a baseline: "pixels", whose only feature is "mean", or "untrained".
            num_layers: last blocks whose class tokens are wanted.
            views: random crops of the training pictures; they follow the centre crop.

        Returns:
            for the training pictures the centre crop and then each view, and for the test pictures the centre crop or
            None. On other processes than the main one they are empty.
        """
        split, test = self.split, None
        encode = self._pixels if name == "pixels" else self._encoder(name, num_layers)
        if self.test is not None and split.test_rows is not None:
            test = encode(self.test, split.test_rows, None)
        chosen = [None, *range(views if name != "pixels" else 0)]
        return [encode(self.train, split.rows, view) for view in chosen], test

    def _pixels(self, source: Source, rows: Any, view: int | None) -> dict[str, Tensor]:
        if process_index() != 0:
            return {}
        workers = choose_num_workers(self.config.num_workers, self.backbone.device)
        channels, crop_pct = self.backbone.encoder.in_chans, self.config.crop_pct
        return {"mean": pixel_features(source, rows, channels, crop_pct=crop_pct, num_workers=workers)}

    def _encoder(self, name: str, num_layers: int) -> Callable[[Source, Any, int | None], dict[str, Tensor]]:
        backbone, encoder, digest = self.backbone, self.backbone.encoder, None
        if name == "untrained":
            encoder = untrained(backbone, self.config.seed)
        elif self.config.cache:
            digest = hash_file(backbone.file)

        def encode(source: Source, rows: Any, view: int | None) -> dict[str, Tensor]:
            transform = replace(backbone.transform, view=view)

            def extract() -> dict[str, Tensor]:
                return extract_features(
                    encoder,
                    source,
                    rows,
                    transform,
                    batch_size=self.config.batch_size,
                    device=backbone.device,
                    num_layers=num_layers,
                    num_workers=choose_num_workers(self.config.num_workers, backbone.device),
                    autocast_dtype=backbone.autocast_dtype,
                )

            if digest is None:
                features = extract()
            else:
                key = feature_key(digest, backbone.encoder_settings, source, rows, transform, backbone.autocast_dtype)
                features = cached_features(backbone.folder / "features", key, num_layers, extract)
            if process_index() == 0:
                for values in features.values():
                    check_finite(values)
            return features

        return encode

    def describe(self) -> dict[str, Any]:
        """What was judged on what, for the result's JSON."""
        return {
            "backbone": str(self.backbone.file),
            "source": self.train.name,
            "test_source": None if self.test is None else self.test.name,
            "num_train": len(self.split.labels),
            "num_test": len(self.split.labels if self.split.test_labels is None else self.split.test_labels),
            "num_classes": self.split.num_classes,
            "image_size": list(self.backbone.transform.size),
            "settings": asdict(self.config),
        }


def untrained(backbone: Backbone, seed: int) -> Encoder:
    """The backbone's architecture with fresh weights."""
    torch.manual_seed(seed)
    return read_encoder_config(backbone.folder).build().to(backbone.device)


def data_config(backbone: Backbone, config: PicturesConfig, label_column: str | None = None) -> DataConfig:
    """The pictures that a script names.

    Raises:
        ValueError: none are named, and the backbone does not say what it was trained on.
    """
    source = config.source or backbone.own_source
    if source is None:
        raise ValueError("--source: name the pictures")
    mean, std = backbone.transform.mean, backbone.transform.std
    outside, pages = config.allow_outside_paths, config.pages
    return DataConfig(source, config.split, config.image_column, label_column, mean, std, outside, pages=pages)


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
    parser = ArgumentParser(exit_on_error=False, description=description)
    parser.add_argument(
        "backbone", type=str, help="folder of a run or of an exported backbone, or its safetensors file"
    )
    kinds = {name: default if isinstance(default, type) else type(default) for name, default in configs.items()}
    for name, default in configs.items():
        parser.add_class_arguments(kinds[name], name or None)
        if not isinstance(default, type):
            prefix = f"{name}." if name else ""
            parser.set_defaults({f"{prefix}{key}": value for key, value in vars(default).items()})
    try:
        given = parser.parse_args(args)
        settings = {}
        for name, kind in kinds.items():
            values = vars(given[name]) if name else {item.name: given[item.name] for item in fields(kind)}
            settings[name or "config"] = kind(**values)
        start_processes()
        evaluate(Path(given.backbone), **settings)
    except (ValueError, ArgumentError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        if torch.distributed.is_initialized():
            PartialState().destroy_process_group()
    return 0


def write_result(default: Path, output: str | None, result: Mapping[str, Any]) -> None:
    """Write a result to the file that was named, or to the default one, and say where.

    Raises:
        ValueError: the file cannot be written.
    """
    file = default if output is None else Path(output)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{file}: the result cannot be written ({reason}); name another file with --output") from error
    print(f"written to {file}")


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
