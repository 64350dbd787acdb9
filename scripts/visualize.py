"""Draw what a backbone has learned about any images, at any time.

python scripts/visualize.py RUN --open_source true                   all it can show, about what it was trained on
python scripts/visualize.py RUN a.jpg b.jpg --what attention pca     about your own images, or about a source
python scripts/visualize.py RUN my_images --what reconstructions --mask_ratios 0.5 0.75 0.9 --mask random block
python scripts/visualize.py RUN my_images --what neighbours --gallery my_images
python scripts/visualize.py film RUN                                 pictures/film.gif of those drawn in training

RUN may be an export, a checkpoint or published weights too. Attention and similarity start from the patch in the
middle, unless --patches says otherwise: patches are numbered row by row, from 0.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ssl_vit.core.front import FlagParser, handle_signals, stoppable

if __name__ == "__main__":
    handle_signals()

from ssl_vit.visualize.command import WHAT, film, visualize


@stoppable()
def main(args: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if args is None else args)
    if words[:1] == ["film"]:
        return film(_film_parser().parse_args(words[1:]))
    return visualize(_parser().parse_args(words))


def _parser() -> FlagParser:
    parser = FlagParser(description=__doc__)
    parser.add_argument("path", type=Path, help="folder of a run, of a checkpoint or an export; or published weights")
    parser.add_argument("images", nargs="*", help="image files, or one source")
    parser.add_argument("--data.source", dest="source", metavar="SOURCE", help="one source")
    parser.add_open_source()
    parser.add_argument("--what", nargs="+", choices=WHAT, help="what to draw [all but neighbours]")
    parser.add_argument("--out", "--output", dest="out", type=Path, help="folder for the figures [PATH/pictures]")
    parser.add_argument("--format", choices=("png", "webp"), default="png", help="[png]")
    parser.add_argument("--num_images", type=_positive, default=6, help="images of a source [6]")
    parser.add_argument("--image_size", type=_positive, nargs="+", metavar="N", help="one number, or height and width")
    parser.add_argument("--seed", type=int, default=0, help="draws images and masks [0]")
    parser.add_argument("--weights", help="teacher (default) or student of DINO and DINOv2; best; average-last-K")
    parser.add_argument("--layer", type=int, default=-1, help="block whose attention is shown, from 0 [-1, the last]")
    parser.add_argument("--mass", type=float, default=0.6, help="share of the attention that the overlay keeps [0.6]")
    parser.add_argument("--patches", type=int, nargs="+", metavar="P", help="patches to start from [the middle one]")
    parser.add_switch("--foreground", "also fit the components to the foreground alone")
    parser.add_argument("--mask_ratios", type=float, nargs="+", default=[0.5, 0.75, 0.9], help="[0.5 0.75 0.9]")
    parser.add_argument("--mask", nargs="+", choices=("random", "block"), default=["random"], help="[random]")
    parser.add_argument(
        "--hide", nargs="+", metavar="P", help="patches to remove, such as 3 or 16-31, instead of these"
    )
    parser.add_argument("--gallery", help="source in which neighbours are looked for")
    parser.add_argument("--gallery_size", type=_positive, default=2000, help="most images of the gallery [2000]")
    return parser


def _film_parser() -> FlagParser:
    parser = FlagParser(prog="visualize.py film", description="A film of what was drawn in training.")
    parser.add_argument("path", type=Path, help="folder of a run with --evaluation.pictures_every_steps")
    parser.add_argument(
        "--out", "--output", dest="out", type=Path, help=".gif or .webp, or .png for a strip [PATH/pictures/film.gif]"
    )
    parser.add_argument("--seconds", type=float, default=0.4, help="for which each figure is shown [0.4]")
    parser.add_argument("--width", type=_positive, default=900, help="in pixels [900]")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
