"""Draws what an objective shows of what it has learned."""

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from ssl_vit.data.transform import Normalization
from ssl_vit.objectives.objective import PatchTokens, Preview, Reconstruction
from ssl_vit.visualize.attention import draw_attention
from ssl_vit.visualize.patches import draw_pca
from ssl_vit.visualize.reconstructions import draw_reconstructions


def draw_preview(preview: Preview, images: Float[Tensor, "b c h w"], normalization: Normalization, path: Path) -> None:
    """Write the figure of a preview; `images` are normalised by `normalization`."""
    if isinstance(preview, Reconstruction):
        draw_reconstructions(images, preview, normalization, path)
    elif isinstance(preview, PatchTokens):
        draw_pca(images, preview.patches, preview.grid, normalization=normalization, path=path)
    else:
        draw_attention(images, preview.maps, normalization=normalization, path=path)
