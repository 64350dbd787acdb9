"""Multi-crop augmentation (SwAV, DINO): crops in uint8 in the workers, everything else on the device."""

import math
import operator
from dataclasses import dataclass
from typing import ClassVar, Literal

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

# Probability of blur for the first global crop, the second, and local crops. DINOv2's released code passes 1 - p where
# p is meant (dinov2 pull request 342), and its released models were trained that way.
BLUR_PRESETS = {"dino": (1.0, 0.1, 0.5), "dinov2": (0.0, 0.9, 0.5)}
_DINOV2_RADIUS = 4  # DINOv2's kernel has 9 pixels, whatever the deviation
_CACHED_VALUES = 600_000  # numbers augmented at once on a CPU, which stay in its cache: four views of 224 pixels
# Columns of a view's parameters, a row of floats that travels with the batch.
_FLIP, _BRIGHTNESS, _HUE, _ORDER, _GREY, _SIGMA, _SOLARIZE = 0, 1, 4, 5, 6, 7, 8


@dataclass(frozen=True)
class MultiCropConfig(OrientationConfig):
    """Views of an image: two global crops and any number of local ones; the defaults are DINO's."""

    num_global_crops: ClassVar[int] = 2
    global_crop_scale: tuple[float, float] = (0.4, 1.0)
    """Smallest and largest share of the image's area that a global crop covers."""
    num_local_crops: int = 8
    """Local crops of an image; 0 for none."""
    local_crop_size: int | tuple[int, int] = 96
    """Size of a local crop in pixels: one number, or [height, width]; a multiple of the patch size."""
    local_crop_scale: tuple[float, float] = (0.05, 0.4)
    """Smallest and largest share of the image's area that a local crop covers."""
    color_jitter_prob: float = 0.8
    """Probability of colour jitter."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strength of brightness, contrast, saturation and hue; the last two are for images of 3 channels only."""
    grey_prob: float = 0.2
    """Probability of becoming grey; images of other than 3 channels never do."""
    blur_prob: Literal["dino", "dinov2"] | tuple[float, float, float] = "dino"
    """Probability of blur for the first global crop, the second, and local crops, or a preset: dino = [1, .1, .5];
    dinov2 = [0, .9, .5], with which its released models were trained by an oversight, and its kernel of 9 pixels, which
    truncates the widest blurs."""
    blur_sigma: tuple[float, float] | Literal["auto"] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur in pixels. auto: the papers', .1 and 2, for images of 224
    pixels and larger, and in proportion for smaller ones."""
    solarize_prob: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """Probability of solarisation for the first global crop, the second, and local crops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval(self, "global_crop_scale", "local_crop_scale")
        probs = ("color_jitter_prob", "grey_prob", "blur_prob", "solarize_prob")
        check_ranges(self, num_local_crops="[0, inf)", **dict.fromkeys(probs, "[0, 1]"))
        if min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5:
            raise ValueError(f"color_jitter={self.color_jitter!r}: must be at least 0, and hue at most 0.5")
        if self.blur_sigma != "auto" and not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
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
            ValueError: `blur_sigma` is still `auto`; the stride does not divide the local crops, or they are larger
                than the global ones.
        """
        if self.blur_sigma == "auto":
            raise ValueError(
                "blur_sigma='auto': follows from the image size; use RunConfig.resolve or give two numbers"
            )
        if self.num_local_crops:
            check_divisible(f"local_crop_size={self.local_crop_size!r}", self.local_size, spec.stride)
        if self.num_local_crops and any(map(operator.gt, self.local_size, spec.image_size)):
            sides = zip(spec.image_size, spec.stride, strict=True)
            sizes = [max(1, round(size * 96 / 224 / stride)) * stride for size, stride in sides]
            raise ValueError(
                f"local_crop_size={self.local_crop_size!r}: larger than the global crops, {spec.image_size}; "
                f"{sizes} would be in the papers' proportion"
            )
        return MultiCropTransform(self, spec)


class MultiCropTransform:
    """Turns an image into `global_crops [v c h w]` and `local_crops [w c h w]`, with a row of parameters for each view.

    On the device the views are flipped, jittered, made grey, blurred, solarised and normalised, in this order.
    """

    def __init__(self, config: MultiCropConfig, spec: InputSpec) -> None:
        assert config.blur_sigma != "auto"
        self.config, self.spec, self.blur_sigma = config, spec, config.blur_sigma

    def __call__(self, image: UInt8[Tensor, "c h w"], rng: np.random.Generator) -> dict[str, Tensor]:
        config = self.config
        size, kinds = self.spec.image_size, tuple(range(config.num_global_crops))
        crops = [random_view(image, size, rng, config.global_crop_scale, config) for _ in kinds]
        sample = {"global_crops": torch.stack(crops), "global_params": self._draw_params(kinds, rng)}
        if num := config.num_local_crops:
            crops = [random_view(image, config.local_size, rng, config.local_crop_scale, config) for _ in range(num)]
            sample |= {"local_crops": torch.stack(crops), "local_params": self._draw_params((2,) * num, rng)}
        return sample

    def on_device(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        return {
            f"{kind}_crops": self._augment(batch[f"{kind}_crops"], batch[f"{kind}_params"], device)
            for kind in ("global", "local")
            if f"{kind}_crops" in batch
        }

    def _draw_params(self, kinds: tuple[int, ...], rng: np.random.Generator) -> Float[Tensor, "v 9"]:
        """Draw the parameters of each view; kind 0 is the first global crop, 1 the second, 2 a local one."""
        config = self.config
        params = np.zeros((len(kinds), 9), dtype=np.float32)
        params[:, _BRIGHTNESS : _HUE + 1] = 1, 1, 1, 0
        for row, kind in zip(params, kinds, strict=True):
            row[_FLIP] = rng.random() < config.flip_prob
            if rng.random() < config.color_jitter_prob:
                *strengths, hue = config.color_jitter
                for column, strength in enumerate(strengths, start=_BRIGHTNESS):
                    row[column] = rng.uniform(max(0.0, 1 - strength), 1 + strength)
                row[_HUE] = rng.uniform(-hue, hue)
                row[_ORDER] = rng.integers(len(JITTER_ORDERS))
            row[_GREY] = rng.random() < config.grey_prob
            if rng.random() < config.blur_probs[kind]:
                row[_SIGMA] = rng.uniform(*self.blur_sigma)
            row[_SOLARIZE] = rng.random() < config.solarize_prob[kind]
        return torch.from_numpy(params)

    def _augment(
        self, crops: UInt8[Tensor, "b v c h w"], params: Float[Tensor, "b v 9"], device: torch.device
    ) -> Float[Tensor, "b v c h w"]:
        images = rearrange(crops.to(device, non_blocking=True), "b v c h w -> (b v) c h w")
        params = rearrange(params, "b v p -> (b v) p")
        size = max(1, _CACHED_VALUES // images[0].numel()) if device.type == "cpu" else len(images)
        parts = [self._augment_views(*part) for part in zip(images.split(size), params.split(size), strict=True)]
        images = torch.cat(parts) if len(parts) > 1 else parts[0]
        return rearrange(images, "(b v) c h w -> b v c h w", v=crops.shape[1])

    def _augment_views(
        self, images: UInt8[Tensor, "b c h w"], params: Float[Tensor, "b 9"]
    ) -> Float[Tensor, "b c h w"]:
        images = to_unit(flip_horizontally(images, params[:, _FLIP].bool()))
        images = color_jitter(images, params[:, _BRIGHTNESS : _HUE + 1], params[:, _ORDER].long())
        images = to_grey(images, params[:, _GREY].bool())
        if self.config.blur_prob == "dinov2":
            images = gaussian_blur(images, params[:, _SIGMA], _DINOV2_RADIUS, "reflect")
        else:
            images = gaussian_blur(images, params[:, _SIGMA], radius=math.ceil(3 * self.blur_sigma[1]))
        images = solarize(images, params[:, _SOLARIZE].bool())
        return normalize(images, self.spec.normalization)
