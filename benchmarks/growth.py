"""Draw the scores of docs/results.md against time and against the number of images, as its tables have them.

python -m benchmarks.growth docs/results.md docs/images/growth.webp
"""

import io
import re
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

PANELS = {"How long": ("images seen", "images seen in training"), "How many images": ("images", "images to learn from")}
"""Headings of the tables, each with the column to draw against and its title."""


def main(page: str, path: str) -> None:
    text = Path(page).read_text()
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (heading, (column, title)) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
        rows = read_table(text, heading)
        untrained = next(row for row in rows if "untrained" in row[next(iter(row))])
        runs = [row for row in rows if row is not untrained]
        for colour, kind in (("tab:blue", "k-NN"), ("tab:orange", "linear")):
            axes.axhline(number(untrained[kind]), color=colour, linestyle=":", linewidth=1)
            sizes = [number(row[column]) for row in runs]
            axes.plot(sizes, [number(row[kind]) for row in runs], "o-", color=colour, label=kind)
            lows, highs = zip(*(interval(row[kind]) for row in runs), strict=True)
            axes.fill_between(sizes, lows, highs, color=colour, alpha=0.2, linewidth=0)
        axes.set(xscale="log", xlabel=title)
        axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy on CIFAR-10, %")
    figure.axes[0].legend(title="dotted: untrained", loc="lower right")
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    Image.open(buffer).convert("RGB").save(path, lossless=True)


def read_table(text: str, heading: str) -> list[dict[str, str]]:
    """Rows of the first table below a heading, by the names of its columns."""
    lines = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].splitlines()
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|"))
    return [dict(zip(names, row, strict=True)) for row in rows]


def number(cell: str) -> float:
    """The first number of a cell."""
    return float(re.findall(r"\d[\d,]*\.?\d*", cell)[0].replace(",", ""))


def interval(cell: str) -> tuple[float, float]:
    """The bounds in a cell such as `49.6 [48.7, 50.6]`; the number itself where it has none."""
    found = re.search(r"\[(.+), (.+)\]", cell)
    return (float(found[1]), float(found[2])) if found else (number(cell), number(cell))


if __name__ == "__main__":
    main(*sys.argv[1:])
