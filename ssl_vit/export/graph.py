"""A backbone for images of one size, which tracers can follow."""

from typing import Any

import timm
from jaxtyping import Float
from torch import Tensor, nn

from ssl_vit.models.vit import ViT


class StaticBackbone(nn.Module):
    """timm's model for a single image size, returning `Features` as a plain tuple."""

    def __init__(self, encoder: ViT) -> None:
        super().__init__()
        config = encoder.config
        self.vit: Any = timm.create_model(
            config.arch.split(".")[0],
            num_classes=0,
            global_pool="",
            fc_norm=False,
            img_size=encoder.image_size,
            in_chans=encoder.in_chans,
            **config.timm_overrides,
        )
        self.vit.load_state_dict(encoder.vit.state_dict())
        self.eval()

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        tokens = self.vit.forward_features(images)
        patches = tokens[:, self.vit.num_prefix_tokens :]
        return tokens[:, 0] if self.vit.has_class_token else patches.mean(dim=1), patches
