"""The encoder contract: what every backbone offers and every objective may rely on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode; afterwards restore the mode of each submodule."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


class Features(NamedTuple):
    """What an encoder returns.

    cls: final-norm class token; without a class token, the mean of the final-norm patch tokens.
    patches: final-norm patch tokens, row-major; with `keep` only the kept ones, in the order of `keep`.
    """

    cls: Float[Tensor, "b d"]
    patches: Float[Tensor, "b n d"]


class Encoder(nn.Module):
    """A backbone that turns images into a class token and patch tokens.

    Takes images of any size that the patch size divides, square or not. `image_size` is the size it was built for.
    """

    embed_dim: int
    in_chans: int
    image_size: tuple[int, int]  # (height, width) in pixels
    patch_size: tuple[int, int]  # (height, width) in pixels
    has_cls_token: bool
    supports_keep: bool  # can drop tokens before the first block (MAE, I-JEPA)
    supports_mask: bool  # can replace patch embeddings with a mask token (SimMIM, iBOT)
    num_layers: int  # blocks
    grad_checkpointing: bool = False  # blocks store only their input; the backward pass recomputes them
    is_pretrained: bool = False  # pretrained weights are loaded; objectives must not re-initialise
    pretrained_cfg: dict[str, Any]  # of a loaded backbone: input size, mean, std and crop, in timm's form

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches at the size the encoder was built for."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def layer_of(self, name: str) -> int:
        """Depth of a parameter: 0 for embeddings, 1 to `num_layers` for blocks, `num_layers` + 1 for what follows."""
        raise NotImplementedError

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        keep: Int[Tensor, "b k"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        mask_token: Float[Tensor, " d"] | None = None,
    ) -> Features:
        """Encode a batch.

        Args:
            images: normalised images.
            keep: indices of the patches that enter the blocks; all others are dropped.
            mask: True where the patch embedding is replaced by `mask_token` (before positions are added).
            mask_token: the replacement. The objective owns it, so that a backbone has no unused parameter.
        """
        raise NotImplementedError

    def forward_groups(
        self,
        groups: Sequence[Float[Tensor, "_ c _ _"]],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        mask_token: Float[Tensor, " d"] | None = None,
        cls_only: bool = False,
    ) -> list[Features]:
        """Encode batches of several sizes, at once if the backbone can.

        Args:
            groups: normalised images; those of a batch have one size.
            mask, mask_token: as in `forward`, for the first batch.
            cls_only: the caller needs no patch tokens; a backbone may skip them and return none.
        """
        masking = {} if mask is None else {"mask": mask, "mask_token": mask_token}
        return [self(images, **(masking if number == 0 else {})) for number, images in enumerate(groups)]

    def remove_norm(self) -> None:
        """Remove the final norm, for heads that pool before they normalise."""
        raise ValueError(f"{type(self).__name__} has no final norm to remove")

    def last_layers(self, images: Float[Tensor, "b c h w"], num_layers: int) -> list[Features]:
        """Features of the last `num_layers` blocks, each through the final norm, the last block last.

        A backbone whose blocks differ in width or grid offers the last one only.
        """
        if num_layers != 1:
            raise ValueError(f"num_layers={num_layers}: {type(self).__name__} offers the last layer only")
        return [self(images)]
