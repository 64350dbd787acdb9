"""Pictures of what a masked autoencoder sees and what it makes of it, as in He et al. (2022), figure 2."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

COLUMNS = ("original", "masked", "reconstruction", "reconstruction + visible")

_REMOVED = 0.85  # light grey: black could pass for part of a dark picture
_WIDTH_INCHES = 6.5  # text width of a paper, so that the font sizes below are what a reader gets
_MIN_CELL_PIXELS = 280  # a picture is enlarged by a whole factor to at least this width
_MARGIN_INCHES = 0.06
_GAP_INCHES = 0.05
_LINE_INCHES = {"title": 0.21, "column": 0.19, "caption": 0.14}
_FONT_POINTS = {"title": 10, "column": 8.5, "caption": 7}
_CHARACTERS = {"title": 80, "caption": 120}  # that fit into the width


def draw_reconstructions(
    images: Float[Tensor, "b c h w"],
    reconstruction: Float[Tensor, "b n p"],
    keep: Int[Tensor, "b k"],
    *,
    patch_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix_loss: bool,
    path: Path,
    title: str,
) -> None:
    """Write a PNG with a row for each image: original, masked, reconstruction, reconstruction + visible.

    Arguments and errors are those of `reconstruction_panels`, and:

    Args:
        path: the file; its folder is made where it does not exist.
        title: a line above the figure; "" = none.
    """
    panels = reconstruction_panels(
        images,
        reconstruction,
        keep,
        patch_size=patch_size,
        mean=mean,
        std=std,
        norm_pix_loss=norm_pix_loss,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    _figure(panels, title, _caption(images.shape[1], norm_pix_loss)).savefig(path, format="png")


def reconstruction_panels(
    images: Float[Tensor, "b c h w"],
    reconstruction: Float[Tensor, "b n p"],
    keep: Int[Tensor, "b k"],
    *,
    patch_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix_loss: bool,
) -> Float[Tensor, "b 4 h w 3"]:
    """The four pictures of `COLUMNS` for each image, RGB in [0, 1], on the CPU.

    Images of one or two channels are shown by their first, as grey; of more than three, by their first three.

    Args:
        images: normalised images.
        reconstruction: predicted patches, row-major; a patch's pixels in the order (row, column, channel).
        keep: indices of the visible patches.
        patch_size: (height, width) in pixels.
        mean, std: with which the images were normalised.
        norm_pix_loss: the prediction is of patches normalised by their own mean and deviation. These are not
            predicted, so they are taken from the original.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    images, reconstruction = images.detach().float().cpu(), reconstruction.detach().float().cpu()
    height, width = images.shape[-2:]
    if height % patch_size[0] or width % patch_size[1]:
        raise ValueError(f"patch_size={patch_size}: does not divide the image size {(height, width)}")
    patches = _patchify(images, patch_size)
    if patches.shape != reconstruction.shape:
        raise ValueError(
            f"the reconstruction has shape {tuple(reconstruction.shape)}, "
            f"but these images and patches make {tuple(patches.shape)}"
        )
    if norm_pix_loss:
        deviation = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        reconstruction = reconstruction * deviation + patches.mean(dim=-1, keepdim=True)
    offset, scale = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def show(shown: Tensor) -> Tensor:
        pixels = (_unpatchify(shown, images.shape, patch_size) * scale + offset).clamp(0, 1)
        pixels = pixels[:, :3] if pixels.shape[1] >= 3 else repeat(pixels[:, :1], "b 1 h w -> b 3 h w")
        return rearrange(pixels, "b c h w -> b h w c")

    visible = torch.zeros(patches.shape[:2]).scatter_(1, keep.cpu(), 1.0)[..., None]
    visible_pixels = rearrange(
        _unpatchify(visible.expand_as(patches), images.shape, patch_size)[:, :1], "b 1 h w -> b h w 1"
    )
    original, reconstructed = show(patches), show(reconstruction)
    return torch.stack(
        [
            original,
            torch.where(visible_pixels > 0, original, _REMOVED),
            reconstructed,
            torch.where(visible_pixels > 0, original, reconstructed),
        ],
        dim=1,
    )


def _patchify(images: Float[Tensor, "b c h w"], patch_size: tuple[int, int]) -> Float[Tensor, "b n p"]:
    return rearrange(images, "b c (rows ph) (cols pw) -> b (rows cols) (ph pw c)", ph=patch_size[0], pw=patch_size[1])


def _unpatchify(
    patches: Float[Tensor, "b n p"], shape: Sequence[int], patch_size: tuple[int, int]
) -> Float[Tensor, "b c h w"]:
    return rearrange(
        patches,
        "b (rows cols) (ph pw c) -> b c (rows ph) (cols pw)",
        rows=shape[-2] // patch_size[0],
        ph=patch_size[0],
        pw=patch_size[1],
    )


def _caption(num_channels: int, norm_pix_loss: bool) -> str:
    sentences = []
    if norm_pix_loss:
        sentences.append(
            "The model predicts patches normalised by themselves: patch mean and contrast are taken from the original."
        )
    if num_channels == 2:
        sentences.append("Channel 1 of 2 is shown.")
    if num_channels > 3:
        sentences.append(f"Channels 1 to 3 of {num_channels} are shown as red, green and blue.")
    return " ".join(sentences)


def _figure(panels: Float[Tensor, "b 4 h w 3"], title: str, caption: str) -> Figure:
    """Lay out panels pixel by pixel: every image pixel becomes a whole square of figure pixels."""
    num_columns, width = panels.shape[1], panels.shape[3]
    factor = math.ceil(_MIN_CELL_PIXELS / width)
    cell_width = width * factor
    # The cells keep their size in pixels; what is left of the width goes to gaps and margins.
    dpi = num_columns * cell_width / (_WIDTH_INCHES - 2 * _MARGIN_INCHES - (num_columns - 1) * _GAP_INCHES)
    gap, margin = round(_GAP_INCHES * dpi), round(_MARGIN_INCHES * dpi)
    mosaic = _mosaic(panels, factor, gap)
    title_lines = textwrap.wrap(title, _CHARACTERS["title"])
    caption_lines = textwrap.wrap(caption, _CHARACTERS["caption"])
    line = {name: round(inches * dpi) for name, inches in _LINE_INCHES.items()}
    above = margin + len(title_lines) * line["title"] + line["column"]
    below = margin + len(caption_lines) * line["caption"] + (gap if caption_lines else 0)
    total_width, total_height = mosaic.shape[1] + 2 * margin, mosaic.shape[0] + above + below

    # Half a pixel more, because the canvas rounds down.
    figure = Figure(figsize=((total_width + 0.5) / dpi, (total_height + 0.5) / dpi), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    figure.figimage(mosaic.numpy(), xo=margin, yo=below, origin="upper")

    def write(text: str, kind: str, x: int | float, top: int | float, align: str, weight: str = "normal") -> None:
        figure.text(
            x / total_width,
            1 - (top + line[kind] / 2) / total_height,
            text,
            fontsize=_FONT_POINTS[kind],
            fontweight=weight,
            ha=align,
            va="center_baseline",
            parse_math=False,
        )

    for i, text in enumerate(title_lines):
        write(text, "title", total_width / 2, margin + i * line["title"], "center", weight="bold")
    for column, text in enumerate(COLUMNS):
        centre = margin + column * (cell_width + gap) + cell_width / 2
        write(text, "column", centre, above - line["column"] - 0.2 * gap, "center")
    for i, text in enumerate(caption_lines):
        write(text, "caption", margin, total_height - below + gap + i * line["caption"], "left")
    return figure


def _mosaic(panels: Float[Tensor, "b 4 h w 3"], factor: int, gap: int) -> UInt8[Tensor, "rows columns 3"]:
    """Put panels side by side on white, each pixel enlarged `factor` times without interpolation."""
    cells = repeat(panels, "b v h w c -> b v (h fh) (w fw) c", fh=factor, fw=factor)
    cells = torch.nn.functional.pad(cells, (0, 0, 0, gap, 0, gap), value=1.0)
    mosaic = rearrange(cells, "b v h w c -> (b h) (v w) c")[: -gap or None, : -gap or None]
    return (mosaic * 255).round().to(torch.uint8)
