"""Draws a grid of panels as one figure: a row for each image, a titled column for each way to show it."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ssl_vit.core.writing import mark, replacing
from ssl_vit.data.transform import Normalization

_WIDTH_INCHES = 6.5  # text width of a paper, so that the font sizes below are what a reader gets
_MIN_CELL_PIXELS = 280  # a panel is enlarged by a whole factor to at least this width
_MARGIN_INCHES = 0.06
_GAP_INCHES = 0.05
_MOST_FOLDED = 6  # columns of several images side by side
_MIN_WIDTH_PIXELS = 1100  # of all panels together, so that few columns are not coarse
_LINE_INCHES = {"title": 0.21, "column": 0.19, "cell": 0.15, "scale": 0.17, "caption": 0.14}
_FONT_POINTS = {"title": 10, "column": 8.5, "cell": 7, "scale": 7, "caption": 7}
_CHARACTERS = {"title": 80, "caption": 120}  # that fit into the width


class Scale(NamedTuple):
    """What the colours of maps mean: one of matplotlib's maps, and words or numbers for its two ends."""

    name: str
    low: str
    high: str


def draw_grid(
    panels: Float[Tensor, "b v h w 3"],
    columns: Sequence[str],
    path: Path,
    *,
    title: str = "",
    caption: str = "",
    scale: Scale | None = None,
    cells: Sequence[Sequence[str]] | None = None,
) -> None:
    """Write RGB panels in [0, 1] as a figure: title above, the columns' names, a scale and a caption below.

    Where there are few columns, several images share a row, so that the figure is not much higher than wide.

    Args:
        cells: a short text below each panel, row by row, of one line or more.
        path: the file, PNG or WebP by its suffix; its folder is made where it does not exist.
    """
    if cells is None:
        panels, columns = _fold(panels, columns)
    save_figure(_figure(panels, columns, title, caption, scale, cells), path)


def enlarge(panels: Float[Tensor, "b v h w 3"]) -> Float[Tensor, "b v hh ww 3"]:
    """Each pixel as a square of pixels, so that what is drawn into a small image need not be coarse."""
    factor = math.ceil(_MIN_CELL_PIXELS / panels.shape[3])
    return repeat(panels, "b v h w c -> b v (h fh) (w fw) c", fh=factor, fw=factor)


def _fold(
    panels: Float[Tensor, "b v h w 3"], columns: Sequence[str]
) -> tuple[Float[Tensor, "rows vv h w 3"], Sequence[str]]:
    """Several images a row, as many in each as possible; what is missing in the last is white."""
    number = len(panels)
    num_rows = math.ceil(number / max(1, _MOST_FOLDED // len(columns)))
    side_by_side = math.ceil(number / num_rows)
    missing = num_rows * side_by_side - number
    padded = torch.cat([panels, torch.ones(missing, *panels.shape[1:])])
    return rearrange(padded, "(rows f) v h w c -> rows (f v) h w c", f=side_by_side), [*columns] * side_by_side


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or, with the suffix .webp, as WebP; the file is never there in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    webp = path.suffix == ".webp"
    mark(path.parent, path.name)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="webp" if webp else "png", pil_kwargs={"quality": 85} if webp else None)


def to_rgb(images: Float[Tensor, "b c h w"], normalization: Normalization) -> Float[Tensor, "b h w 3"]:
    """Normalised images as RGB in [0, 1]: of one or two channels the first, as grey; of more than three, three."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalization)
    pixels = (images * std + mean).clamp(0, 1)
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else repeat(pixels[:, :1], "b 1 h w -> b 3 h w")
    return rearrange(pixels, "b c h w -> b h w c")


def channel_caption(num_channels: int) -> list[str]:
    """What to say of the channels that `to_rgb` shows."""
    if num_channels == 2:
        return ["Channel 1 of 2 is shown."]
    if num_channels > 3:
        return [f"Channels 1 to 3 of {num_channels} are shown as red, green and blue."]
    return []


def _figure(
    panels: Float[Tensor, "b v h w 3"],
    columns: Sequence[str],
    title: str,
    caption: str,
    scale: Scale | None,
    cells: Sequence[Sequence[str]] | None,
) -> Figure:
    """Lay out panels pixel by pixel: every image pixel becomes a whole square of figure pixels."""
    num_columns, width = panels.shape[1], panels.shape[3]
    factor = math.ceil(max(_MIN_CELL_PIXELS, _MIN_WIDTH_PIXELS / num_columns) / width)
    cell_width = width * factor
    # The cells keep their size in pixels; what is left of the width goes to gaps and margins.
    dpi = num_columns * cell_width / (_WIDTH_INCHES - 2 * _MARGIN_INCHES - (num_columns - 1) * _GAP_INCHES)
    gap, margin = round(_GAP_INCHES * dpi), round(_MARGIN_INCHES * dpi)
    line = {name: round(inches * dpi) for name, inches in _LINE_INCHES.items()}
    below_cells = line["cell"] * max((text.count("\n") + 1 for texts in cells or () for text in texts), default=0)
    row_gap = gap + below_cells
    mosaic = _mosaic(panels, factor, gap, row_gap)
    title_lines = textwrap.wrap(title, _CHARACTERS["title"])
    caption_lines = textwrap.wrap(caption, _CHARACTERS["caption"])
    below_scale = 0 if scale is None else line["scale"] + gap
    above = margin + len(title_lines) * line["title"] + line["column"]
    below = margin + len(caption_lines) * line["caption"] + (gap if caption_lines else 0) + below_scale + below_cells
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
    for column, text in enumerate(columns):
        centre = margin + column * (cell_width + gap) + cell_width / 2
        write(text, "column", centre, above - line["column"] - 0.2 * gap, "center")
        for row, texts in enumerate(cells or ()):
            top = above + row * (panels.shape[2] * factor + row_gap) + panels.shape[2] * factor
            for i, text in enumerate(texts[column].split("\n")):
                write(text, "cell", centre, top + i * line["cell"], "center")
    bottom = above + mosaic.shape[0] + below_cells
    if scale is not None:
        bar_width, bar_height = round(1.6 * dpi), round(0.09 * dpi)
        colours = colormaps[scale.name](np.linspace(0, 1, bar_width))[None, :, :3].repeat(bar_height, axis=0)
        left, top = (total_width - bar_width) // 2, bottom + gap + (line["scale"] - bar_height) // 2
        figure.figimage(colours, xo=left, yo=total_height - top - bar_height, origin="upper")
        write(scale.low, "scale", left - gap, bottom + gap, "right")
        write(scale.high, "scale", left + bar_width + gap, bottom + gap, "left")
        bottom += below_scale
    for i, text in enumerate(caption_lines):
        write(text, "caption", margin, bottom + gap + i * line["caption"], "left")
    return figure


def _mosaic(panels: Float[Tensor, "b v h w 3"], factor: int, gap: int, row_gap: int) -> UInt8[Tensor, "rows columns 3"]:
    """Put panels side by side on white, each pixel enlarged `factor` times without interpolation."""
    cells = repeat(panels, "b v h w c -> b v (h fh) (w fw) c", fh=factor, fw=factor)
    cells = torch.nn.functional.pad(cells, (0, 0, 0, gap, 0, row_gap), value=1.0)
    mosaic = rearrange(cells, "b v h w c -> (b h) (v w) c")[: -row_gap or None, : -gap or None]
    return (mosaic * 255).round().to(torch.uint8)
