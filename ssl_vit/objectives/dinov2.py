"""DINOv2: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023 (arXiv:2304.07193)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.core.distributed import (
    gather_with_gradient,
    process_index,
)
from ssl_vit.core.settings import check_interval, check_ranges
from ssl_vit.data.augment.masking import draw_block_mask
from ssl_vit.data.augment.multicrop import MultiCropTransform
from ssl_vit.data.transform import InputSpec
from ssl_vit.models.encoder import Encoder
from ssl_vit.objectives.centering import Centering, RunningMean, centered_probs
from ssl_vit.objectives.centering import sinkhorn_knopp as sinkhorn_knopp
from ssl_vit.objectives.coding_rate import patch_agreement
from ssl_vit.objectives.dino import DINO, DINOConfig
from ssl_vit.objectives.heads import DINOHead
from ssl_vit.objectives.objective import ParamGroup, Resolved, RunSize, Taken
from ssl_vit.objectives.prototype_loss import (
    cross_entropy,
    ibot_prototype_loss,
    masked_patch_weights,
)


@dataclass(frozen=True)
class DINOv2Config(DINOConfig):
    """Settings of DINOv2, which extend DINO's. The defaults are those of the paper's code for ViT-L/16 on ImageNet-1k
    (its short recipe), with two exceptions: centring is Sinkhorn-Knopp, as in its large runs, and the blur is the
    intended one.
    """

    teacher_images: ClassVar[int] = 256_000  # EMA .992 = 125 steps of 2048 images
    coding_teacher_images: ClassVar[int] = 10_240  # SimDINOv2's EMA .9 = 10 steps of 1024 images
    cls_token_std: ClassVar[float | None] = None  # 1e-6 in the paper's code, also for registers

    global_crop_scale: tuple[float, float] = (0.32, 1.0)
    local_crop_scale: tuple[float, float] = (0.05, 0.32)
    norm_last_layer: bool = False
    teacher_temp: float | Literal["auto"] = 0.07
    centering: Centering = "sinkhorn"
    ema_momentum: float | Literal["auto"] = 0.992
    ibot_weight: float = 1.0
    """Weight of the loss on masked patches (iBOT; with coding_rate, minus their cosine); 0 masks nothing."""
    ibot_separate_head: bool = False
    """Separate head for patches, as in the paper's large runs; else patches and class token share one."""
    mask_prob: float = 0.5
    """Share of the global crops that have masked patches."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of masked patches in such a crop, drawn uniformly."""
    koleo_weight: float | Literal["auto"] = 0.1
    """Weight of KoLeo, which spreads the class tokens of each global view, or auto; 0 = off, as in SimDINOv2."""
    layer_decay: float = 0.9
    """Factor on the learning rate from each block to the block before it."""
    patch_embed_lr: float = 0.2
    """Factor on the learning rate of the patch embedding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = dict.fromkeys(("ibot_weight", "koleo_weight"), "[0, inf)")
        rates = dict.fromkeys(("layer_decay", "patch_embed_lr"), "(0, 1]")
        check_ranges(self, mask_prob="[0, 1]", mask_ratio="(0, 1)", **weights, **rates)
        check_interval(self, "mask_ratio")

    def resolve(self, size: RunSize) -> dict[str, Resolved]:
        """DINO's, and the weight of KoLeo."""
        found = super().resolve(size)
        if self.koleo_weight == "auto":
            weight = Resolved(0.1, "the paper's") if self.has_prototypes else Resolved(0, "the coding rate spreads")
            found |= {"koleo_weight": weight}
        return found

    def build(self, encoder: Encoder) -> "DINOv2":
        """Build the objective on an encoder; the teacher starts as its copy.

        Raises:
            ValueError: a setting is still `auto`, or the encoder cannot mask patches.
        """
        self.check_resolved()
        return DINOv2(self, encoder)

    def build_transform(self, spec: InputSpec) -> "MaskedMultiCropTransform":
        """DINO's transform, with a mask for each global crop."""
        return MaskedMultiCropTransform(self, super().build_transform(spec), spec.grid_size)


class MaskedMultiCropTransform:
    """Multi-crop with `masks [b v n]`: True for patches of a global crop that the student does not see."""

    def __init__(self, config: DINOv2Config, crops: MultiCropTransform, grid_size: tuple[int, int]) -> None:
        self.config, self.crops, self.grid_size = config, crops, grid_size

    def __call__(self, image: UInt8[Tensor, "c h w"], rng: np.random.Generator) -> dict[str, Tensor]:
        return {**self.crops(image, rng), "masks": torch.stack([self._draw_mask(rng) for _ in range(2)])}

    def on_device(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        # The masked indices are computed on the host, where masks are known, to avoid waiting for the device.
        extra = {"masks": batch["masks"], "masked": masked_indices(batch["masks"])}
        moved = {name: values.to(device, non_blocking=True) for name, values in extra.items()}
        return {**self.crops.on_device(batch, device), **moved}

    def _draw_mask(self, rng: np.random.Generator) -> Bool[Tensor, " n"]:
        masked = self.config.ibot_weight > 0 and rng.random() < self.config.mask_prob
        ratio = rng.uniform(*self.config.mask_ratio) if masked else 0.0
        return draw_block_mask(self.grid_size, ratio, rng)


class DINOv2(DINO):
    """DINO on class tokens, iBOT on masked patches, KoLeo against crowding; with `loss: coding_rate`, SimDINOv2."""

    config: DINOv2Config
    patch_center: Tensor

    def __init__(self, config: DINOv2Config, encoder: Encoder) -> None:
        if config.ibot_weight and not encoder.supports_mask:
            raise ValueError(
                f"ibot_weight={config.ibot_weight!r}: iBOT masks tokens, which {encoder.config.arch} cannot, since its "
                "stem mixes pixels of neighbours; use ibot_weight 0, DINO, or vit_*, swin_*, convnext_*"
            )
        super().__init__(config, encoder)
        self.patch_head: DINOHead | None = None
        self.teacher_patch_head: DINOHead | None = None
        if config.ibot_weight:
            self.mask_token = nn.Parameter(
                torch.zeros(1, encoder.mask_dim)
            )  # 2-D, so it has weight decay, as in the paper
            if config.has_prototypes:
                self.register_buffer("patch_center", torch.zeros(1, self.num_prototypes))
                self._patch_sums = RunningMean()
            if config.ibot_separate_head:
                self.patch_head = self._build_head(encoder.embed_dim)
                self.teacher.add("patch_head")

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        config = self.config
        masks = rearrange(batch["masks"], "b v n -> v b n") if config.ibot_weight > 0 else None
        with torch.no_grad():
            [teacher] = self.encode(self.teacher_encoder, [batch["global_crops"]])
        masking = {}
        if masks is not None:
            masking = {"mask": rearrange(masks, "v b n -> (v b) n"), "mask_token": self.mask_token[0]}
        crops = [batch[name] for name in ("global_crops", "local_crops") if name in batch]
        student, *local = self.encode(self.encoder, crops, **masking)
        student_cls = torch.cat([student.cls, *(features.cls for features in local)])
        parts = self.compare(student_cls, teacher.cls, progress)
        parts["loss_dino"] = parts["loss"].detach()
        if masks is not None:
            masked = batch["masked"] if "masked" in batch else masked_indices(batch["masks"])
            ibot = self._compare_patches(student.patches, teacher.patches, masks, masked, progress)
            parts["loss"] = parts["loss"] + config.ibot_weight * ibot
            parts["loss_ibot"] = ibot.detach()
        if koleo_weight := float(config.koleo_weight):
            koleo = torch.stack([koleo_loss(view) for view in student.cls]).sum()
            parts["loss"] = parts["loss"] + koleo_weight * koleo
            parts["loss_koleo"] = koleo.detach()
        return self.anchored({**parts, **self._schedules(progress, student_cls.device)}, batch)

    def _compare_patches(
        self,
        student: Float[Tensor, "v b n d"],
        teacher: Float[Tensor, "v b n d"],
        masks: Bool[Tensor, "v b n"],
        masked: Int[Tensor, " m"],
        progress: float,
    ) -> Float[Tensor, ""]:
        """The loss of masked patches, each crop's with the same weight."""
        config, weights = self.config, masked_patch_weights(masks, masked)
        head, patches = self.patch_head or self.head, take_patches(student, masked)
        with torch.no_grad():
            targets = (self.teacher_patch_head or self.teacher_head)(take_patches(teacher, masked))
        if not config.has_prototypes:
            return -patch_agreement(head(patches), targets, weights)
        temp, iterations = self.teacher_temp(progress), config.sinkhorn_iterations
        probs = centered_probs(targets, self.patch_center, temp, config.centering, iterations)
        self._patch_sums.add(targets, progress)
        bottleneck, prototypes = head(patches, as_factors=True)
        return ibot_prototype_loss(bottleneck, prototypes, probs, weights, config.student_temp)

    def after_step(self, progress: float, taken: Taken = None) -> None:
        super().after_step(progress, taken)
        if self.config.has_prototypes and self.config.ibot_weight and self.config.centering == "center":
            self._patch_sums.move(self.patch_center, self.config.center_momentum, taken)

    def param_groups(self) -> list[ParamGroup]:
        """DINO's groups, split by learning rate: layer_decay to the power of the number of later blocks."""
        return self.split_by_lr(super().param_groups(), self._lr_scale)

    def _lr_scale(self, name: str) -> float:
        config, encoder = self.config, self.encoder
        if name == "mask_token":
            return config.layer_decay ** (encoder.num_layers + 1)
        if not name.startswith("encoder."):
            return 1.0
        inner = name.removeprefix("encoder.")
        scale = config.layer_decay ** (encoder.num_layers + 1 - encoder.layer_of(inner))
        return scale * config.patch_embed_lr if encoder.is_patch_embedding(inner) else scale


def masked_indices(masks: Bool[Tensor, "b v n"]) -> Int[Tensor, " m"]:
    """Indices of the masked patches among the patches of all crops, views first."""
    return rearrange(masks, "b v n -> (v b n)").nonzero().flatten()


def take_patches(patches: Float[Tensor, "v b n d"], indices: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
    """The patches of all crops at `indices`."""
    return rearrange(patches, "v b n d -> (v b n) d").index_select(0, indices)


def ibot_loss(
    student_logits: Float[Tensor, "m k"],
    teacher_probs: Float[Tensor, "m k"],
    masks: Bool[Tensor, "*v n"],
    student_temp: float = 0.1,
) -> Float[Tensor, ""]:
    """Cross-entropy between teacher and student on masked patches (iBOT, arXiv:2111.07832, equation 3).

    Each patch has weight 1 / (masked patches of its crop); the sum is divided by the number of all global crops, masked
    or not.

    Args:
        student_logits, teacher_probs: of the masked patches only, in the order of `masks`.
        masks: True where a patch of a crop is masked.
    """
    weights = masked_patch_weights(masks, masks.flatten().nonzero().flatten())
    return (cross_entropy(student_logits.float() / student_temp, teacher_probs) * weights).sum()


def koleo_loss(features: Float[Tensor, "b d"], eps: float = 1e-8) -> Float[Tensor, ""]:
    """Kozachenko-Leonenko regulariser (arXiv:1806.03198): minus the mean logarithm of the distance of each
    L2-normalised feature to its nearest neighbour.

    Neighbours come from the features of all processes, so that the number of processes does not change what is
    learned; the paper's code searches within each GPU. A single feature has no neighbour, and its loss is 0.
    """
    with torch.autocast(features.device.type, enabled=False):
        normalized = F.normalize(features.float(), eps=eps, dim=-1)
        everyone = gather_with_gradient(normalized)
        if len(everyone) < 2:
            return normalized.sum() * 0
        first = process_index() * len(normalized)
        with torch.no_grad():
            similarity = normalized @ everyone.T
            similarity.diagonal(first).fill_(-1)  # a feature is not its own neighbour
            nearest = similarity.argmax(dim=-1)
        distance = F.pairwise_distance(normalized, everyone[nearest], eps=eps)
        return -(distance + eps).log().mean()
