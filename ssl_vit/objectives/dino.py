"""DINO: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021 (arXiv:2104.14294)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ssl_vit.core.distributed import gather_with_gradient
from ssl_vit.core.schedules import cosine, warmup_linear
from ssl_vit.core.settings import check_ranges
from ssl_vit.data.augment.multicrop import MultiCropConfig
from ssl_vit.models.encoder import Encoder
from ssl_vit.objectives.anchor import AnchorConfig
from ssl_vit.objectives.centering import Centering, RunningMean, centered_probs
from ssl_vit.objectives.coding_rate import coding_rate, view_agreement
from ssl_vit.objectives.collapse import (
    LEAST_AT_ONCE,
    PrototypeUse,
    diagnose,
    diagnose_views,
    feature_std,
    rankme,
)
from ssl_vit.objectives.heads import DINOHead
from ssl_vit.objectives.objective import ParamGroup, Resolved, RunSize, Taken
from ssl_vit.objectives.prototype_loss import cross_entropy, dino_prototype_loss, num_terms
from ssl_vit.objectives.recipes import resolve_blur, resolve_distillation
from ssl_vit.objectives.teacher import Teacher
from ssl_vit.objectives.views import ViewsObjective, by_size

Auto = Literal["auto"]
OF_PROTOTYPES = ("num_prototypes", "teacher_temp", "teacher_temp_warmup", "centering", "freeze_last_layer")
"""Settings that may be `auto` and have no effect with another loss."""


@dataclass(frozen=True)
class DINOConfig(MultiCropConfig, AnchorConfig):
    """Settings of DINO; the defaults are the paper's for ViT-S/16 and 100 epochs of ImageNet-1k.

    Settings that may be `auto` follow from the number of images, the batch and the length of the run.
    """

    teacher_images: ClassVar[int] = 128_000  # averaged by the teacher: EMA .996 = 250 steps of 512 images
    coding_teacher_images: ClassVar[int] = 128_000  # the same of SimDINO
    cls_token_std: ClassVar[float | None] = 0.02  # initial class token; None = timm's 1e-6
    loss: Literal["prototypes", "coding_rate"] = "prototypes"
    """What compares student and teacher: their probabilities of prototypes (DINO), or the cosine of the head's
    bottlenecks with a coding rate against collapse (SimDINO), which has fewer settings."""
    coding_coeff: float = 1.0
    """Of coding_rate only: weight of the agreement of views; the coding rate has weight 1."""
    coding_eps: float = 0.05
    """Of coding_rate only: precision of the code. Lower it if the loss has spikes."""
    coding_features: Literal["average", "student"] = "average"
    """Of coding_rate only: what is kept spread, the student's global views or their average with the teacher's, which
    damps spikes of the loss."""
    num_prototypes: int | Auto = 65536
    """Of prototypes only: their number, the dimensions of the output (K), or auto."""
    hidden_dim: int = 2048
    """Width of the head's hidden layers."""
    bottleneck_dim: int = 256
    """Width of the head's last layer before the prototypes; of its output, with coding_rate."""
    head_batch_norm: bool | Auto = False
    """Batch norm in the head's hidden layers, over the crops of a micro-batch in all processes: narrow heads and small
    batches learn sooner. Accumulation then changes what is learned. Auto: with prototypes, where `hidden_dim` is below
    1,024."""
    norm_last_layer: bool = True
    """Of prototypes only: fix their norms at 1: more stable. The paper trains them for ViT-S only."""
    student_temp: float = 0.1
    """Of prototypes only: temperature of the student's softmax."""
    teacher_temp: float | Auto = 0.04
    """Of prototypes only: temperature of the teacher's softmax after its warm-up, or auto: lower is sharper, above .07
    is unstable."""
    warmup_teacher_temp: float = 0.04
    """Of prototypes only: temperature of the teacher's softmax at the start."""
    teacher_temp_warmup: float | Auto = 0.3
    """Of prototypes only: share of the run over which the teacher's temperature rises to `teacher_temp`, or auto."""
    centering: Centering | Auto = "center"
    """Of prototypes only: centring against collapse: a moving centre (DINO), Sinkhorn-Knopp (DINOv2), or none.
    Auto: Sinkhorn-Knopp in runs that see fewer than 384,000 images."""
    sinkhorn_iterations: int = 3
    """Of prototypes only: rounds of Sinkhorn-Knopp."""
    center_momentum: float = 0.9
    """Of prototypes only: momentum of the centre, the share that a step keeps."""
    ema_momentum: float | Auto = 0.996
    """Momentum of the teacher at the start: the share that a step keeps, or auto."""
    ema_momentum_end: float = 1.0
    """Momentum of the teacher at the end, reached along a cosine."""
    freeze_last_layer: float | Auto = 0.01
    """Of prototypes only: share of the run, from its start, in which they do not train, or auto: 1 of 100 epochs is
    .01."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_anchor()
        shares = ("center_momentum", "ema_momentum", "ema_momentum_end", "freeze_last_layer", "teacher_temp_warmup")
        counts = ("sinkhorn_iterations", "hidden_dim", "bottleneck_dim")
        positive = ("student_temp", "teacher_temp", "warmup_teacher_temp", "coding_coeff", "coding_eps")
        check_ranges(
            self,
            num_prototypes="[2, inf)",
            **dict.fromkeys(counts, "[1, inf)"),
            **dict.fromkeys(shares, "[0, 1]"),
            **dict.fromkeys(positive, "(0, inf)"),
        )

    def resolve(self, size: RunSize) -> dict[str, Resolved]:
        """Values of the `auto` settings that the loss has, by name, each with its reason."""
        found = resolve_distillation(
            size,
            warmup_teacher_temp=self.warmup_teacher_temp,
            teacher_temp=None if self.teacher_temp == "auto" else self.teacher_temp,
            teacher_images=self.teacher_images if self.has_prototypes else self.coding_teacher_images,
        )
        found["blur_sigma"] = resolve_blur(size)
        found["head_batch_norm"] = Resolved(
            self._has_narrow_head,
            "a narrow head learns little without it" if self._has_narrow_head else "as published",
        )
        return {name: found[name] for name in self._auto() if name in found}

    @property
    def has_prototypes(self) -> bool:
        """Whether the loss compares probabilities of prototypes; else their settings have no effect."""
        return self.loss == "prototypes"

    @property
    def least_at_once(self) -> int:
        """Images of a micro-batch of all processes that the loss, or batch norm in the head, needs."""
        has_norm = self._has_narrow_head if self.head_batch_norm == "auto" else self.head_batch_norm
        return LEAST_AT_ONCE if has_norm or not self.has_prototypes else 0

    @property
    def _has_narrow_head(self) -> bool:
        return self.has_prototypes and self.hidden_dim < 1024

    def check_resolved(self) -> None:
        """Refuse a setting that is still `auto`."""
        for name in self._auto():
            raise ValueError(
                f"{name}='auto': follows from the data and the length of a run; use resolve() or give a number"
            )

    def _auto(self) -> list[str]:
        """Names of the settings that are `auto` and have an effect."""
        unused = () if self.has_prototypes else OF_PROTOTYPES
        return [item.name for item in fields(self) if getattr(self, item.name) == "auto" and item.name not in unused]

    def build(self, encoder: Encoder) -> "DINO":
        """Build the objective on an encoder; the teacher starts as its copy.

        Raises:
            ValueError: a setting is still `auto`.
        """
        self.check_resolved()
        return DINO(self, encoder)


class DINO(ViewsObjective):
    """A student that predicts, from all crops, the output of its slower copy on the global crops.

    With `loss: coding_rate` (SimDINO) it is - coding_coeff x `view_agreement` - `coding_rate`, the latter averaged over
    the two global views. Under accumulation the agreement is exactly that of the whole batch; the coding rate is
    that of a micro-batch of all processes, whose mean over micro-batches is not that of the whole batch.
    """

    teacher: Teacher
    teacher_encoder: Encoder
    teacher_head: DINOHead
    center: Tensor  # of prototypes only

    def __init__(self, config: DINOConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.head = self._build_head(encoder.embed_dim)
        if config.cls_token_std is not None and not encoder.is_pretrained:
            for name, parameter in encoder.named_parameters():
                if name.endswith("cls_token"):
                    nn.init.trunc_normal_(parameter, std=config.cls_token_std)
        self.set_anchor(config)
        self.teacher = Teacher(self, "teacher_", "encoder", "head")
        if config.has_prototypes:
            self.register_buffer("center", torch.zeros(1, self.num_prototypes))
            self._teacher_sums = RunningMean()
            self._prototype_use = PrototypeUse()
        self._projections: Tensor | None = None  # of the student's first view, where there are no prototypes
        self._teacher_cls: list[Tensor] = []  # one per micro-batch of the step at `_seen_at`
        self._seen_at: float | None = None

    @property
    def num_prototypes(self) -> int:
        return int(self.config.num_prototypes)

    def _build_head(self, embed_dim: int) -> DINOHead:
        config = self.config
        return DINOHead(
            embed_dim,
            num_prototypes=self.num_prototypes if config.has_prototypes else None,
            hidden_dim=config.hidden_dim,
            bottleneck_dim=config.bottleneck_dim,
            norm_last_layer=config.norm_last_layer,
            batch_norm=bool(config.head_batch_norm),
        )

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        with torch.no_grad():
            [teacher] = self.encode(self.teacher_encoder, [batch["global_crops"]], cls_only=True)
        student_cls = torch.cat([features.cls for features in self.encode(self.encoder, by_size(batch), cls_only=True)])
        parts = self.compare(student_cls, teacher.cls, progress)
        return self.anchored({**parts, **self._schedules(progress, student_cls.device)}, batch)

    def compare(
        self, student_cls: Float[Tensor, "s b d"], teacher_cls: Float[Tensor, "t b d"], progress: float
    ) -> dict[str, Tensor]:
        """The loss of the student's views and the teacher's, global ones first, with cheap signs of collapse."""
        if progress != self._seen_at:
            self._seen_at, self._teacher_cls = progress, []
        self._teacher_cls.append(teacher_cls)
        by_loss = self._compare_probs if self.config.has_prototypes else self._compare_codes
        return by_loss(student_cls, teacher_cls, progress)

    def _compare_probs(
        self, student_cls: Float[Tensor, "s b d"], teacher_cls: Float[Tensor, "t b d"], progress: float
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher_logits = self.teacher_head(teacher_cls)
            teacher_probs = self.center_probs(teacher_logits, self.center, self.teacher_temp(progress))
            self._teacher_sums.add(rearrange(teacher_logits, "v b k -> (v b) k"), progress)
        bottleneck, prototypes = self.head(student_cls, as_factors=True)
        loss = dino_prototype_loss(bottleneck, prototypes, teacher_probs, self.config.student_temp)
        with torch.no_grad():
            entropy = torch.special.entr(teacher_probs).sum(dim=-1).mean()
            self._prototype_use.note(rearrange(teacher_probs, "v b k -> (v b) k"))
        return {
            "loss": loss,
            "teacher_entropy": entropy,
            "kl": loss.detach() - entropy,
            "below_ln_k": float(np.log(self.num_prototypes)) - loss.detach(),
        }

    def _compare_codes(
        self, student_cls: Float[Tensor, "s b d"], teacher_cls: Float[Tensor, "t b d"], progress: float
    ) -> dict[str, Tensor]:
        config = self.config
        with torch.no_grad():
            targets = self.teacher_head(teacher_cls)
        projections = self.head(student_cls)
        agreement, spread = view_agreement(projections, targets), projections[: len(targets)]
        if config.coding_features == "average":
            spread = (spread + targets) / 2
        rate = coding_rate(spread, config.coding_eps).mean()
        self._projections = projections[0].detach()
        return {
            "loss": -config.coding_coeff * agreement - rate,
            "view_cosine": agreement.detach(),
            "coding_rate": rate.detach(),
        }

    def center_probs(
        self, logits: Float[Tensor, "v b k"], center: Float[Tensor, "1 k"], temp: float
    ) -> Float[Tensor, "v b k"]:
        """The teacher's probabilities, centred by `centering`; Sinkhorn-Knopp runs over all views together."""
        config, rows = self.config, rearrange(logits, "v b k -> (v b) k")
        assert config.centering != "auto", "resolved before the objective is built"
        probs = centered_probs(rows, center, temp, config.centering, config.sinkhorn_iterations)
        return probs.reshape(logits.shape)

    def teacher_temp(self, progress: float) -> float:
        """Temperature of the teacher at `progress`."""
        config = self.config
        start, end = config.warmup_teacher_temp, float(config.teacher_temp)
        return warmup_linear(progress, float(config.teacher_temp_warmup), start, end)

    def ema_momentum(self, progress: float) -> float:
        """Momentum of the teacher at `progress`."""
        return cosine(progress, float(self.config.ema_momentum), self.config.ema_momentum_end)

    def after_step(self, progress: float, taken: Taken = None) -> None:
        self.teacher.update(self.ema_momentum(progress), taken)
        if self.config.has_prototypes and self.config.centering == "center":
            self._teacher_sums.move(self.center, self.config.center_momentum, taken)

    def diagnostics(self) -> dict[str, Tensor]:
        # Of the rows of all processes together: the rank of a part of them is lower.
        views = [gather_with_gradient(view) for view in torch.cat(self._teacher_cls, dim=1)]
        # One view only: a second view of the same images adds nothing.
        found = {
            "feature_std": torch.stack([feature_std(view) for view in views]).mean(),
            "rankme": rankme(views[0]),
        }
        if self._projections is None:
            return {**found, "prototypes_used": self._prototype_use.read()}
        projections = gather_with_gradient(self._projections)
        return {**found, "projection_rank": rankme(projections) / min(projections.shape)}

    def diagnose(self, values: Mapping[str, float], run: Mapping[str, Any] | None = None) -> str | None:
        if self.config.has_prototypes:
            return diagnose(values, vars(self.config), run)
        return diagnose_views(values, {**(run or {}), "objective": vars(self.config)})

    def backbone(self) -> Encoder:
        return self.teacher_encoder

    def param_groups(self) -> list[ParamGroup]:
        """The usual groups, with the last layers in groups of their own that are frozen until `freeze_last_layer`."""
        if not self.config.has_prototypes:
            return super().param_groups()
        groups: list[ParamGroup] = []
        for group in super().param_groups():
            for is_last, until in ((False, 0.0), (True, float(self.config.freeze_last_layer))):
                params = [item for item in group.params if ("last_layer." in item[0]) == is_last]
                if params:
                    groups.append(dataclasses.replace(group, params=params, freeze_until=until))
        return groups

    def _schedules(self, progress: float, device: torch.device) -> dict[str, Tensor]:
        values = {"teacher_temp": self.teacher_temp(progress)} if self.config.has_prototypes else {}
        values |= {"ema_momentum": self.ema_momentum(progress)}
        return {name: torch.full((), value, device=device) for name, value in values.items()}


def dino_loss(
    student_logits: Float[Tensor, "s b k"], teacher_probs: Float[Tensor, "t b k"], student_temp: float = 0.1
) -> Float[Tensor, ""]:
    """Cross-entropy between teacher and student, averaged over images and pairs of views (equation 2 of the paper).

    Views are stacked first, global ones before local ones; a teacher's view is not compared with the student's view of
    the same index. Sums are taken in fp32.

    Training computes the same loss from the head's last layer; see `ssl_vit.objectives.prototype_loss`.

    Args:
        student_logits: before the temperature.
        teacher_probs: after centring and softmax; they receive no gradient.

    Raises:
        ValueError: there is no pair of different views.
    """
    views, teachers = len(student_logits), len(teacher_probs)
    pairs = num_terms(views, teachers)
    total = teacher_probs.sum(dim=0, dtype=torch.float32)
    loss = torch.zeros((), device=student_logits.device)
    for view, logits in enumerate(student_logits):
        target = total - teacher_probs[view] if view < teachers else total
        loss = loss + cross_entropy(logits.float() / student_temp, target).sum()
    return loss / (pairs * student_logits.shape[1])
