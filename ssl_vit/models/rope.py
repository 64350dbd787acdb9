"""Vision Transformers with rotary positions (RoPE): timm's DINOv3 and EVA-02 models."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssl_vit.models.encoder import Features
from ssl_vit.models.vit import ViT


class RoPEViT(ViT):
    """A Vision Transformer whose blocks rotate queries and keys by the positions of their tokens.

    Rotations follow from the grid of an image, so that any size is taken as it is. In training they may be augmented as
    in DINOv3 (arXiv:2508.10104): `model_args` takes `rope_shift_coords`, `rope_jitter_coords` and
    `rope_rescale_coords`. One draw holds for all images of a batch.
    """

    title = "Vision Transformer with rotary positions"
    has_plain_blocks = False  # they take rotations too
    other_settings = ("pos_embed",)

    @staticmethod
    def norm_arguments(*, pooled: bool) -> dict[str, Any]:
        return {"use_fc_norm": pooled, "use_post_transformer_norm": not pooled}

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        keep: Int[Tensor, "b k"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        mask_token: Float[Tensor, " d"] | None = None,
    ) -> Features:
        tokens = self._embed(images, keep, mask, mask_token)
        checkpointed = self.grad_checkpointing and torch.is_grad_enabled()
        for block, given in zip(self.vit.blocks, self._rotations(images, keep), strict=True):
            tokens = checkpoint(block, tokens, use_reentrant=False, **given) if checkpointed else block(tokens, **given)
        return self._features(tokens)

    def last_layers(self, images: Float[Tensor, "b c h w"], num_layers: int) -> list[Features]:
        self._check_num_layers(num_layers)
        return self._last_of(self._embed(images), num_layers, self._rotations(images))

    def _positions(self, rows: int, columns: int, like: Tensor) -> Float[Tensor, "1 t d"]:
        return self.vit._pos_embed(like.new_zeros(2, rows, columns, self.embed_dim))[0][:1]

    def _rotations(
        self, images: Float[Tensor, "b c h w"], keep: Int[Tensor, "b k"] | None = None
    ) -> list[dict[str, Any]]:
        """The rotations of each block's tokens; those of kept tokens with `keep`."""
        if self.vit.rope is None:  # EVA's first version
            return [{}] * self.num_layers
        rope = self.vit.rope.get_embed(shape=self.grid_of(*images.shape[-2:]))
        if not self.vit.rope_mixed:
            rope = rope if keep is None else rope[keep][:, None]  # [b heads k d]
            return [{"rope": rope}] * self.num_layers
        rope = rope if keep is None else rearrange(rope[:, :, keep], "l heads b k d -> l b heads k d")
        return [{"rope": own} for own in rope]
