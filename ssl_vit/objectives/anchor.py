"""An anchor: a loss that keeps a backbone near to the weights that it started from while it learns from new images."""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.core.settings import check_ranges
from ssl_vit.models.encoder import Encoder, Features, eval_mode
from ssl_vit.objectives.frozen import Frozen


@dataclass(frozen=True)
class AnchorConfig:
    """Settings of the anchor, for objectives that go on from published weights."""

    anchor: Literal["none", "gram", "paka", "features"] = "none"
    """Keep what the backbone makes of an image near to what the weights that it starts from (encoder.pretrained) make
    of it: the similarities of its patches (gram, DINOv3), these up to scale (paka), or the features themselves."""
    anchor_weight: float = 1.0
    """Weight of the anchor's loss."""

    def check_anchor(self) -> None:
        """Refuse a weight that cannot be.

        Raises:
            ValueError: it is not above 0.
        """
        check_ranges(self, anchor_weight="(0, inf)")

    def build_anchor(self, encoder: Encoder) -> "Anchor | None":
        """Copy the encoder as it is now; None without an anchor.

        Raises:
            ValueError: the encoder has fresh weights, or would be recomputed with other drop paths.
        """
        return None if self.anchor == "none" else Anchor(self, encoder)


class Anchor:
    """The distance of an encoder to the copy that was made of it before training.

    Both see whole images without masks and drop path, so that it is 0 before the first step. It costs a forward and
    backward pass of the encoder and a forward pass of the copy, on one view of each image.
    """

    def __init__(self, config: AnchorConfig, encoder: Encoder) -> None:
        kind, own = config.anchor, encoder.config
        if own.pretrained is None and not encoder.is_pretrained:
            raise ValueError(
                f"anchor={kind!r}: keeps the backbone near to the weights that it starts from, and these are fresh; "
                "name some in encoder.pretrained, or leave it out"
            )
        if own.grad_checkpointing and own.drop_path_rate:
            raise ValueError(
                f"anchor={kind!r}: encoder.grad_checkpointing would compute it again with drop path, which it is free "
                "of; set encoder.drop_path_rate 0, or leave one of them out"
            )
        self.config = config
        came_from = f"encoder.pretrained={own.pretrained!r}"
        self.start = Frozen(copy.deepcopy(encoder), "anchor", came_from, encoder.read_sha256)

    def __call__(self, encoder: Encoder, images: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
        """The distance between the features that the encoder and its start give for images."""
        with eval_mode(encoder):
            features = encoder(images)
        start: Features = self.start(images)
        with torch.autocast(images.device.type, enabled=False):
            if self.config.anchor == "gram":
                return gram_loss(features.patches.float(), start.patches.float())
            if self.config.anchor == "paka":
                return paka_loss(features.patches.float(), start.patches.float())
            pairs = zip(features, start, strict=True)
            return torch.stack([F.mse_loss(one.float(), other.float()) for one, other in pairs]).mean()


def gram_loss(
    patches: Float[Tensor, "b n d"], start: Float[Tensor, "b n d"], *, clip_negative: bool = False
) -> Float[Tensor, ""]:
    """Gram anchoring (DINOv3, arXiv:2508.10104): mean squared difference of the cosine similarities among an image's
    patches.

    Args:
        clip_negative: take similarities below 0 as 0.
    """
    patches, start = F.normalize(patches, dim=-1), F.normalize(start, dim=-1)
    found, wanted = patches @ patches.mT, start @ start.mT
    if clip_negative:
        found, wanted = found.clamp(min=0), wanted.clamp(min=0)
    return F.mse_loss(found, wanted)


def paka_loss(patches: Float[Tensor, "b n d"], start: Float[Tensor, "b n d"]) -> Float[Tensor, ""]:
    """Patch kernel alignment: 1 - CKA of the linear kernels of an image's patches (Kornblith et al. 2019,
    arXiv:1905.00414), averaged over images. Rotations and scale do not change it."""
    found, wanted = (_centred(tokens @ tokens.mT) for tokens in (patches, start))
    return (1 - F.cosine_similarity(found.flatten(1), wanted.flatten(1), dim=-1)).mean()


def _centred(kernel: Float[Tensor, "b n n"]) -> Float[Tensor, "b n n"]:
    rows, columns = kernel.mean(dim=-1, keepdim=True), kernel.mean(dim=-2, keepdim=True)
    return kernel - rows - columns + rows.mean(dim=-2, keepdim=True)
