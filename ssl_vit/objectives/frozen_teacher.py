"""A frozen encoder as a teacher: found, checked against the student, and read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple

import torch

from ssl_vit.core.settings import renamed_settings
from ssl_vit.data.transform import Normalization, check_divisible, pair
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.weights.pretrained import Pretrained, load_found, open_pretrained
from ssl_vit.objectives.frozen import Frozen

_STRETCH = 1.1  # how far the proportions of the teacher's images may differ from those of the student's


class FoundTeacher(NamedTuple):
    """What is known of a teacher before its weights are read."""

    name: str
    weights: Pretrained
    config: EncoderConfig
    """For the size of the images that it will see."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of its images."""
        return pair(self.config.image_size)

    @property
    def normalization(self) -> Normalization | None:
        """None where its weights do not tell."""
        return self.weights.normalization

    def build(self, in_chans: int) -> Frozen:
        """The teacher with its weights; without them on the device `meta`. What is drawn elsewhere stays the same.

        Raises:
            ValueError: its weights cannot be read, or it takes another number of channels.
        """
        if self.config.in_chans != in_chans:
            raise ValueError(
                f"teacher={self.name!r}: takes {self.config.in_chans} channels, and encoder.in_chans is {in_chans}: "
                "give both the same number (encoder.in_chans 3 reads grey images as RGB)"
            )
        with torch.random.fork_rng(devices=[]), _naming(self.name):
            teacher = self.config.build()
            if not next(teacher.parameters()).is_meta:
                load_found(teacher, self.weights)
        return Frozen(teacher, "teacher", f"objective.teacher={self.name!r}", teacher.read_sha256)


def find_teacher(
    name: str | None,
    arch: str | None,
    size: int | tuple[int, int] | Literal["auto"],
    student_size: tuple[int, int],
    student_stride: tuple[int, int],
) -> FoundTeacher:
    """Find a frozen teacher and decide on the size of the images that it sees.

    Args:
        name: what `encoder.pretrained` takes.
        arch: the architecture, where the weights do not tell it.
        size: of its images; auto: as many tokens as the student has, or as many pixels, whichever is larger.
        student_size, student_stride: height and width of the student's images and tokens in pixels.

    Raises:
        ValueError: there are no such weights, they do not tell their architecture, or the size does not suit them.
    """
    if name is None:
        raise ValueError("teacher=None: name the frozen backbone to learn from, such as a run's folder or a timm model")
    with _naming(name):
        with torch.device("cpu"):
            found = open_pretrained(name)
        config = found.config if arch is None else EncoderConfig(arch)
        if config is None:
            raise ValueError("these weights do not tell their architecture; name it with objective.teacher_arch")
        with torch.device("meta"):
            stride = config.build().stride
    if size == "auto":
        sides = zip(student_size, student_stride, stride, strict=True)
        height, width = (max(-(-length // own) * own, length // step * own) for length, step, own in sides)
        chosen = (height, width)
    else:
        chosen = pair(size)
        check_divisible(f"teacher_size={size!r}", chosen, stride)
        if not 1 / _STRETCH <= chosen[0] * student_size[1] / (chosen[1] * student_size[0]) <= _STRETCH:
            raise ValueError(
                f"teacher_size={size!r}: would distort views, whose size is encoder.image_size {student_size}; use "
                "auto, or the same proportions"
            )
    return FoundTeacher(name, found, replace(config, image_size=chosen, drop_path_rate=0.0))


@contextmanager
def _naming(teacher: str) -> Iterator[None]:
    try:
        with renamed_settings({"encoder.arch": "objective.teacher_arch"}):
            yield
    except ValueError as error:
        raise ValueError(f"teacher={teacher!r}: {error}") from error
