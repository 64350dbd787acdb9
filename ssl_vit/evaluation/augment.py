"""Pictures for supervised training: timm's RandAugment, random erasing and Mixup/CutMix, drawn per sample."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from ssl_vit.data.device_transforms import flip_horizontally, normalize
from ssl_vit.data.transforms import random_resized_crop


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to pictures and labels in supervised training."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the picture's area that a crop has: smallest and largest."""
    flip_prob: float = 0.5
    """How often a picture is mirrored."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's name of a RandAugment (arXiv:1909.13719); three channels only; null = none."""
    random_erasing: float = 0.25
    """How often a box is replaced by noise (arXiv:1708.04896)."""
    mixup: float = 0.8
    """Alpha of Mixup (arXiv:1710.09412); 0 = none."""
    cutmix: float = 1.0
    """Alpha of CutMix (arXiv:1905.04899); 0 = none. With both, each batch has the one or the other."""
    label_smoothing: float = 0.1
    """Share of a label that is spread over all classes."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale={self.crop_scale!r}: needs 0 < smallest <= largest <= 1")
        for name in ("flip_prob", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must lie in [0, 1]")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be at least 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing!r}: must lie in [0, 1)")
        if self.rand_augment is not None and not self.rand_augment.startswith("rand-"):
            raise ValueError(f"rand_augment={self.rand_augment!r}: timm's names begin with 'rand-', as rand-m9-mstd0.5")


class SupervisedTransform:
    """One crop and one label for each picture: `images [b c h w]` and `targets [b classes]`, which sum to one.

    Everything is drawn from the sample's own generator, but for Mixup, which looks at what a device takes at once: it
    is seeded by the first of these samples.
    """

    def __init__(
        self,
        config: AugmentConfig,
        num_classes: int,
        image_size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.config, self.num_classes, self.image_size, self.mean, self.std = config, num_classes, image_size, mean, std
        self.augment = None
        if config.rand_augment is not None:
            if len(mean) != 3:
                raise ValueError(f"rand_augment={config.rand_augment!r}: needs 3 channels, not {len(mean)}; set null")
            fill = tuple(min(255, round(255 * value)) for value in mean)
            self.augment = rand_augment_transform(
                config.rand_augment, {"translate_const": int(min(image_size) * 0.45), "img_mean": fill}
            )
            for operation in self.augment.ops:
                if operation.name.startswith("Posterize"):
                    operation.level_fn = partial(_keep_a_bit, operation.level_fn)

    def __call__(self, image: UInt8[Tensor, "c h w"], rng: np.random.Generator) -> dict[str, Tensor]:
        crop = random_resized_crop(image, self.image_size, rng, scale=self.config.crop_scale)
        flip = torch.tensor(rng.random() < self.config.flip_prob)
        seed = int(rng.integers(2**31))
        if self.augment is not None:
            with _seeded(seed):
                crop = TF.pil_to_tensor(self.augment(TF.to_pil_image(crop)))
        return {"images": crop, "flip": flip, "seed": torch.tensor(seed)}

    def on_device(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        config, seeds = self.config, batch["seed"].tolist()
        images = flip_horizontally(batch["images"].to(device, non_blocking=True), batch["flip"])
        images = normalize(images, self.mean, self.std)
        if config.random_erasing:
            erase = RandomErasing(config.random_erasing, mode="pixel", device=str(device))
            for image, seed in zip(images, seeds, strict=True):
                with _seeded(seed):
                    erase(image)  # in place
        labels = batch["label"].to(device, non_blocking=True)
        targets = mixup_target(labels, self.num_classes, smoothing=config.label_smoothing)
        # In pairs from both ends, so of an odd number one picture stays as it is.
        even = len(images) // 2 * 2
        if even and (config.mixup or config.cutmix):
            mix = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=self.num_classes
            )
            with _seeded(seeds[0]):
                images[:even], targets[:even] = mix(images[:even], labels[:even])
        return {"images": images, "targets": targets}


def _keep_a_bit(level_fn: Callable[..., tuple[int]], level: float, hparams: dict[str, Any]) -> tuple[int]:
    """timm's strongest posterisation keeps no bit of a pixel, which newer versions of Pillow refuse."""
    return (max(1, level_fn(level, hparams)[0]),)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that timm draws from, and put back those whose state others rely on."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
