"""The settings of a run, and the one function that reads them from YAML and the command line."""

import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from ssl_vit.core import front
from ssl_vit.core.paths import PATHS, absolute
from ssl_vit.core.reading import MAX_YAML, read_bytes, read_yaml
from ssl_vit.core.schedules import progress_at
from ssl_vit.core.settings import as_plain, check_file, check_ranges, in_one_line, section, split_config_files
from ssl_vit.core.usage import answer_help
from ssl_vit.core.watch import MAX_WAIT
from ssl_vit.core.writing import replace_text
from ssl_vit.data.sources.source import DataConfig
from ssl_vit.data.transform import InputSpec, Transform, pair
from ssl_vit.evaluation.evaluate import EvaluationConfig
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.weights.pretrained import load_pretrained, open_pretrained
from ssl_vit.objectives.objective import Objective, ObjectiveConfig, RunSize
from ssl_vit.runs.checkpoint import CheckpointConfig
from ssl_vit.runs.folder import LOCK_FILE
from ssl_vit.training.observe.tracking import TrackerName
from ssl_vit.training.optim import OptimConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)


OF_ONE_CALL = ("fresh", "extend", "quiet")
"""Settings of one call; config.yaml does not keep them."""


@dataclass(frozen=True)
class BatchConfig:
    """How many images make a step."""

    size: int = 256
    """Images of one optimizer step, over all processes and micro-batches; the learning rate follows it."""
    per_device: int | None = None
    """Most images that a process takes at once; gradients of a larger share are accumulated. null: all at once."""
    auto: bool = False
    """Find the most images that fit on the GPU, up to per_device, by trying a few sizes before the run starts."""
    repeats: int = 1
    """Draw each image so often in a row, each time augmented anew (repeated augmentation; DeiT 3). The size counts
    draws, and an epoch has as many draws as there are images."""

    def __post_init__(self) -> None:
        check_ranges(self, size="[1, inf)", per_device="[1, inf)", repeats="[1, inf)")

    def num_micro(self, num_processes: int) -> int:
        """Micro-batches of a step.

        Raises:
            ValueError: the batch cannot be cut evenly.
        """
        share, rest = divmod(self.size, num_processes)
        if rest:
            below, above = max(share, 1) * num_processes, (share + 1) * num_processes
            fit = [count for count in range(1, self.size + 1) if self.size % count == 0]
            fewer = max(count for count in fit if count < num_processes)
            more = [count for count in fit if count > num_processes][:1]
            raise ValueError(
                f"size={self.size}: not divisible among {num_processes} processes; the nearest that are: "
                f"{below} and {above}; or start {' or '.join(map(str, [fewer, *more]))} "
                "processes, as a run that goes on must"
            )
        # The fewest micro-batches that fit and cut the share evenly.
        largest = min(self.per_device or share, share)
        return next(count for count in range(-(-share // largest), share + 1) if share % count == 0)


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. `objective` is the config class of the script's objective."""

    objective: ObjectiveConfig
    output_dir: str = ""
    """Folder of the run; named runs/OBJECTIVE_ARCH_SOURCE where none is given. An existing run in it goes on."""
    fresh: bool = False
    """Start anew: an existing run is moved aside, never overwritten."""
    extend: bool = False
    """Lengthen the run in output_dir to the steps or epochs given. Schedules of an unfinished run are stretched from
    its present progress to the new end; those of a finished run begin anew, with warm-up, over the added steps."""
    extended: tuple[tuple[int, int], ...] = ()
    """Written by extend: each step at which the run was lengthened, and its length until then."""
    seed: int = 0
    """Seed of all random draws."""
    epochs: float | None = None
    """Length in passes over the data."""
    steps: int | None = None
    """Length in optimizer steps; wins over epochs."""
    precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    """Number format of the forward pass. auto: bf16 where the device computes it in hardware, else fp32 (no)."""
    tf32: bool = False
    """Let products in fp32 use TF32 on GPUs that have it: several times as fast, with 10 bits of mantissa."""
    compile: bool | Literal["auto"] = "auto"
    """Compile blocks with torch.compile. auto: a plain ViT's on GPUs, in runs long enough to win back the compile time;
    those of other families have not run compiled on a GPU yet."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Record the GPU's work in blocks as CUDA graphs and replay it: gains most with small models and takes more memory;
    one GPU only. auto: off, since the present form of recording has not run on a GPU yet."""
    log_every: int = 50
    """Steps between log lines."""
    quiet: bool = False
    """Show only warnings, scores and the end: no progress bar, no log lines."""
    tracking: TrackerName = "none"
    """Send metrics and figures to a tracker too, in the run's folder: tensorboard, wandb, mlflow or trackio."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """When the metrics show that the features have collapsed: warn, or also save and stop. --on_collapse warn continues
    a run that stopped."""
    max_skipped_steps: int = 10
    """Stop after so many steps in a row whose loss or gradient is not finite; each of them is skipped."""
    rewind_on_spike: int = 0
    """How often a run whose loss jumps goes back to its last checkpoint and continues past the samples since then."""
    profile: int = 0
    """Time so many steps after a warm-up, then trace as many: profile.txt and trace.json.gz in the run's folder."""
    max_hours: float | None = None
    """Save and stop with code 75 after so many hours; the same command continues."""
    max_wait: float = MAX_WAIT
    """End with code 1 when another process gives no sign of life for so many minutes: it was stopped, or its machine is
    frozen or cut off. A busy process gives signs."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        check_ranges(
            self,
            steps="[1, inf)",
            epochs="(0, inf)",
            log_every="[1, inf)",
            max_skipped_steps="[1, inf)",
            rewind_on_spike="[0, inf); 0 never goes back",
            profile="[0, inf); 0 traces nothing",
            max_hours="(0, inf]",
            max_wait=f"(0, {MAX_WAIT:g}] minutes",
            seed="[0, inf)",
        )
        if self.checkpoint.keep_best in ("knn", "linear") and self.evaluation.every_steps is None:
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best!r}: needs scores during training; "
                "set evaluation.every_steps, or use rankme or loss"
            )
        for name in ("layer_decay", "patch_embed_lr"):
            if getattr(self.optim, name) != 1 and hasattr(self.objective, name):
                raise ValueError(f"optim.{name}={getattr(self.optim, name)!r}: this objective has objective.{name}")
        for name, example in (("base_lr", "a number, such as 5e-4"), ("optimizer", "adamw")):
            if getattr(self.optim, name) == "auto" and hasattr(self.objective, "num_classes"):
                raise ValueError(f"optim.{name}='auto': is for learning without labels; give {example}")
        if self.optim.freeze_backbone_until and self.encoder.pretrained is None:
            raise ValueError(
                f"optim.freeze_backbone_until={self.optim.freeze_backbone_until!r}: fixes the weights that a run "
                "starts from, and these are fresh; name some in encoder.pretrained, or leave it out"
            )
        if self.extend and self.fresh:
            raise ValueError("extend=True: lengthens a run, and fresh starts anew; leave one of them out")
        if self.batch.repeats > 1 and self.data.streaming:
            raise ValueError(
                f"batch.repeats={self.batch.repeats}: a stream gives each image once; leave this or data.streaming out"
            )
        starts = [0, *(step for step, _ in self.extended)]
        if any(not start < step <= length for start, (step, length) in zip(starts, self.extended, strict=False)):
            raise ValueError(f"extended={self.extended!r}: is written by --extend; leave this setting out")

    def num_steps(self, num_samples: int | None) -> int:
        """Optimizer steps of the whole run over a source of `num_samples` images (None: unknown)."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            raise ValueError("steps=None and epochs=None: give the length of the run with --epochs N or --steps N")
        if num_samples is None:
            raise ValueError(
                f"epochs={self.epochs!r}: the number of images of the stream is not known; give the length with "
                "--steps N, or the number with --data.num_samples N"
            )
        return max(1, int(self.epochs * num_samples // self.batch.size))

    def notes(self, num_samples: int | None) -> list[str]:
        """Sentences for the user about these settings and so many images (None: unknown)."""
        size = self.batch.size
        if num_samples is None or num_samples >= size:
            return []
        few = f"{num_samples:,} images are fewer than batch.size {size}: a step would see the same image more than once"
        return [f"{few}; lower it, to {2 ** max(num_samples.bit_length() - 2, 0)} for example"]

    def progress(self, step: int, num_steps: int) -> float:
        """The share of the run's `num_steps` that is done before `step`, see `progress_at`."""
        return progress_at(step, num_steps, self.extended)

    def resolve(self, num_samples: int | None, num_classes: int = 0) -> tuple["RunConfig", list[str]]:
        """Replace `auto` settings by numbers, for a source of `num_samples` images of `num_classes` classes.

        If `num_samples` is None (unknown), assume that the run sees each image once.

        Returns:
            The settings, and a line for each number that says why.
        """
        num_steps = self.num_steps(num_samples)
        images, sides = num_samples or num_steps * self.batch.size, pair(self.encoder.image_size)
        size = RunSize(images, self.batch.size, num_steps, num_classes, sides)
        with section("objective"):
            found = self.objective.resolve(size)
        objective = dataclasses.replace(self.objective, **{name: value.value for name, value in found.items()})
        reasons = [f"objective.{name} {value}" for name, value in found.items()]
        with section("optim"):
            optim, why_optim = self.optim.resolve(size, is_trained=self.encoder.pretrained is not None)
        reasons += why_optim
        if reasons and num_samples is None:
            reasons.append(f"assuming one pass over {size.num_samples:,} images; set --data.num_samples to be exact")
        data = self.data
        if data.cache != "none" and data.cache_side == "auto":
            shorter = min(pair(self.encoder.image_size))
            side, why = -(-shorter * 8 // 7), f"8/7 of the encoder's {shorter} pixels"
            if data.tile_size is not None:
                side, why = min(pair(data.tile_size)), "that of tiles, which stay as they are"
            data = dataclasses.replace(data, cache_side=side)
            reasons.append(f"data.cache_side {side}: {why}")
        return dataclasses.replace(self, objective=objective, optim=optim, data=data), reasons

    def build_objective(self) -> Objective:
        """Encoder and objective with the fresh weights that the seed gives."""
        torch.manual_seed(self.seed)
        with section("encoder"):
            encoder = self.encoder.build()
        if self.encoder.pretrained is not None:
            with _naming_pretrained(self.encoder.pretrained):
                load_pretrained(encoder, self.encoder.pretrained)
        with section("objective"):
            return self.objective.build(encoder)

    def build_transform(self, encoder: Encoder) -> Transform:
        """The objective's transform: from an image to what the objective is given.

        Raises:
            ValueError: sizes or normalisation that do not fit the encoder.
        """
        for name in ("mean", "std"):
            values = getattr(self.data, name)
            if len(values) != encoder.in_chans:
                raise ValueError(
                    f"data.{name}={values!r}: has {len(values)} values, and encoder.in_chans is {encoder.in_chans}: "
                    "give one for each channel"
                )
        with section("objective"):
            spec = InputSpec(encoder.image_size, encoder.stride, self.data.normalization)
            return self.objective.build_transform(spec)


@contextmanager
def _naming_pretrained(path: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"encoder.pretrained={path!r}: {error}") from error


def parse_run(defaults: RunConfig, args: Sequence[str] | None = None) -> RunConfig:
    """Read a run's settings: `defaults`, then `--config` files in their order, then flags.

    Raises:
        ValueError: one line that names the file or flag, the key and its value, and what to do.
    """
    args = list(sys.argv[1:] if args is None else args)
    keys = dict(_flatten(defaults))
    files, flags = split_config_files(args, keys)
    for path in files:
        check_file(path, keys)
    # Files first, so that a flag wins over a file wherever it stands.
    words = [*(f"--config={path}" for path in files), *flags]
    silent = [word for word in words if word.partition("=")[0] != "--print_config"]
    namespace = _parse(defaults, silent, keys)
    usual, arch = defaults, namespace.encoder.arch
    if namespace.encoder.pretrained is not None:
        # Unset encoder options default to those of the pretrained backbone.
        usual = _start_from(defaults, namespace.encoder.pretrained)
        arch = usual.encoder.arch
    usual = dataclasses.replace(usual, encoder=usual.encoder.suited_to(arch))
    if usual != defaults or silent != words:
        namespace = _parse(usual, words, keys)
    sections: dict[str, Any] = {}
    for item in dataclasses.fields(defaults):
        value = namespace[item.name]
        if _is_section(defaults, item.name):
            with section(item.name):
                value = type(getattr(defaults, item.name))(**vars(value))
        sections[item.name] = value
    config = RunConfig(**sections)
    if not any(word.partition("=")[0] == "--output_dir" for word in flags) and (own := _run_of(files)) is not None:
        return dataclasses.replace(config, output_dir=str(own))
    return config if config.output_dir else dataclasses.replace(config, output_dir=own_folder(config))


def _parse(defaults: RunConfig, words: list[str], keys: dict[str, Any]) -> Namespace:
    parser = _build_parser(defaults)
    try:
        return parser.parse_args(answer_help(parser, words))
    except ArgumentError as error:
        raise ValueError(in_one_line(str(error), keys)) from error


def _start_from(defaults: RunConfig, path: str) -> RunConfig:
    """The defaults with what is known of the weights to start from: architecture, sizes, normalisation and crop."""
    with _naming_pretrained(path):
        found = open_pretrained(path)
    own, data = defaults.encoder, defaults.data
    encoder = dataclasses.replace(
        found.config or own,
        drop_path_rate=own.drop_path_rate,
        drop_path_schedule=own.drop_path_schedule,
        grad_checkpointing=own.grad_checkpointing,
        pretrained=path,
    )
    if found.normalization is not None:
        data = dataclasses.replace(data, **found.normalization._asdict())
    crop_pct = found.crop_pct or defaults.evaluation.crop_pct
    evaluation = dataclasses.replace(defaults.evaluation, crop_pct=crop_pct)
    return dataclasses.replace(defaults, encoder=encoder, data=data, evaluation=evaluation)


def write_config(config: RunConfig, path: Path) -> None:
    """Write the resolved settings as YAML, in the form that `--config` reads, from whatever folder."""
    values = as_stored(config)
    for name in OF_ONE_CALL:
        values.pop(name)
    text = yaml.safe_dump(values, sort_keys=False)
    try:
        if read_bytes(path, MAX_YAML) == text.encode():  # going on needs no space on the disk
            return
    except (OSError, ValueError):
        pass
    replace_text(path, text)


def as_stored(config: RunConfig) -> dict[str, Any]:
    """`as_plain` with absolute paths, which mean the same from whatever folder."""
    values = as_plain(config)
    for section_name, name in PATHS:
        if name in values[section_name]:
            values[section_name][name] = absolute(values[section_name][name])
    return values


def _run_of(files: list[str]) -> Path | None:
    """The output folder of the last file that names one; a run's config.yaml means the folder that it lies in now."""
    for path in map(Path, reversed(files)):
        if "output_dir" in read_yaml(path, links=True):
            is_run = path.name == "config.yaml" and (path.parent / LOCK_FILE).exists()
            return path.parent if is_run else None
    return None


def own_folder(config: RunConfig) -> str:
    """The default folder of a run."""
    objective = type(config.objective).__name__.removesuffix("Config").lower()
    given = config.data.source
    names = [name.rstrip("/").rpartition("/")[2] for name in ([given] if isinstance(given, str) else given)]
    source = "+".join(re.sub(r"[^\w.-]+", "-", name).strip("-.") for name in names)
    return f"runs/{objective}_{config.encoder.arch}_{source or 'images'}"


def _build_parser(defaults: RunConfig) -> ArgumentParser:
    parser = ArgumentParser(
        prog=front.program,
        exit_on_error=False,
        description="Flags win over --config files. Without arguments the quickstart runs.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings; may be repeated.")
    sections = [item.name for item in dataclasses.fields(defaults) if _is_section(defaults, item.name)]
    parser.add_class_arguments(RunConfig, skip=set(sections))
    for name in sections:
        parser.add_class_arguments(type(getattr(defaults, name)), name)
    parser.set_defaults(dict(_flatten(defaults)))
    return parser


def _is_section(config: Any, name: str) -> bool:
    return dataclasses.is_dataclass(getattr(config, name))


def _flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if _is_section(config, item.name):
            yield from _flatten(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value
