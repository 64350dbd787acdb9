"""FCMAE: Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders" (arXiv:2301.00808)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from ssl_vit.core.settings import check_ranges
from ssl_vit.models.blocks import run_in_turn
from ssl_vit.models.encoder import Encoder
from ssl_vit.objectives.mae import PatchError
from ssl_vit.objectives.masked import Masked, MaskedConfig


@dataclass(frozen=True)
class FCMAEConfig(MaskedConfig):
    """Settings of FCMAE; the defaults are the paper's."""

    norm_pix_loss: bool = True
    """Predict patches normalised by their own mean and standard deviation: better features, greyer figures."""
    decoder_embed_dim: int = 512
    """Width of the decoder."""
    decoder_depth: int = 1
    """Blocks of the decoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, decoder_embed_dim="[1, 16384]", decoder_depth="[1, 100]")

    def build(self, encoder: Encoder) -> "FCMAE":
        """Build the objective on an encoder.

        Raises:
            ValueError: the encoder cannot compute from visible tokens alone, or the mask leaves nothing to see or to
                predict.
        """
        return FCMAE(self, encoder)


class FCMAE(Masked):
    """Encode the visible tokens as if the removed ones did not exist, and predict these with one ConvNeXt V2 block.

    The paper's code takes the norms of Global Response Normalisation over all visible sites of a GPU's batch, so that
    an image's features depend on the images beside it, and what is learned on the micro-batch. Here they are taken for
    each image, as the paper's formula and all fine-tuning do.
    """

    config: FCMAEConfig

    def __init__(self, config: FCMAEConfig, encoder: Encoder) -> None:
        super().__init__()
        if not encoder.supports_visible:
            raise ValueError(
                f"encoder.arch={encoder.config.arch!r}: FCMAE computes from visible tokens alone, which this backbone "
                "cannot; use convnextv2_* or convnext_*, and for Swin and Vision Transformers SimMIM"
            )
        config.check(encoder.image_size, encoder.stride)
        self.config = config
        self.encoder = encoder
        for name, parameter in encoder.named_parameters():
            if encoder.layer_of(name) > encoder.num_layers:
                parameter.requires_grad_(False)  # pre-training has no final norm
        width = config.decoder_embed_dim
        self.proj = nn.Conv2d(encoder.embed_dim, width, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.decoder_blocks = nn.ModuleList(
            ConvNeXtBlock(width, use_grn=True, ls_init_value=None) for _ in range(config.decoder_depth)
        )
        self.pred = nn.Conv2d(width, encoder.stride[0] * encoder.stride[1] * encoder.in_chans, 1)
        self.patch_error = PatchError(encoder.stride, config.norm_pix_loss)
        self._initialize()

    def _initialize(self) -> None:
        """Normal with standard deviation .02, as the encoder is in timm."""
        for part in (self.proj, self.decoder_blocks, self.pred):
            for module in part.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        images, mask = batch["images"], batch["mask"]
        error = self.patch_error(self.reconstruct(images, mask), images)
        return {"loss": (error * mask).sum() / mask.sum()}

    def reconstruct(self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n p"]:
        """Predict every patch from the visible ones.

        Args:
            mask: True where a patch is removed.

        Returns:
            Patches in row-major order, pixels of a patch in (row, column, channel) order; in units of the normalised
            image, or of the patch normalised by its own mean and deviation with `norm_pix_loss`.
        """
        maps = self.proj(self.encoder.forward_visible(images, mask))
        removed = rearrange(mask, "b (h w) -> b 1 h w", h=maps.shape[2])
        maps = torch.where(removed, self.mask_token.to(maps.dtype), maps)
        maps = run_in_turn(self.decoder_blocks, maps, {}, self.encoder.grad_checkpointing and torch.is_grad_enabled())
        return rearrange(self.pred(maps), "b p h w -> b (h w) p")

    def predict_patches(
        self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b n p"], bool]:
        return self.reconstruct(images, mask), self.config.norm_pix_loss

    def compilable(self) -> list[nn.Module]:
        return [*super().compilable(), self.patch_error]
