"""Shows the figures of a run in their order: as a GIF or WebP film, or as a strip."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ssl_vit.core.reading import MAX_FIGURE, read_bytes
from ssl_vit.core.writing import mark, replacing
from ssl_vit.runs.folder import PICTURES_FOLDER
from ssl_vit.runs.record import Frame, list_frames

_HOLD = 5  # times as long as the others that the last figure stays
_MOST_SECONDS = 130  # for which a GIF can show a figure, the last one so many times as long
_HEADER = 28  # pixels for the number of the step


def write_film(run: Path, out: Path, *, seconds: float = 0.4, width: int = 900, most: int = 60) -> int:
    """Write the figures of a run as a film (.gif or .webp), or up to six of them below each other (.png).

    Args:
        seconds: for which each figure is shown.
        width: of the film in pixels.
        most: figures at most, spread evenly.

    Returns:
        The number of figures that it shows.

    Raises:
        ValueError: the run has no figures, the suffix is none of these, or a film cannot show a figure for so long.
    """
    frames = list_frames(run)
    if not frames:
        raise ValueError(
            f"{run}: holds no {PICTURES_FOLDER}/step-*.webp; train with --evaluation.pictures_every_steps N to get them"
        )
    if out.suffix not in (".gif", ".webp", ".png"):
        raise ValueError(f"--out {out}: name a .gif or .webp for a film, or a .png for a strip")
    if not 0 < seconds <= _MOST_SECONDS:
        raise ValueError(f"--seconds {seconds:g}: must be above 0 and at most {_MOST_SECONDS}")
    chosen = spread(frames, 6 if out.suffix == ".png" else most)
    pages = [_with_step(item, width) for item in chosen]
    out.parent.mkdir(parents=True, exist_ok=True)
    mark(out.parent, out.name)
    if out.suffix == ".png":
        strip = Image.new("RGB", (width, sum(page.height for page in pages)), "white")
        top = 0
        for page in pages:
            strip.paste(page, (0, top))
            top += page.height
        with replacing(out) as unfinished:
            strip.save(unfinished)
        return len(pages)
    durations = [round(1000 * seconds)] * len(pages)
    durations[-1] *= _HOLD
    with replacing(out) as unfinished:
        pages[0].save(unfinished, save_all=True, append_images=pages[1:], duration=durations, loop=0)
    return len(pages)


def spread(frames: Sequence[Frame], most: int) -> list[Frame]:
    """At most so many, evenly, the first and the last among them."""
    if len(frames) <= most:
        return list(frames)
    return [frames[round(place * (len(frames) - 1) / (most - 1))] for place in range(most)]


def open_figure(path: Path) -> Image.Image:
    """A figure that a run drew, and no other image: what is shown of it may be passed on.

    Raises:
        ValueError: it is a link, no WebP or PNG, or cannot be read.
    """
    try:
        return Image.open(io.BytesIO(read_bytes(path, MAX_FIGURE)), formats=["WEBP", "PNG"])
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or 'is no WebP or PNG'}") from error


def _with_step(frame: Frame, width: int) -> Image.Image:
    with open_figure(frame.path) as figure:
        height = round(figure.height * width / figure.width)
        small = figure.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    page = Image.new("RGB", (width, height + _HEADER), "white")
    page.paste(small, (0, _HEADER))
    ImageDraw.Draw(page).text(
        (10, _HEADER / 2), f"step {frame.step:,}", fill="black", font=ImageFont.load_default(15), anchor="lm"
    )
    return page
