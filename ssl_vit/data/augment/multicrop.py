"""Multi-crop augmentation (SwAV, DINO): crops in uint8 in the workers, everything else on the device."""

import math
import operator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from ssl_vit.core.settings import check_interval, check_ranges
from ssl_vit.data.augment.crops import OrientationConfig, random_view
from ssl_vit.data.augment.device import (
    JITTER_ORDERS,
    color_jitter,
    flip_horizontally,
    gaussian_blur,
    normalize,
    solarize,
    to_grey,
    to_unit,
)
from ssl_vit.data.transform import InputSpec, check_divisible, pair

# Probability of blur for the first global crop, the second, and local crops. DINOv2's released code hands on 1 - p
# where p is meant (dinov2 pull request 342), and its released models were trained so.
BLUR_PRESETS = {"dino": (1.0, 0.1, 0.5), "dinov2": (0.0, 0.9, 0.5)}
_DINOV2_RADIUS = 4  # its kernel has 9 pixels, whatever the deviation
_CACHED_PIXELS = 600_000  # values of a part of a batch on a CPU: four views of 224 pixels
# Columns of a view's appearance, a row of floats that travels with the batch.
_FLIP, _BRIGHTNESS, _HUE, _ORDER, _GREY, _SIGMA, _SOLARIZE = 0, 1, 4, 5, 6, 7, 8


@dataclass(frozen=True)
class MultiCropConfig(OrientationConfig):
    """Views of an image: two global crops and any number of local ones; the defaults are DINO's."""

    global_crop_scale: tuple[float, float] = (0.4, 1.0)
    """Smallest and largest share of the picture's area that a global crop covers."""
    num_local_crops: int = 8
    """Local crops of an image; 0 for none."""
    local_crop_size: int | tuple[int, int] = 96
    """Size of a local crop in pixels: one number, or [height, width]. The patch size must divide it."""
    local_crop_scale: tuple[float, float] = (0.05, 0.4)
    """Smallest and largest share of the picture's area that a local crop covers."""
    color_jitter_prob: float = 0.8
    """Probability of colour jitter."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strength of brightness, contrast, saturation and hue; the last two need 3 channels and are skipped for others."""
    grey_prob: float = 0.2
    """Probability of losing all colour; images of other than 3 channels keep theirs."""
    blur_prob: Literal["dino", "dinov2"] | tuple[float, float, float] = "dino"
    """Probability of blur for the first global crop, the second, and local crops, or a preset: dino = [1, .1, .5];
    dinov2 = [0, .9, .5], which is what its released models were trained with by an oversight, with its kernel of 9
    pixels, which cuts the widest blurs off."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest deviation of the blur in pixels."""
    solarize_prob: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """Probability of solarisation for the first global crop, the second, and local crops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval(self, "global_crop_scale", "local_crop_scale")
        probs = ("color_jitter_prob", "grey_prob", "blur_prob", "solarize_prob")
        check_ranges(self, num_local_crops="[0, inf)", **dict.fromkeys(probs, "[0, 1]"))
        if min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5:
            raise ValueError(f"color_jitter={self.color_jitter!r}: must be at least 0, and hue at most 0.5")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma={self.blur_sigma!r}: needs 0 < smallest <= largest")

    @property
    def blur_probs(self) -> tuple[float, float, float]:
        """Probability of blur for the first global crop, the second, and local crops."""
        return BLUR_PRESETS[self.blur_prob] if isinstance(self.blur_prob, str) else self.blur_prob

    @property
    def local_size(self) -> tuple[int, int]:
        """Height and width of a local crop in pixels."""
        return pair(self.local_crop_size)

    def build_transform(self, spec: InputSpec) -> "MultiCropTransform":
        """Global crops as `spec` says, and local crops of `local_crop_size` pixels.

        Raises:
            ValueError: the stride does not divide the local crops, or these are larger than the global ones.
        """
        if self.num_local_crops:
            check_divisible(f"local_crop_size={self.local_crop_size!r}", self.local_size, spec.stride)
        if self.num_local_crops and any(map(operator.gt, self.local_size, spec.image_size)):
            sizes = [
                max(1, round(size * 96 / 224 / patch)) * patch
                for size, patch in zip(spec.image_size, spec.stride, strict=True)
            ]
            raise ValueError(
                f"local_crop_size={self.local_crop_size!r}: larger than the global crops, {spec.image_size}; "
                f"{sizes} would be in the papers' proportion"
            )
        return MultiCropTransform(self, spec)


class MultiCropTransform:
    """One decoded image to `global_crops [v c h w]` and `local_crops [w c h w]`, and a row of floats for each view.

    On the device the views are flipped, jittered, made grey, blurred, solarised and normalised, in this order.
    """

    def __init__(self, config: MultiCropConfig, spec: InputSpec) -> None:
        self.config, self.spec = config, spec

    def __call__(self, image: UInt8[Tensor, "c h w"], rng: np.random.Generator) -> dict[str, Tensor]:
        config = self.config
        crops = [random_view(image, self.spec.image_size, rng, config.global_crop_scale, config) for _ in range(2)]
        sample = {"global_crops": torch.stack(crops), "global_looks": self._draw_looks((0, 1), rng)}
        if config.num_local_crops:
            crops = [
                random_view(image, config.local_size, rng, config.local_crop_scale, config)
                for _ in range(config.num_local_crops)
            ]
            sample["local_crops"] = torch.stack(crops)
            sample["local_looks"] = self._draw_looks((2,) * config.num_local_crops, rng)
        return sample

    def on_device(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        done = {"global_crops": self._dress(batch["global_crops"], batch["global_looks"], device)}
        if "local_crops" in batch:
            done["local_crops"] = self._dress(batch["local_crops"], batch["local_looks"], device)
        return done

    def _draw_looks(self, kinds: tuple[int, ...], rng: np.random.Generator) -> Float[Tensor, "v 9"]:
        """What happens to each view; kind 0 is the first global crop, 1 the second, 2 a local one."""
        config = self.config
        looks = np.zeros((len(kinds), 9), dtype=np.float32)
        looks[:, _BRIGHTNESS : _HUE + 1] = 1, 1, 1, 0
        for look, kind in zip(looks, kinds, strict=True):
            look[_FLIP] = rng.random() < config.flip_prob
            if rng.random() < config.color_jitter_prob:
                *strengths, hue = config.color_jitter
                for column, strength in enumerate(strengths, start=_BRIGHTNESS):
                    look[column] = rng.uniform(max(0.0, 1 - strength), 1 + strength)
                look[_HUE] = rng.uniform(-hue, hue)
                look[_ORDER] = rng.integers(len(JITTER_ORDERS))
            look[_GREY] = rng.random() < config.grey_prob
            if rng.random() < config.blur_probs[kind]:
                look[_SIGMA] = rng.uniform(*config.blur_sigma)
            look[_SOLARIZE] = rng.random() < config.solarize_prob[kind]
        return torch.from_numpy(looks)

    def _dress(
        self, crops: UInt8[Tensor, "b v c h w"], looks: Float[Tensor, "b v 9"], device: torch.device
    ) -> Float[Tensor, "b v c h w"]:
        num_views = crops.shape[1]
        images = rearrange(crops.to(device, non_blocking=True), "b v c h w -> (b v) c h w")
        look = rearrange(looks, "b v p -> (b v) p")
        if device.type == "cpu":
            # A few images at a time stay in the cache through all operations.
            size = max(1, _CACHED_PIXELS // images[0].numel())
            parts = zip(images.split(size), look.split(size), strict=True)
            images = torch.cat([self._dress_views(*part) for part in parts])
        else:
            images = self._dress_views(images, look)
        return rearrange(images, "(b v) c h w -> b v c h w", v=num_views)

    def _dress_views(self, images: UInt8[Tensor, "b c h w"], look: Float[Tensor, "b 9"]) -> Float[Tensor, "b c h w"]:
        images = to_unit(flip_horizontally(images, look[:, _FLIP].bool()))
        images = color_jitter(images, look[:, _BRIGHTNESS : _HUE + 1], look[:, _ORDER].long())
        images = to_grey(images, look[:, _GREY].bool())
        if self.config.blur_prob == "dinov2":
            images = gaussian_blur(images, look[:, _SIGMA], _DINOV2_RADIUS, "reflect")
        else:
            images = gaussian_blur(images, look[:, _SIGMA], radius=math.ceil(3 * self.config.blur_sigma[1]))
        images = solarize(images, look[:, _SOLARIZE].bool())
        return normalize(images, self.spec.normalization)
