"""Measure ssl_vit beside its alternatives, and print a table; `--json FILE` keeps all of it.

python scripts/benchmark.py loader --data FOLDER        input of MAE and DINO, with cache and without, and the papers'
python scripts/benchmark.py memory                      DINO's head and loss beside the pairwise form
python scripts/benchmark.py memory --steps              whole training steps of MAE and DINO, ViT-S, B and L
python scripts/benchmark.py step dino --config FILE     a training step with fused and with plain attention
python scripts/benchmark.py step mae --peers            a training step beside transformers and lightly
python scripts/benchmark.py step mae --beside='FLAGS'   a training step beside the same with other settings
python scripts/benchmark.py objectives                  a training step of every objective, beside MAE's
python scripts/benchmark.py end_to_end mae --data FOLDER   a whole run, beside its step on images that are ready
python scripts/benchmark.py scaling dino --plot FILE       cost against image size, crops, batch, processes and data
python scripts/benchmark.py recipes LIST.yaml --minutes 5   scores of a list of settings at equal CPU time

Contenders are measured in turn, in rounds; a ratio is the median of the rounds' ratios, with the smallest and largest.
"""

import argparse
import importlib.util
import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ssl_vit.core.front import FlagParser, handle_signals, stoppable

if __name__ == "__main__":
    handle_signals()

sys.path.insert(0, str(Path(__file__).parents[1]))  # where benchmarks/ and scripts/ are

import ssl_vit
from benchmarks import end_to_end, loader, memory, objectives, recipes, scaling, step
from benchmarks.flags import at_least
from ssl_vit.core.privacy import without_secrets
from ssl_vit.core.text import plain
from ssl_vit.runs.provenance import git_revision, hardware, versions

# Each has HELP, `add_flags`, `measure` and `as_lines`; where settings of a run may follow, MORE; perhaps `check`.
COMMANDS: dict[str, Any] = {
    "loader": loader,
    "memory": memory,
    "step": step,
    "objectives": objectives,
    "end_to_end": end_to_end,
    "scaling": scaling,
    "recipes": recipes,
}


@stoppable()
def main() -> int:
    parser, parsers = _parsers()
    args, settings = parser.parse_known_args()
    if settings and not hasattr(COMMANDS[args.command], "MORE"):
        parsers[args.command].refuse(settings)
    if wrong := _wrong(args, settings):
        parsers[args.command].error(wrong)
    args.rounds = args.rounds or 5
    try:
        result = _measure(args, settings)
    except ValueError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 1
    result |= {
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": without_secrets(sys.orig_argv),
        "rounds": args.rounds,
        "versions": versions(("transformers", "lightly")),
        "git": git_revision(Path(ssl_vit.__file__).parent),
        "hardware": hardware(),
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(COMMANDS[args.command].as_lines(result)))
    print(f"{result['what']}; {', '.join(f'{key} {value}' for key, value in result['machine'].items())}")
    if getattr(args, "plot", None):
        scaling.draw(result, args.plot)
    return 0


def _parsers() -> tuple[FlagParser, dict[str, FlagParser]]:
    """The parser, and those of its commands."""
    parser = FlagParser(description=__doc__)
    # Before the command or after it.
    common = FlagParser(add_help=False)
    for one, missing in ((parser, None), (common, argparse.SUPPRESS)):
        one.add_argument("--json", type=Path, default=missing, help="write the whole result to this file as well")
        one.add_argument("--rounds", type=at_least(1), default=missing, help="alternating rounds (default: 5)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, benchmark in COMMANDS.items():
        what = benchmark.HELP
        description = f"{what[0].upper()}{what[1:]}. {getattr(benchmark, 'MORE', '')}"
        own = commands.add_parser(name, help=what, description=description, parents=[common])
        benchmark.add_flags(own)
    return parser, dict(commands.choices)


def _wrong(args: argparse.Namespace, settings: list[str]) -> str | None:
    """What is wrong with the flags, before anything is measured."""
    benchmark = COMMANDS[args.command]
    for flag in ("json", "plot"):
        path = getattr(args, flag, None)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            return f"--{flag} {path}: {'is a folder' if path.is_dir() else f'there is no folder {path.parent}'}"
    if hasattr(benchmark, "check") and (wrong := benchmark.check(args, settings)):
        return wrong
    if getattr(args, "peers", False):
        needed = ("lightly", "transformers") if args.command == "step" else ("lightly",)
        if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
            return f'--peers: {" and ".join(missing)} not installed; pip install -e ".[bench]"'
    return None


def _measure(args: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    return COMMANDS[args.command].measure(args, settings)


if __name__ == "__main__":
    sys.exit(main())
