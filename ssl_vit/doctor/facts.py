"""What the doctor finds: a dataclass for each section. `str` gives the page, `dataclasses.asdict` the JSON."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from ssl_vit.core.text import plain
from ssl_vit.data.copies import INSTALL
from ssl_vit.doctor.cost import PacedStep
from ssl_vit.training.device.memory import Memory

_LABEL = 14  # width of the page's left column
_WIDTH = 110
_BUSY = 0.5  # load of a core above which rates are lower than they would be

Line = tuple[str, str]
"""Label in the left column, empty where a fact takes several lines; and text."""


@dataclass(frozen=True)
class Place:
    """Where an image is: its row in the source, and its file if the source names one."""

    row: int
    path: str | None

    def __str__(self) -> str:
        return f"row {self.row}" + (f" ({self.path})" if self.path else "")


@dataclass(frozen=True)
class UnreadableImage(Place):
    reason: str

    def __str__(self) -> str:
        return f"{super().__str__()}: {self.reason}"


@dataclass(frozen=True)
class Repeat(Place):
    same_as: Place


@dataclass
class Unreadable:
    """Images that cannot be read."""

    count: int = 0
    share: float = 0.0
    """Of the images that were looked at."""
    interval: tuple[float, float] | None = None
    """The share in the whole source (95 % interval); None if all images were looked at."""
    examples: list[UnreadableImage] = field(default_factory=list)
    """The first few."""

    def lines(self, num_read: int) -> list[Line]:
        text = f"{self.count:,} of {num_read:,}, {self.share:.2%}" if self.count else "none"
        if self.interval is not None:
            text += f"; of all images {self.interval[0]:.2%} to {self.interval[1]:.2%} (95 % interval)"
        lines = [("unreadable", text), *(("", str(image)) for image in self.examples)]
        more = self.count - len(self.examples)
        return [*lines, ("", f"and {more:,} more")] if more else lines


@dataclass
class Duplicates:
    """Images that are the same as an earlier one."""

    count: int = 0
    groups: int = 0
    """Different images that they repeat."""
    examples: list[Repeat] = field(default_factory=list)
    """The first few."""

    def lines(self, label: str, verb: str, among: str) -> list[Line]:
        copies, images = "copy" if self.count == 1 else "copies", "image" if self.groups == 1 else "images"
        text = f"{self.count:,} {copies} of {self.groups:,} {images}" if self.count else "none"
        return [(label, text + among), *(("", f"{item} {verb} {item.same_as}") for item in self.examples)]


@dataclass(frozen=True)
class Pixels:
    """Mean and standard deviation of each channel over all pixels, in [0, 1]; () if no image can be read."""

    count: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Sizes (height, width) in pixels; the smallest, median and largest are those by area."""

    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]
    num_distinct: int
    share_not_square: float

    def lines(self) -> list[Line]:
        text = ", ".join(f"{name} {as_size(getattr(self, name))}" for name in ("smallest", "median", "largest"))
        different = f"{self.num_distinct:,} different; {self.share_not_square:.0%} are not square"
        return [("sizes", f"{text} (width x height, by area)"), ("", different)]


@dataclass(frozen=True)
class Class:
    """A class and its number of images."""

    name: str
    size: int


@dataclass(frozen=True)
class Labels:
    """How the labels of a whole source are spread."""

    num_classes: int
    """Classes that have images."""
    smallest: Class
    largest: Class
    num_unlabelled: int

    def text(self, num_images: int) -> str:
        smallest, largest = self.smallest, self.largest
        if self.num_classes == 1:
            text = f"1 class, {largest.name!r} with {largest.size:,}"
        elif smallest.size == largest.size:
            text = f"{self.num_classes:,} classes of {smallest.size:,} images each"
        else:
            text = (
                f"{self.num_classes:,} classes, the smallest {smallest.name!r} with {smallest.size:,} images, "
                f"the largest {largest.name!r} with {largest.size:,}"
            )
        without = self.num_unlabelled
        return text + (f"; {without / num_images:.1%} of the images have no label" if without else "")


@dataclass
class RunFacts:
    """The run that a config makes of the source, and what it costs on this machine."""

    objective: str
    arch: str
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_parameters: int
    """Trainable ones."""
    batch_size: int
    num_steps: int
    epochs: float
    device: str
    cores: int
    memory_mib: Memory
    input_rate: float | None = None
    """Images per second of reading and cropping on one core; None if no image can be read."""
    step: PacedStep | None = None
    """None if no step was measured."""

    def lines(self, decode_rate: float | None, load_per_core: float) -> list[Line]:
        busy = "; busy with other work, so that rates are lower than they would be" if load_per_core > _BUSY else ""
        steps = f"{self.num_steps:,} step{'s' if self.num_steps > 1 else ''}"
        model = f"{self.objective}, {self.arch}, input {as_size(self.image_size)}"
        lines = [
            ("run", f"{model}, {self.num_parameters / 1e6:.1f} M trainable parameters"),
            ("", f"{steps} of {self.batch_size:,} images = {self.epochs:,.4g} epochs"),
            ("machine", f"{self.device}, {self.cores} cores{busy}"),
        ]
        if self.input_rate is not None:
            crops = f"with the objective's crops {self.input_rate:,.0f}"
            lines.append(("input", f"{decode_rate:,.0f} images/s on one core, {crops}"))
        memory, step = self.memory_mib, self.step
        if step is None:
            # If a step was tried and failed, the problems say why.
            lines.append(("step", "not measured; --step true measures one"))
            activations = "which are measured with a step"
        else:
            rate = f"{step.rate:,.1f} images/s without input, precision {step.precision}"
            workers = f"data.num_workers {step.num_workers} for each training process"
            if self.device.startswith("CPU"):
                workers = "data.num_workers 0: on a CPU the step has all cores, and input is read between the steps"
            hours = f"{step.hours:,.1f} hours" if step.hours >= 1 else f"{60 * step.hours:.1f} minutes"
            lines += [
                ("step", f"{rate}, measured with {step.num_images} images at once"),
                ("workers", workers),
                ("length", f"{hours} on one such device, at {step.run_rate:,.1f} images/s"),
            ]
            activations = f"{step.activations:,.0f} MiB for {step.num_images} images at once"
        teacher = f" (the teacher's {memory.teacher:,.0f} of them)" if memory.teacher else ""
        held = f"parameters {memory.parameters:,.0f}{teacher} + gradients {memory.gradients:,.0f}"
        return [
            *lines,
            ("memory", f"{memory.total:,.0f} MiB = {held} + optimizer {memory.optimizer:,.0f}"),
            ("", f"and activations, {activations}"),
        ]


@dataclass(frozen=True)
class Facts:
    """All that the doctor can say of a source and a run. Counts are numbers of images."""

    source: str
    notes: list[str]
    """What the source itself has to say."""
    num_images: int
    num_read: int
    """Images that were looked at."""
    sizes: Sizes | None
    files: dict[str, int]
    """Images by format and kind, the most frequent first; `formats` and `channels` count each of the two."""
    formats: dict[str, int]
    channels: dict[str, int]
    num_16_bit: int
    dropped: dict[str, int]
    """What images hold and the run does not use."""
    unreadable: Unreadable
    duplicates: Duplicates
    near_duplicates: Duplicates | None
    pixels: Pixels
    decode_rate: float | None
    """Images per second of reading and decoding on one core; None if no image can be read."""
    labels: Labels | None
    pretrained: str | None
    settings: dict[str, Any] | None
    """Mean, standard deviation and channels that suit the images, by section; None if no image can be read."""
    run: RunFacts | None
    """None if the config's run cannot be built."""
    load_per_core: float
    problems: list[str]
    warnings: list[str]

    def __str__(self) -> str:
        """One page for the terminal."""
        all_read = self.num_read == self.num_images
        among = "" if all_read else " among those"
        lines = [
            ("source", self.source),
            *(("note", note) for note in self.notes),
            ("images", f"{self.num_images:,}" + (", all looked at" if all_read else f"; looked at {self.num_read:,}")),
            ("files", _counts(self.files)),
            *(self.sizes.lines() if self.sizes else []),
            *([("not used", _counts(self.dropped, "hold "))] if self.dropped else []),
            *self.unreadable.lines(self.num_read),
            *self.duplicates.lines("duplicates", "is the same as", among),
        ]
        if self.near_duplicates is None:
            lines.append(("nearly so", f"not looked for: {INSTALL}"))
        else:
            lines += self.near_duplicates.lines("nearly so", "looks the same as", among)
        lines.append(("labels", self.labels.text(self.num_images) if self.labels else "none"))
        run = [("run", "cannot be built")]
        if self.run is not None:
            run = self.run.lines(self.decode_rate, self.load_per_core)
        page = [*map(_line, lines), "", *self._settings(), *map(_line, run)]
        for title in ("problems", "warnings"):
            if getattr(self, title):
                page += ["", title, *(_fill(text, "  - ", "    ") for text in getattr(self, title))]
        if not self.problems:
            page += ["", "No problem found." if self.warnings else "No problem found, and nothing to warn of."]
        return "\n".join(page)

    def _settings(self) -> list[str]:
        if self.settings is None:
            return []
        text = yaml.safe_dump(self.settings, sort_keys=False, default_flow_style=None)
        what = f"mean and deviation of {self.pixels.count:,} pixels"
        if self.pretrained is not None:
            what = f"normalisation of {self.pretrained}"
        return [f"{plain(what)}, to be pasted into a config:", *(f"  {line}" for line in text.splitlines()), ""]


def as_size(size: tuple[int, int]) -> str:
    """Height and width as people say a size: width first."""
    return f"{size[1]} x {size[0]}"


def _counts(counts: Mapping[str, int], verb: str = "") -> str:
    return "; ".join(f"{count:,} {verb}{name}" for name, count in counts.items())


def _line(line: Line) -> str:
    return _fill(line[1], f"{line[0]:{_LABEL}}", " " * _LABEL)


def _fill(text: str, first: str, rest: str) -> str:
    """Wrap a text from outside; `first` begins its first line, `rest` the others."""
    return textwrap.fill(
        plain(text), _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
