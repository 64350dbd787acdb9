"""Images as sequences of patches, and back."""

from collections.abc import Sequence

from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor


def patchify(images: Shaped[Tensor, "b c h w"], patch_size: tuple[int, int]) -> Shaped[Tensor, "b n p"]:
    """Cut images into patches, row-major, pixels of a patch in (row, column, channel) order."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size[0], q=patch_size[1])


def unpatchify(
    patches: Shaped[Tensor, "b n p"], shape: Sequence[int], patch_size: tuple[int, int]
) -> Shaped[Tensor, "b c h w"]:
    """Put patches, in the order of `patchify`, together to images of `shape` (..., height, width)."""
    height, (p, q) = shape[-2] // patch_size[0], patch_size
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=p, q=q)
