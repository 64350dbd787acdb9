"""Distillation from a trained classifier through a head of its own (DeiT, Touvron et al. 2021, arXiv:2012.12877)."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.data.augment.supervised import OtherInput
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.weights.classifier import NamedClassifier, open_classifier
from ssl_vit.objectives.frozen import Frozen

Distillation = Literal["none", "soft", "hard"]


def distillation_loss(
    logits: Float[Tensor, "b classes"],
    logits_kd: Float[Tensor, "b classes"],
    teacher_logits: Float[Tensor, "b classes"],
    base_loss: Float[Tensor, ""] | Callable[[Tensor], Float[Tensor, ""]],
    kind: Distillation,
    alpha: float,
    tau: float,
) -> Float[Tensor, ""]:
    """(1 - alpha) x the loss on labels + alpha x the loss on the teacher's answers, equations 2 and 3.

    Hard: the cross-entropy with the teacher's most likely class. Soft: the divergence of the two softened
    distributions, times tau squared, as the mean over images and classes, as in the paper's code; the sum over classes
    would be `classes` times as much.

    Args:
        logits: of the head that learns from labels.
        logits_kd: of the head that learns from the teacher; the same tensor where one head learns from both.
        base_loss: loss of `logits` on the labels, or what computes it from them.
        kind: none leaves the teacher out.
        tau: temperature of the soft kind.

    Returns:
        A scalar.
    """
    base = base_loss(logits) if callable(base_loss) else base_loss
    if kind == "none":
        return base
    if kind == "hard":
        taught = F.cross_entropy(logits_kd, teacher_logits.argmax(dim=1))
    else:
        student, teacher = ((values / tau).log_softmax(dim=1) for values in (logits_kd, teacher_logits))
        taught = F.kl_div(student, teacher, reduction="sum", log_target=True) * tau**2 / logits_kd.numel()
    return (1 - alpha) * base + alpha * taught


def read_teacher(name: str, encoder: Encoder, num_classes: int) -> Frozen:
    """The classifier that `teacher` names, frozen.

    With an encoder on the meta device, where the number of classes is not known yet, no weights are read.

    Raises:
        ValueError: there is none, or it takes other channels or knows other classes; begins with `teacher=`.
    """
    found = _open(name)
    if found.in_chans != encoder.in_chans:
        raise ValueError(
            f"teacher={name!r}: takes {found.in_chans} channels, and encoder.in_chans is {encoder.in_chans}; name a "
            "teacher for such images"
        )
    is_meta = next(encoder.parameters()).is_meta
    if found.num_classes != num_classes and not is_meta:
        raise ValueError(
            f"teacher={name!r}: knows {found.num_classes} classes, and the run has {num_classes} (num_classes); name a "
            "teacher that was trained on these classes"
        )
    try:
        with torch.random.fork_rng(devices=[]):  # the student's weights do not depend on what the teacher draws
            model = found.build() if is_meta else found.read()
    except ValueError as error:
        raise ValueError(f"teacher={name!r}: {error}") from error
    return Frozen(model, "teacher", f"objective.teacher={name!r}")


def teacher_input(name: str) -> OtherInput:
    """What the teacher takes: its size of images and their normalisation.

    Raises:
        ValueError: there is no such classifier.
    """
    found = _open(name)
    return OtherInput(found.image_size, found.normalization)


def check_class_names(name: str, class_names: Sequence[str]) -> None:
    """Refuse a teacher whose classes have the same names as those of the data, in another order.

    Raises:
        ValueError: begins with `objective.teacher=`.
    """
    known = _open(name).class_names
    if known != tuple(class_names) and sorted(known) == sorted(class_names):
        first = next(number for number, pair in enumerate(zip(known, class_names, strict=True)) if pair[0] != pair[1])
        raise ValueError(
            f"objective.teacher={name!r}: its class {first} is {known[first]!r}, and that of the data is "
            f"{class_names[first]!r}; name a teacher with the same order of classes"
        )


def _open(name: str) -> NamedClassifier:
    try:
        return open_classifier(name)
    except ValueError as error:
        raise ValueError(f"teacher={name!r}: {error}") from error
