"""Augmentation for supervised training: timm's RandAugment, random erasing and Mixup/CutMix, drawn per sample."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from ssl_vit.core.settings import check_interval, check_ranges
from ssl_vit.data.augment.crops import OrientationConfig, random_view
from ssl_vit.data.augment.device import flip_horizontally, normalize
from ssl_vit.data.transform import InputSpec, Normalization


@dataclass(frozen=True)
class AugmentConfig(OrientationConfig):
    """How images and labels are augmented in supervised training."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's name of a RandAugment (arXiv:1909.13719), for three channels only; null = none. Geometric operations are
    bicubic, as in MAE's fine-tuning."""
    random_erasing: float = 0.25
    """Probability that a box is replaced by noise (arXiv:1708.04896)."""
    mixup: float = 0.8
    """Alpha of Mixup (arXiv:1710.09412); 0 = none."""
    cutmix: float = 1.0
    """Alpha of CutMix (arXiv:1905.04899); 0 = none. With both, each batch gets one of them."""
    label_smoothing: float = 0.1
    """Share of a label that is spread evenly over all classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval(self, "crop_scale")
        check_ranges(self, random_erasing="[0, 1]", mixup="[0, inf)", cutmix="[0, inf)", label_smoothing="[0, 1)")
        if self.rand_augment is not None and not self.rand_augment.startswith("rand-"):
            raise ValueError(f"rand_augment={self.rand_augment!r}: timm's names begin with 'rand-', as rand-m9-mstd0.5")


class OtherInput(NamedTuple):
    """What another model takes that sees the same images."""

    image_size: tuple[int, int]
    """Height and width in pixels."""
    normalization: Normalization


class SupervisedTransform:
    """Turns labelled images into `images [b c h w]` and `targets [b classes]`, each row of which sums to one.

    With a teacher that takes another size or normalisation, `teacher_images` are the same images, mixed and erased, as
    it takes them.

    Everything is drawn from the sample's own generator. Mixup mixes the images of one device's batch, so it is seeded
    by the first sample of that batch.
    """

    def __init__(
        self, config: AugmentConfig, num_classes: int, spec: InputSpec, teacher: OtherInput | None = None
    ) -> None:
        self.config, self.num_classes, self.spec = config, num_classes, spec
        self.teacher = None if teacher == OtherInput(spec.image_size, spec.normalization) else teacher
        self.augment = None
        if config.rand_augment is not None:
            mean = spec.normalization.mean
            if len(mean) != 3:
                raise ValueError(f"rand_augment={config.rand_augment!r}: needs 3 channels, not {len(mean)}; set null")
            fill = tuple(min(255, round(255 * value)) for value in mean)
            self.augment = rand_augment_transform(
                config.rand_augment,
                {
                    "translate_const": int(min(spec.image_size) * 0.45),
                    "img_mean": fill,
                    "interpolation": Image.Resampling.BICUBIC,  # timm's default draws bilinear or bicubic
                },
            )
            for operation in self.augment.ops:
                if operation.name.startswith("Posterize"):
                    operation.level_fn = partial(_keep_a_bit, operation.level_fn)

    def __call__(self, image: UInt8[Tensor, "c h w"], rng: np.random.Generator) -> dict[str, Tensor]:
        crop = random_view(image, self.spec.image_size, rng, self.config.crop_scale, self.config)
        flip = torch.tensor(rng.random() < self.config.flip_prob)
        # Three seeds, so that augmentation, erasing and mixing are independent.
        augment_seed, erase_seed, mix_seed = rng.integers(2**31, size=3).tolist()
        if self.augment is not None:
            with _seeded(augment_seed):
                crop = TF.pil_to_tensor(self.augment(TF.to_pil_image(crop)))
        seeds = {"erase_seed": torch.tensor(erase_seed), "mix_seed": torch.tensor(mix_seed)}
        return {"images": crop, "flip": flip, **seeds}

    def on_device(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        config = self.config
        images = flip_horizontally(batch["images"].to(device, non_blocking=True), batch["flip"])
        images = normalize(images, self.spec.normalization)
        if config.random_erasing:
            erase = RandomErasing(config.random_erasing, mode="pixel", device=str(device))
            for image, seed in zip(images, batch["erase_seed"].tolist(), strict=True):
                with _seeded(seed):
                    erase(image)  # in place
        labels = batch["label"].to(device, non_blocking=True)
        targets = mixup_target(labels, self.num_classes, smoothing=config.label_smoothing)
        # Mixup pairs images from both ends, so the last of an odd number stays unmixed.
        even = len(images) // 2 * 2
        if even and (config.mixup or config.cutmix):
            mix = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=self.num_classes
            )
            with _seeded(int(batch["mix_seed"][0])):
                images[:even], targets[:even] = mix(images[:even], labels[:even])
        taught = {}
        if self.teacher is not None:
            taught["teacher_images"] = as_taken_by(self.teacher, images, self.spec.normalization)
        return {"images": images, "targets": targets, **taught}


def as_taken_by(
    other: OtherInput, images: Float[Tensor, "b c h w"], own: Normalization
) -> Float[Tensor, "b c rows columns"]:
    """Images that are normalised by `own`, as another model takes them: normalised anew and resized (bicubic)."""
    mean, std, other_mean, other_std = (
        images.new_tensor(values)[:, None, None] for values in (*own, *other.normalization)
    )
    images = (images * std + mean - other_mean) / other_std
    if tuple(images.shape[-2:]) == other.image_size:
        return images
    return F.interpolate(images, other.image_size, mode="bicubic", antialias=True)


def _keep_a_bit(level_fn: Callable[..., tuple[int]], level: float, hparams: dict[str, Any]) -> tuple[int]:
    """Keep at least one bit: timm's strongest posterisation keeps none, which newer versions of Pillow refuse."""
    return (max(1, level_fn(level, hparams)[0]),)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that timm draws from, and restore their states afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    # Three seeds: from the same one numpy and torch would draw the same numbers.
    python_seed, numpy_seed, torch_seed = np.random.SeedSequence(seed).generate_state(3).tolist()
    random.seed(python_seed)
    np.random.seed(numpy_seed)  # noqa: NPY002
    torch.manual_seed(torch_seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
