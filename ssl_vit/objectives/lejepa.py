"""LeJEPA: Balestriero & LeCun, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics", 2025
(arXiv:2511.08544), and its successor VISReg (arXiv:2606.02572)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.core.distributed import gather_with_gradient, world_size
from ssl_vit.core.settings import check_ranges
from ssl_vit.data.augment.multicrop import MultiCropConfig
from ssl_vit.models.encoder import Encoder
from ssl_vit.objectives.anchor import AnchorConfig
from ssl_vit.objectives.collapse import LEAST_AT_ONCE, diagnose_views, feature_std, rankme
from ssl_vit.objectives.heads import BatchNorm
from ssl_vit.objectives.objective import Resolved, RunSize
from ssl_vit.objectives.recipes import resolve_blur
from ssl_vit.objectives.views import ViewsObjective, by_size

PUBLISHED_WEIGHTS = {"visreg": 0.6, "sigreg": 0.05}
"""Weights of the regularisers in VISReg's recipe for Imagenette and in LeJEPA's for ImageNet-1k."""


@dataclass(frozen=True)
class LeJEPAConfig(MultiCropConfig, AnchorConfig):
    """Settings of LeJEPA; the defaults are those of the papers at 224 pixels: two global crops and six local ones."""

    least_at_once: ClassVar[int] = LEAST_AT_ONCE
    global_crop_scale: tuple[float, float] = (0.3, 1.0)
    num_local_crops: int = 6
    local_crop_scale: tuple[float, float] = (0.05, 0.3)
    blur_prob: Literal["dino", "dinov2"] | tuple[float, float, float] = (0.5, 0.5, 0.5)
    solarize_prob: tuple[float, float, float] = (0.2, 0.2, 0.2)
    regulariser: Literal["visreg", "sigreg"] = "visreg"
    """What keeps the projections of a view spread like a standard normal distribution: their moments and sorted
    projections on directions (VISReg), or their characteristic function on directions (SIGReg, LeJEPA's own)."""
    weight: float | Literal["auto"] = "auto"
    """Weight of the regulariser, between 0 and 1; the agreement of views has the rest. The one number to tune."""
    num_directions: int = 1024
    """Random directions that a step looks along."""
    hidden_dim: int = 2048
    """Width of the projector's hidden layers."""
    projection_dim: int = 64
    """Width of a projection."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_anchor()
        counts = ("num_directions", "hidden_dim", "projection_dim")
        check_ranges(self, weight="(0, 1)", **dict.fromkeys(counts, "[1, inf)"))

    @property
    def resolved_weight(self) -> float:
        """`weight`, or the published one of the regulariser."""
        return PUBLISHED_WEIGHTS[self.regulariser] if self.weight == "auto" else self.weight

    def resolve(self, size: RunSize) -> dict[str, Resolved]:
        """Values of the `auto` settings, by name, each with its reason."""
        weight = Resolved(self.resolved_weight, f"the published one of {self.regulariser}")
        found = {"weight": weight, "blur_sigma": resolve_blur(size)}
        return {name: value for name, value in found.items() if getattr(self, name) == "auto"}

    def build(self, encoder: Encoder) -> "LeJEPA":
        """Build the objective on an encoder."""
        return LeJEPA(self, encoder)


class LeJEPA(ViewsObjective):
    """Views of an image agree on their projections, which as a whole are spread like a standard normal distribution.

    There is no teacher, prototype, temperature or stopped gradient. The loss has the form of the paper,

        (1 - weight) x agreement + weight x regulariser,

    where agreement is the mean squared distance of each view to the mean of the global views, and the regulariser is
    taken of each view by itself and averaged. The authors published two other forms: their minimal example compares
    with the mean of all views, and stable-pretraining has no factor (1 - weight) and takes one statistic over the
    samples of all views together, which is larger by about their number.

    The regulariser is a statistic over the images of a micro-batch in all processes: the number of processes does not
    change what is learned, accumulation does, and 64 images are needed. SIGReg grows with their number.

    The projector's batch norms, too, are over all of these images and all views. They keep no running averages, which
    nothing would read, so that a skipped step leaves nothing behind.
    """

    def __init__(self, config: LeJEPAConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.set_anchor(config)
        width = config.hidden_dim
        self.projector = nn.Sequential(
            nn.Linear(encoder.embed_dim, width, bias=False),
            BatchNorm(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            BatchNorm(width),
            nn.ReLU(),
            nn.Linear(width, config.projection_dim),
        )
        self._last: tuple[Tensor, Tensor] | None = None  # class tokens and projections of the first view

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        config, weight = self.config, self.config.resolved_weight
        num_global = batch["global_crops"].shape[1]
        cls = torch.cat([features.cls for features in self.encode(self.encoder, by_size(batch), cls_only=True)])
        if len(cls) < 2:
            raise ValueError("an image has 1 view, which agrees with itself: give two or more")
        projections = self.projector(cls).float()
        directions = draw_directions(config.projection_dim, config.num_directions, progress).to(cls.device)
        agreement = distance_to_globals(projections, num_global)
        spread = REGULARISERS[config.regulariser](projections, directions).mean()
        with torch.no_grad():
            self._last = cls[0].detach(), projections[0].detach()
            cosine = F.cosine_similarity(projections[:1], projections[1:], dim=-1).mean()
        parts = {
            "loss": (1 - weight) * agreement + weight * spread,
            "loss_agreement": agreement.detach(),
            "loss_regulariser": spread.detach(),
            "view_cosine": cosine,
        }
        return self.anchored(parts, batch)

    def diagnostics(self) -> dict[str, Tensor]:
        assert self._last is not None, "nothing was seen"
        cls, projections = map(gather_with_gradient, self._last)  # the rank of a part of the rows is lower
        return {
            "feature_std": feature_std(cls),
            "rankme": rankme(cls),
            "projection_rank": rankme(projections) / min(projections.shape),
        }

    def diagnose(self, values: Mapping[str, float], run: Mapping[str, Any] | None = None) -> str | None:
        return diagnose_views(values, run)


def draw_directions(dim: int, count: int, progress: float) -> Float[Tensor, "d k"]:
    """Normally distributed directions, drawn from `progress` alone: others at each step, the same in all processes."""
    words = np.frombuffer(np.float64(progress).tobytes(), dtype=np.uint32)
    # The last word keeps it apart from what else is drawn; torch's generator uses 32 bits of a seed only.
    seed = np.random.SeedSequence((*map(int, words), 5)).generate_state(1)[0]
    return torch.randn(dim, count, generator=torch.Generator().manual_seed(int(seed)))


def distance_to_globals(projections: Float[Tensor, "v b d"], num_global: int) -> Float[Tensor, ""]:
    """Mean squared distance of all views to the mean of the first `num_global` ones, of the same image."""
    center = projections[:num_global].mean(dim=0)
    return (projections - center).square().mean()


def sigreg(features: Float[Tensor, "v b d"], directions: Float[Tensor, "d k"]) -> Float[Tensor, " v"]:
    """Sketched isotropic Gaussian regularisation (LeJEPA, arXiv:2511.08544): how far each view is from N(0, 1).

    The statistic of Epps and Pulley: along a direction, the squared distance of the empirical characteristic function
    to that of N(0, 1), weighted by the latter, integrated over [0, 3] with 17 knots, doubled for [-3, 0], and
    multiplied by the number of images. Averages are over the images of all processes, gradients too. For normally
    distributed features it is near 1.05, whatever the number of images; for equal ones it is .402 times that number.

    Args:
        directions: of any length.

    Returns:
        The mean over directions, in fp32.
    """
    with torch.autocast(features.device.type, enabled=False):
        along = features.float() @ F.normalize(directions.float(), dim=0)
        knots = torch.linspace(0, 3, 17, device=along.device)
        normal = (-knots.square() / 2).exp()
        weights = torch.full_like(knots, 2 * 3 / 16)
        weights[0] = weights[-1] = 3 / 16
        angles = along[..., None] * knots
        # Every process has the same number of images.
        parts = torch.stack([angles.cos().mean(dim=1), angles.sin().mean(dim=1)])
        real, imaginary = gather_with_gradient(parts[None]).mean(dim=0)
        distance = (real - normal).square() + imaginary.square()
        return features.shape[1] * world_size() * (distance @ (weights * normal)).mean(dim=-1)


def visreg(features: Float[Tensor, "v b d"], directions: Float[Tensor, "d k"]) -> Float[Tensor, " v"]:
    """VISReg (arXiv:2606.02572): the distance of each view's mean, spread and shape from those of N(0, 1).

    The mean squared mean of the dimensions; the mean squared difference of their standard deviations to 1; and, of the
    features without both, the mean squared distance of their sorted projections on directions to the quantiles of
    N(0, 1). The deviations that the last one divides by have no gradient. All are over the images of all processes.

    Args:
        directions: of any length.

    Returns:
        The sum of the three, in fp32.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = gather_with_gradient(rearrange(features.float(), "v b d -> b v d"))
        num = len(rows)
        mean = rows.mean(dim=0)
        centered = rows - mean
        deviation = torch.linalg.vector_norm(centered, dim=0) / num**0.5 + 1e-6
        along = (centered / deviation.detach()) @ F.normalize(directions.float(), dim=0)
        ranks = torch.arange(1, num + 1, device=rows.device, dtype=torch.float32)
        quantiles = torch.special.ndtri(ranks / (num + 1))
        shape = (along.sort(dim=0).values - quantiles[:, None, None]).square().mean(dim=(0, 2))
        return mean.square().mean(dim=-1) + (deviation - 1).square().mean(dim=-1) + shape


REGULARISERS = {"visreg": visreg, "sigreg": sigreg}
