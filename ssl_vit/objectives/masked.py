"""What SimMIM and FCMAE share: images with a mask that is drawn in units of whole tokens, and their figure."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from ssl_vit.core.settings import check_interval, check_ranges
from ssl_vit.data.augment.crops import OrientationConfig, random_view
from ssl_vit.data.augment.device import flip_horizontally, normalize
from ssl_vit.data.transform import InputSpec, check_divisible
from ssl_vit.objectives.objective import Objective, Reconstruction, Resolved, RunSize


@dataclass(frozen=True)
class MaskedConfig(OrientationConfig):
    """Settings of objectives whose encoder sees the whole grid, and a mask on it."""

    mask_ratio: float = 0.6
    """Share of the image to mask, between 0 and 1."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a training crop covers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval(self, "crop_scale")
        check_ranges(self, mask_ratio="(0, 1); the paper's is 0.6")

    def resolve(self, size: RunSize) -> dict[str, Resolved]:
        """No setting depends on the data."""
        return {}

    def unit(self, stride: tuple[int, int]) -> tuple[int, int]:
        """Height and width in pixels of what is masked or visible as a whole: here a token."""
        return stride

    def check(self, image_size: tuple[int, int], stride: tuple[int, int]) -> None:
        """Refuse sizes and ratios that leave nothing to see or to predict.

        Raises:
            ValueError: in the form `mask_ratio=value: ...`.
        """
        units = math.prod(self._units(image_size, stride))
        if not 0 < (masked := num_masked(units, self.mask_ratio)) < units:
            raise ValueError(
                f"mask_ratio={self.mask_ratio!r}: masks {masked} of {units} units of "
                f"{' x '.join(map(str, self.unit(stride)))} pixels; one must be masked and one visible: change "
                "mask_ratio or encoder.image_size"
            )

    def draw(
        self, image_size: tuple[int, int], stride: tuple[int, int], rng: np.random.Generator
    ) -> Bool[Tensor, " n"]:
        """A mask of output tokens, row-major, drawn as in SimMIM's and FCMAE's code: one permutation of the units."""
        (rows, columns), (height, width) = self._units(image_size, stride), self.unit(stride)
        mask = torch.zeros(rows * columns, dtype=torch.bool)
        mask[torch.from_numpy(rng.permutation(rows * columns)[: num_masked(rows * columns, self.mask_ratio)])] = True
        whole = rearrange(mask, "(h w) -> h w", h=rows)
        return repeat(whole, "h w -> (h p w q)", p=height // stride[0], q=width // stride[1])

    def _units(self, image_size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
        unit = self.unit(stride)
        check_divisible(f"encoder.image_size={image_size}", image_size, unit, "; masks are drawn in these units")
        return image_size[0] // unit[0], image_size[1] // unit[1]

    def build_transform(self, spec: InputSpec) -> "MaskedTransform":
        """Crop, flip and mask images for an encoder with this `spec`."""
        return MaskedTransform(self, spec)


def num_masked(num_units: int, mask_ratio: float) -> int:
    """ceil(ratio x units), without float errors: .6 of 25 are 15."""
    return math.ceil(num_units * mask_ratio - 1e-9)


class MaskedTransform:
    """One crop and one mask per image: `images [b c h w]` and `mask [b n]`, True where a token is masked."""

    def __init__(self, config: MaskedConfig, spec: InputSpec) -> None:
        self.config, self.spec = config, spec

    def __call__(self, image: UInt8[Tensor, "c h w"], rng: np.random.Generator) -> dict[str, Tensor]:
        return {
            "images": random_view(image, self.spec.image_size, rng, self.config.crop_scale, self.config),
            "flip": torch.tensor(rng.random() < self.config.flip_prob),
            "mask": self.config.draw(self.spec.image_size, self.spec.stride, rng),
        }

    def on_device(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        images = flip_horizontally(batch["images"].to(device, non_blocking=True), batch["flip"])
        mask = batch["mask"].to(device, non_blocking=True)
        return {"images": normalize(images, self.spec.normalization), "mask": mask}


class Masked(Objective):
    """An objective that predicts masked tokens' pixels."""

    config: MaskedConfig
    pooled = "mean"  # ConvNeXt and Swin have no class token, and no loss trains a ViT's
    reconstructs = True
    figure_file = "reconstructions.png"

    def predict_patches(
        self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b n p"], bool]:
        """Predicted patches, pixels in (row, column, channel) order, and whether each is normalised by itself."""
        raise NotImplementedError

    @torch.inference_mode()
    def preview(self, images: Float[Tensor, "b c h w"], rng: np.random.Generator) -> Reconstruction:
        size, stride = (images.shape[-2], images.shape[-1]), self.encoder.stride
        mask = torch.stack([self.config.draw(size, stride, rng) for _ in images]).to(images.device)
        title = f"{self.config.mask_ratio:.0%} of the image masked"
        return self._reconstruction(images, mask)._replace(title=title)

    def fill_in(self, images: Float[Tensor, "b c h w"], keep: Int[Tensor, "b k"]) -> Reconstruction:
        """Predict all tokens from the ones in `keep`."""
        rows, columns = self.encoder.grid_of(*images.shape[-2:])
        num_tokens = rows * columns
        mask = torch.ones(len(keep), num_tokens, dtype=torch.bool, device=keep.device).scatter(1, keep, False)
        return self._reconstruction(images, mask)

    def _reconstruction(self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"]) -> Reconstruction:
        patches, normalized = self.predict_patches(images, mask)
        return Reconstruction(patches, ~mask, self.encoder.stride, normalized)
