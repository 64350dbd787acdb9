"""`--help` that fits a screen; `--help-all` lists every flag."""

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence

HELP = ("-h", "--help")
HELP_ALL = "--help-all"
COMMON = (
    "config",
    "data.source",
    "output_dir",
    "epochs",
    "steps",
    "encoder.arch",
    "encoder.image_size",
    "encoder.patch_size",
    "encoder.pretrained",
    "batch.size",
    "batch.per_device",
    "optim.base_lr",
    "data.label_column",
    "evaluation.test_source",
    "evaluation.every_steps",
    "checkpoint.every_steps",
    "seed",
    "fresh",
    "extend",
    "source",
    "test_source",
    "split",
    "test_split",
    "label_column",
    "feature",
    "ks",
    "image_size",
    "max_images",
    "baselines",
    "batch_size",
    "output",
)
"""Flags that `--help` shows where a script has them, in this order: what most people set."""


def answer_help(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Print the short help and end the process if `words` ask for it; else return the words for the parser."""
    if any(word in HELP for word in words):
        print(short_help(parser))
        sys.exit(0)
    return ["--help" if word == HELP_ALL else word for word in words]


def short_help(parser: argparse.ArgumentParser) -> str:
    """The common flags of a parser, each with the first sentence of its help and its default."""
    flags = {action.dest: action for action in parser._actions if action.option_strings}
    positional = [action for action in parser._actions if not action.option_strings]
    usage = " ".join([f"usage: {parser.prog}", *(action.dest.upper() for action in positional), "[--FLAG VALUE ...]"])
    lines = [usage, "", *(parser.description or "").strip().splitlines(), ""]
    for name in COMMON:
        if name in flags:
            lines += _row(f"--{name}", flags[name], parser.get_default(name))
    lines += _row("--print_config", None, "prints all settings as YAML") if "print_config" in flags else []
    return "\n".join([*lines, "", f"{HELP_ALL} lists all {len(flags) - 1} flags."])


def _row(flag: str, action: argparse.Action | None, default: object) -> Iterator[str]:
    told = " ".join((action.help or "").split()).partition(". ")[0].removesuffix(".") if action else default
    shown = f"{told}  [{default}]" if action and default not in (None, "", argparse.SUPPRESS) else f"{told}"
    for number, line in enumerate(textwrap.wrap(shown, 88)):
        yield f"  {flag if number == 0 else '':28}{line}"
