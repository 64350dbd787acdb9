"""SimMIM: Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022 (arXiv:2111.09886)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.core.settings import check_ranges
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.patches import patchify
from ssl_vit.objectives.masked import Masked, MaskedConfig
from ssl_vit.objectives.objective import ParamGroup


@dataclass(frozen=True)
class SimMIMConfig(MaskedConfig):
    """Settings of SimMIM; the defaults are the paper's."""

    mask_unit: int = 32
    """Side in pixels of the squares that are masked; a multiple of the encoder's stride."""
    norm_target: int | None = None
    """Predict pixels normalised over a window of so many pixels around each, an odd number (Swin V2: 47); null predicts
    plain pixels."""
    crop_scale: tuple[float, float] = (0.67, 1.0)
    """Smallest and largest share of the image's area that a training crop covers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, mask_unit="[1, inf)", norm_target="[3, inf)")
        if self.norm_target is not None and self.norm_target % 2 == 0:
            raise ValueError(f"norm_target={self.norm_target!r}: must be odd, so that a pixel is in the middle")

    def unit(self, stride: tuple[int, int]) -> tuple[int, int]:
        if any(self.mask_unit % step for step in stride):
            raise ValueError(
                f"mask_unit={self.mask_unit!r}: must be a multiple of the encoder's stride {stride}, such as "
                f"{-(-self.mask_unit // max(stride)) * max(stride)}"
            )
        return self.mask_unit, self.mask_unit

    def build(self, encoder: Encoder) -> "SimMIM":
        """Build the objective on an encoder.

        Raises:
            ValueError: the encoder cannot mask tokens, or the mask leaves nothing to see or to predict.
        """
        return SimMIM(self, encoder)


class SimMIM(Masked):
    """Replace masked tokens behind the stem, and predict their pixels from the last tokens with one linear layer."""

    config: SimMIMConfig

    def __init__(self, config: SimMIMConfig, encoder: Encoder) -> None:
        super().__init__()
        if not encoder.supports_mask:
            raise ValueError(
                f"encoder.arch={encoder.config.arch!r}: SimMIM masks tokens, and this stem mixes pixels of neighbours; "
                "use vit_*, swin_*, swinv2_*, convnext_* or convnextv2_*"
            )
        config.check(encoder.image_size, encoder.stride)
        self.config = config
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.mask_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = nn.Linear(encoder.embed_dim, encoder.stride[0] * encoder.stride[1] * encoder.in_chans)

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        images, mask = batch["images"], batch["mask"]
        return {"loss": simmim_loss(self.reconstruct(images, mask), self.target(images), self._pixels(images, mask))}

    def reconstruct(self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b c h w"]:
        """Predict all pixels, in units of the normalised image, or of `norm_target`'s windows."""
        features = self.encoder(images, mask=mask, mask_token=self.mask_token[0, 0])
        rows, _ = self.encoder.grid_of(*images.shape[-2:])
        height, width = self.encoder.stride
        # Pixels of a token in (channel, row, column) order, as the paper's pixel shuffle has them.
        return rearrange(
            self.decoder(features.patches), "b (r s) (c h w) -> b c (r h) (s w)", r=rows, h=height, w=width
        )

    def target(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """What `reconstruct` should give."""
        if self.config.norm_target is None:
            return images
        mean, deviation = window_moments(images, self.config.norm_target)
        return (images.float() - mean) / deviation

    def predict_patches(
        self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b n p"], bool]:
        """Mean and contrast of windows are taken from the images where the target is normalised."""
        predicted = self.reconstruct(images, mask).float()
        if self.config.norm_target is not None:
            mean, deviation = window_moments(images, self.config.norm_target)
            predicted = predicted * deviation + mean
        return patchify(predicted, self.encoder.stride), False

    def param_groups(self) -> list[ParamGroup]:
        """Position tables and tokens have no weight decay, as in the paper's code."""
        return self.split_by_decay(self._timm_exempts() | {"mask_token"})

    def _pixels(self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"]) -> Bool[Tensor, "b h w"]:
        rows, _ = self.encoder.grid_of(*images.shape[-2:])
        whole = rearrange(mask, "b (r s) -> b r s", r=rows)
        return repeat(whole, "b r s -> b (r h) (s w)", h=self.encoder.stride[0], w=self.encoder.stride[1])


def simmim_loss(
    predicted: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b h w"]
) -> Float[Tensor, ""]:
    """Mean absolute error of the masked pixels of a batch (SimMIM, section 3.5), in fp32.

    The mean is over all masked pixels, not over images; a run masks as many in each image, so that both are the same.
    """
    error = (predicted.float() - target.float()).abs()
    return (error * mask[:, None]).sum() / (mask.sum() + 1e-5) / predicted.shape[1]


def window_moments(
    images: Float[Tensor, "b c h w"], size: int
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Mean and unbiased standard deviation of the window of `size` pixels around each pixel, clipped at the borders.

    This is the target of Swin V2's SimMIM (arXiv:2111.09883).
    """
    images = images.float()

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, size, stride=1, padding=size // 2, count_include_pad=False)

    count = F.avg_pool2d(torch.ones_like(images), size, stride=1, padding=size // 2) * size**2
    variance = (mean(images.square()) - mean(images).square()) * (count / (count - 1))
    return mean(images), (variance.clamp(min=0) + 1e-6).sqrt()
