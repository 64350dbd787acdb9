"""What the flags of several benchmarks share."""

import argparse
import importlib
from collections.abc import Callable

from ssl_vit.training.config import RunConfig

RUN_FLAGS = "Any flag of the objective's training script may follow, such as --config, --encoder.arch, --batch.size."
AS_WRITTEN = "Blocks run as they are written, unless --compile true or --cuda_graphs true says otherwise."


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number of at least `least`."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is too few; at least {least}")
        return value

    number.__name__ = "int"  # what argparse calls it where the text is none
    return number


def add_number(parser: argparse.ArgumentParser, flag: str, least: int, default: int, what: str) -> None:
    """Add a flag for a whole number of at least `least`."""
    parser.add_argument(flag, type=at_least(least), default=default, help=f"{what} (default: %(default)s)")


def add_objective(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("objective", choices=("mae", "dino", "dinov2"))


def defaults_of(objective: str) -> RunConfig:
    """The defaults of an objective's training script."""
    return importlib.import_module(f"scripts.pretrain_{objective}").DEFAULTS
