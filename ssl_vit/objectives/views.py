"""What DINO and LeJEPA share: crops of several sizes through one encoder, and the figure of what it attends to."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ssl_vit.models.attention_maps import attention_maps, has_cls_attention
from ssl_vit.models.encoder import Encoder, Features
from ssl_vit.objectives.anchor import Anchor, AnchorConfig
from ssl_vit.objectives.objective import AttentionMaps, Objective, PatchTokens


class ViewsObjective(Objective):
    """An objective that compares the class tokens of several views of an image."""

    pooled = "cls"
    anchor: Anchor | None = None

    def set_anchor(self, config: AnchorConfig) -> None:
        """Copy the encoder as it is now, if the settings ask for an anchor."""
        self.anchor = config.build_anchor(self.encoder)
        if self.anchor is not None:
            self.frozen = (*self.frozen, self.anchor.start)

    def anchored(self, losses: dict[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add the anchor's loss, of the first view of each image, if there is an anchor."""
        if self.anchor is None:
            return losses
        distance = self.anchor(self.encoder, batch["global_crops"][:, 0])
        loss = losses["loss"] + self.anchor.config.anchor_weight * distance
        return {**losses, "loss": loss, "loss_anchor": distance.detach()}

    @property
    def figure_file(self) -> str:
        return "attention.png" if has_cls_attention(self.backbone()) else "pca.png"

    def preview(self, images: Float[Tensor, "b c h w"], rng: np.random.Generator) -> AttentionMaps | PatchTokens | None:
        encoder = self.backbone()
        if has_cls_attention(encoder):
            return AttentionMaps(attention_maps(encoder, images))
        grid = encoder.grid_of(*images.shape[-2:])
        if len(images) * grid[0] * grid[1] < 4:  # too few for the three components that the figure shows
            return None
        with torch.inference_mode():
            return PatchTokens(encoder(images).patches, grid)

    def encode(self, encoder: Encoder, crops: list[Float[Tensor, "_ _ c _ _"]], **how: Any) -> list[Features]:
        """Features of crops [b v c h w] of several sizes, views first: cls [v b d], patches [v b n d].

        Args:
            how: arguments of `Encoder.forward_groups`: `mask` and `mask_token` for the first size, or `cls_only`.
        """
        groups = encoder.forward_groups([rearrange(views, "b v c h w -> (v b) c h w") for views in crops], **how)
        return [
            Features(
                rearrange(cls, "(v b) d -> v b d", v=views.shape[1]),
                rearrange(patches, "(v b) n d -> v b n d", v=views.shape[1]),
            )
            for (cls, patches), views in zip(groups, crops, strict=True)
        ]


def by_size(batch: Mapping[str, Tensor]) -> list[Float[Tensor, "b v c h w"]]:
    """All crops, global ones first, in one tensor per size."""
    crops = [batch[name] for name in ("global_crops", "local_crops") if name in batch]
    return [torch.cat(crops, dim=1)] if len({views.shape[-2:] for views in crops}) == 1 else crops
