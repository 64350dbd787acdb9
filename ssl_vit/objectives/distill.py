"""Distillation of any frozen backbone into any other on images without labels: the features of the image compared with
a queue, as SEED does (Fang et al. 2021, arXiv:2101.04731), and the relations of the patches among each other."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.core.distributed import gather_with_gradient, process_index
from ssl_vit.core.settings import check_interval, check_ranges
from ssl_vit.data.augment.crops import OrientationConfig
from ssl_vit.data.augment.device import renormalize
from ssl_vit.data.augment.multicrop import MultiCropConfig, MultiCropTransform
from ssl_vit.data.transform import InputSpec, Normalization
from ssl_vit.models.encoder import Encoder, Features
from ssl_vit.objectives.collapse import feature_std, rankme
from ssl_vit.objectives.frozen import Frozen
from ssl_vit.objectives.frozen_teacher import FoundTeacher, find_teacher
from ssl_vit.objectives.objective import Resolved, RunSize, Taken
from ssl_vit.objectives.views import ViewsObjective

_QUEUES = {
    50: 16,
    100: 32,
    250: 64,
    500: 128,
    1_000: 256,
    2_000: 512,
    4_000: 1024,
    10_000: 2048,
    20_000: 4096,
}
_LARGEST_QUEUE = 8192


@dataclass(frozen=True)
class DistillConfig(OrientationConfig):
    """Settings of distillation; the defaults are those of lightly-train's third form, but for `center`, and the size of
    the teacher's images."""

    keeps_fresh_weights: ClassVar[bool] = True  # `build` does not change an encoder's fresh weights

    teacher: str | None = None
    """Frozen backbone to learn from, of any family: what encoder.pretrained takes. Runs go on with the same weights
    alone, wherever they lie."""
    teacher_arch: str | None = None
    """Name of the teacher's architecture in timm, for weights that do not tell it."""
    teacher_size: int | tuple[int, int] | Literal["auto"] = "auto"
    """Size to which a view is resized for the teacher: one number, or [height, width], a multiple of its patch size.
    auto: as many tokens as the student has, or as many pixels, whichever is larger."""
    teacher_feature: Literal["cls", "mean"] = "cls"
    """What stands for an image in the teacher: its class token (or own pooling), or the mean of its patch tokens."""
    queue_size: int | Literal["auto"] = "auto"
    """Teacher's features of earlier images that an image is compared with, beside those of its batch, or auto: by the
    number of images, from 16 to 8,192."""
    temperature: float = 0.07
    """Temperature of all similarities, the teacher's and the student's."""
    center: bool = True
    """Take from the teacher's features of images what all of them have in common before they are compared, so that
    images differ; false: compare them as they are, as published."""
    local_weight: float = 1.0
    """Weight of the loss of patch relations, beside 1 for that of the image; 0 leaves it out."""
    mixup: bool = True
    """Mix each image of a batch with its neighbour, for both networks, by a share that each step draws anew."""
    crop_scale: tuple[float, float] = (0.14, 1.0)
    """Smallest and largest share of the image's area that a view covers."""
    color_jitter_prob: float = 0.8
    """Probability of colour jitter."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strength of brightness, contrast, saturation and hue; the last two are for images of 3 channels only."""
    grey_prob: float = 0.2
    """Probability of becoming grey; images of other than 3 channels never do."""
    blur_prob: float = 0.0
    """Probability of blur. lightly-train blurs every view by at most .1 pixels, which changes nothing."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur in pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval(self, "crop_scale")
        check_ranges(
            self,
            teacher_size="[1, 65536] pixels",
            queue_size="[1, inf)",
            temperature="(0, inf)",
            local_weight="[0, inf); 0 leaves it out",
            **dict.fromkeys(("color_jitter_prob", "grey_prob", "blur_prob"), "[0, 1]"),
        )
        self._view()

    def _view(self) -> "_OneView":
        """The settings of the view that both networks see."""
        return _OneView(
            flip_prob=self.flip_prob,
            flip_vertical_prob=self.flip_vertical_prob,
            quarter_turn_prob=self.quarter_turn_prob,
            global_crop_scale=self.crop_scale,
            num_local_crops=0,
            color_jitter_prob=self.color_jitter_prob,
            color_jitter=self.color_jitter,
            grey_prob=self.grey_prob,
            blur_prob=(self.blur_prob, 0.0, 0.0),
            blur_sigma=self.blur_sigma,
            solarize_prob=(0.0, 0.0, 0.0),
        )

    def resolve(self, size: RunSize) -> dict[str, Resolved]:
        """The size of the queue, if it is `auto`."""
        if self.queue_size != "auto":
            return {}
        found = next((queue for images, queue in _QUEUES.items() if size.num_samples <= images), _LARGEST_QUEUE)
        return {"queue_size": Resolved(found, f"lightly-train's for {size.num_samples:,} images")}

    def build(self, encoder: Encoder) -> "Distill":
        """Build the objective on an encoder, the student; the teacher's weights are read, but for one on `meta`.

        Raises:
            ValueError: there is no such teacher, or it does not suit the student.
        """
        if self.queue_size == "auto":
            raise ValueError("queue_size='auto': follows from the number of images; use resolve() or give a number")
        teacher = self._find_teacher(encoder.image_size, encoder.stride).build(encoder.in_chans)
        self._check_grids(encoder, teacher.model)
        return Distill(self, encoder, teacher)

    def _find_teacher(self, student_size: tuple[int, int], student_stride: tuple[int, int]) -> FoundTeacher:
        return find_teacher(self.teacher, self.teacher_arch, self.teacher_size, student_size, student_stride)

    def _check_grids(self, encoder: Encoder, teacher: Any) -> None:
        """Refuse grids that have no relations to compare."""
        for name, model, advice in (
            ("student", encoder, "a larger encoder.image_size"),
            ("teacher", teacher, "a larger teacher_size"),
        ):
            if self.local_weight and model.num_patches < 2:
                raise ValueError(
                    f"local_weight={self.local_weight!r}: compares patches, and at {model.image_size} pixels the "
                    f"{name} has a single one; use 0, or {advice}"
                )

    def build_transform(self, spec: InputSpec) -> "DistillTransform":
        """One view of an image, for the student and, at its own size and normalisation, for the teacher."""
        teacher = self._find_teacher(spec.image_size, spec.stride)
        return DistillTransform(self._view().build_transform(spec), teacher.image_size, teacher.normalization)


@dataclass(frozen=True)
class _OneView(MultiCropConfig):
    num_global_crops: ClassVar[int] = 1


class DistillTransform:
    """Turns an image into one view: `images [b c h w]` for the student and `teacher_images [b c h w]` of the same
    pixels, resized (bicubic) to the teacher's size and normalised as the teacher was trained."""

    def __init__(self, view: MultiCropTransform, size: tuple[int, int], normalization: Normalization | None) -> None:
        self.view, self.size = view, size
        self.normalization = view.spec.normalization if normalization is None else normalization

    def __call__(self, image: UInt8[Tensor, "c h w"], rng: np.random.Generator) -> dict[str, Tensor]:
        return self.view(image, rng)

    def on_device(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        images = self.view.on_device(batch, device)["global_crops"][:, 0]
        seen = renormalize(images, self.view.spec.normalization, self.normalization)
        if images.shape[-2:] != self.size:
            seen = F.interpolate(seen, self.size, mode="bicubic", antialias=True)
        return {"images": images, "teacher_images": seen}


class Distill(ViewsObjective):
    """A student that learns from a frozen teacher how similar an image is to others, and its patches to each other.

    Both networks see the same view. The student's feature of the image goes through a linear layer to the teacher's
    width; its similarities to the teacher's features of other images, the image itself among them, follow the teacher's
    (`queue_loss`). The others are those of the micro-batch in all processes, and those of `queue_size` earlier images,
    newest first and zeros at the start. The student's patch tokens go through another linear layer and, where the grids
    differ, are resampled to the teacher's grid (bilinear); how similar they are to each other follows the teacher
    (`relation_loss`).

    The queue moves once a step, by the teacher's features of the whole step in the order of the samples, and not with
    steps that were skipped. So the number of processes does not change what is learned; accumulation does, since an
    image is then compared with fewer images of its own step. lightly-train has one queue for each GPU.

    The teacher is a `Frozen` model. The queue is a buffer, and in checkpoints.
    """

    queue: Tensor

    def __init__(self, config: DistillConfig, encoder: Encoder, teacher: Frozen) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.frozen = (teacher,)
        width: Any = teacher.model.embed_dim
        self.head = _linear(encoder.embed_dim, width)
        self.local_head = _linear(encoder.embed_dim, width) if config.local_weight else None
        self.register_buffer("queue", torch.zeros(int(config.queue_size), width))
        self._seen: list[Tensor] = []  # the teacher's features of each micro-batch of the step at `_seen_at`
        self._seen_at: float | None = None
        self._last_cls: Tensor | None = None

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        config, images, seen = self.config, batch["images"], batch["teacher_images"]
        if config.mixup:
            share = draw_share(progress)
            images, seen = mix_neighbours(images, share), mix_neighbours(seen, share)
        teacher = self.teach(seen)
        [student] = self.encoder.forward_groups([images], cls_only=self.local_head is None)
        feature = F.normalize(self.head(student.cls).float(), dim=-1)
        known = gather_with_gradient(teacher.cls)
        self._note(known, progress)
        bank, target = torch.cat([known, self.queue]), teacher.cls
        if config.center:
            bank, target = without_common(bank, target)
        loss_image = queue_loss(feature, target, bank, config.temperature)
        losses = {"loss": loss_image, "loss_image": loss_image.detach()}
        if self.local_head is not None:
            grids = (self.encoder.grid_of(*images.shape[-2:]), self.frozen[0].on(seen.device).grid_of(*seen.shape[-2:]))
            tokens = resample(self.local_head(student.patches), *grids)
            loss_local = relation_loss(tokens, teacher.patches, config.temperature)
            losses["loss"] = loss_image + config.local_weight * loss_local
            losses["loss_local"] = loss_local.detach()
        with torch.no_grad():
            self._last_cls = student.cls.detach()
            own = process_index() * len(images) + torch.arange(len(images), device=images.device)
            losses["own_found"] = ((feature @ bank.T).argmax(dim=-1) == own).float().mean()
            losses["target_entropy"] = entropy_share(target, bank, config.temperature)
            return losses

    @torch.no_grad()
    def teach(self, images: Float[Tensor, "b c h w"]) -> Features:
        """The teacher's feature of the image, of length 1, and its patch tokens."""
        model, takes_cls = self.frozen[0].on(images.device), self.config.teacher_feature == "cls"
        [features] = model.forward_groups([images], cls_only=takes_cls and self.local_head is None)
        pooled = features.cls if takes_cls else features.patches.mean(dim=1)
        return Features(F.normalize(pooled.float(), dim=-1), features.patches)

    def _note(self, known: Float[Tensor, "n d"], progress: float) -> None:
        if progress != self._seen_at:
            self._seen_at, self._seen = progress, []
        self._seen.append(known)

    def after_step(self, progress: float, taken: Taken = None) -> None:
        moved = torch.cat([*self._seen, self.queue])[: len(self.queue)]
        self.queue.copy_(moved if taken is None else torch.where(taken, moved, self.queue))
        self._seen = []

    def diagnostics(self) -> dict[str, Tensor]:
        assert self._last_cls is not None, "nothing was seen"
        cls = gather_with_gradient(self._last_cls)  # the rank of a part of the rows is lower
        return {"feature_std": feature_std(cls), "rankme": rankme(cls)}

    def diagnose(self, values: Mapping[str, float], run: Mapping[str, Any] | None = None) -> str | None:
        if values["feature_std"] >= 0.05:
            return None
        return (
            f"All images get nearly the same features (spread {values['feature_std']:.3f} of 1). "
            "Try half the optim.base_lr; the teacher may not tell these images apart: score it with evaluate_knn.py."
        )


def _linear(width: int, wanted: int) -> nn.Linear:
    layer = nn.Linear(width, wanted)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def draw_share(progress: float) -> float:
    """The share of its own pixels that each image of a step keeps, uniform in [0, 1], drawn from `progress` alone."""
    words = np.frombuffer(np.float64(progress).tobytes(), dtype=np.uint32)
    return float(np.random.default_rng((*map(int, words), 6)).uniform())  # the last word: apart from other draws


def mix_neighbours(images: Float[Tensor, "b c h w"], share: float) -> Float[Tensor, "b c h w"]:
    """Each image times `share` plus its neighbour times the rest: the first with the second, the third with the fourth.

    Neighbours stay together wherever a batch is cut into even parts. The last of an odd number is left as it is.
    """
    even = len(images) // 2 * 2
    pairs = rearrange(images[:even], "(b two) c h w -> b two c h w", two=2)
    mixed = rearrange(share * pairs + (1 - share) * pairs.flip(1), "b two c h w -> (b two) c h w")
    return mixed if even == len(images) else torch.cat([mixed, images[even:]])


def resample(tokens: Float[Tensor, "b n d"], grid: tuple[int, int], wanted: tuple[int, int]) -> Float[Tensor, "b m d"]:
    """Tokens of a grid at the places of another one (bilinear)."""
    if grid == wanted:
        return tokens
    maps = rearrange(tokens, "b (h w) d -> b d h w", h=grid[0])
    return rearrange(F.interpolate(maps.float(), wanted, mode="bilinear"), "b d h w -> b (h w) d")


def without_common(
    bank: Float[Tensor, "k d"], features: Float[Tensor, "b d"]
) -> tuple[Float[Tensor, "k d"], Float[Tensor, "b d"]]:
    """Both without the mean of the bank, of length 1 again; rows of zeros, which hold no feature yet, stay zero."""
    known = bank.any(dim=-1, keepdim=True)
    mean = bank.sum(dim=0) / known.sum()
    return F.normalize((bank - mean) * known, dim=-1), F.normalize(features - mean, dim=-1)


def queue_loss(
    student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"], queue: Float[Tensor, "k d"], temperature: float
) -> Float[Tensor, ""]:
    """KL divergence of the student's similarities to the features of a queue from the teacher's, in fp32.

    Args:
        student, teacher: features of the same images, of length 1.
        queue: the teacher's features of these and other images, of length 1.

    Returns:
        The mean over images.
    """
    with torch.autocast(student.device.type, enabled=False):
        return divergence(*(features.float() @ queue.float().T / temperature for features in (student, teacher)))


def entropy_share(teacher: Float[Tensor, "b d"], queue: Float[Tensor, "k d"], temperature: float) -> Float[Tensor, ""]:
    """Mean entropy of the teacher's similarities over the largest possible: 1 where all images are alike to it."""
    with torch.autocast(teacher.device.type, enabled=False):
        probs = (teacher @ queue.T / temperature).softmax(dim=-1)
    return torch.special.entr(probs).sum(dim=-1).mean() / math.log(len(queue))


def relation_loss(
    student: Float[Tensor, "b n d"], teacher: Float[Tensor, "b n e"], temperature: float
) -> Float[Tensor, ""]:
    """KL divergence of the cosines of an image's patches with each other, the student's from the teacher's, in fp32.

    Returns:
        The mean over patches and images.
    """
    with torch.autocast(student.device.type, enabled=False):
        relations = []
        for tokens in (student, teacher):
            units = F.normalize(tokens.float(), dim=-1)
            relations.append(rearrange(units @ units.transpose(1, 2) / temperature, "b n m -> (b n) m"))
        return divergence(*relations)


def divergence(student: Float[Tensor, "n k"], teacher: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
    """KL(softmax(teacher) || softmax(student)), the mean over rows."""
    return F.kl_div(student.log_softmax(dim=-1), teacher.log_softmax(dim=-1), log_target=True, reduction="batchmean")
