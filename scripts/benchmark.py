"""Measure ssl_vit beside its alternatives, and print a table; `--json FILE` keeps all of it.

python scripts/benchmark.py loader --data FOLDER        input of MAE and DINO, with cache and without, and the papers'
python scripts/benchmark.py memory                      DINO's head and loss beside the pairwise form
python scripts/benchmark.py memory --steps              whole training steps of MAE and DINO, ViT-S, B and L
python scripts/benchmark.py step dino --config FILE     a training step with fused and with plain attention
python scripts/benchmark.py step mae --peers            a training step beside transformers and lightly
python scripts/benchmark.py step mae --beside='FLAGS'   a training step beside the same with other settings
python scripts/benchmark.py end_to_end mae --data FOLDER   a whole run, beside its step on images that are ready
python scripts/benchmark.py scaling dino --plot FILE       cost against image size, crops, batch, processes and data

Contenders are measured in turn, in rounds; a ratio is the median of the rounds' ratios, with the smallest and largest.
"""

import argparse
import importlib
import importlib.util
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ssl_vit.core.front import heed_signals, stoppable

if __name__ == "__main__":
    heed_signals()

sys.path.insert(0, str(Path(__file__).parents[1]))  # where benchmarks/ and scripts/ are

import torch

import ssl_vit
from benchmarks import end_to_end, scaling, step_memory
from benchmarks.loader import compare_loader
from benchmarks.memory import compare_memory
from benchmarks.step import compare_attention, compare_steps
from ssl_vit.core.privacy import without_secrets
from ssl_vit.core.text import plain
from ssl_vit.runs.provenance import git_revision, hardware, versions
from ssl_vit.training.config import RunConfig, parse_run

AXES = ("image_size", "local_crops", "batch", "processes", "data")
PLOTS = (".png", ".webp", ".svg", ".pdf")
# What `scaling` begins with; settings that are given win.
SMALL_BASE = ["--encoder.arch=vit_tiny_patch16_224", "--encoder.image_size=96", "--batch.size=8"]
STEP_ARCHS = [f"vit_{size}_patch16_224" for size in ("small", "base", "large")]
RUN_FLAGS = "Any flag of the objective's training script may follow, such as --config, --encoder.arch, --batch.size."
AS_WRITTEN = "Blocks run as they are written, unless --compile true or --cuda_graphs true says otherwise."


@stoppable()
def main() -> int:
    parser, commands = _parsers()
    args, settings = parser.parse_known_args()
    command = commands[args.command]
    _check(args, settings, command)
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
    print("\n".join(_lines(args, result)))
    print(f"{result['what']}; {', '.join(f'{key} {value}' for key, value in result['machine'].items())}")
    if args.command == "scaling" and args.plot:
        scaling.draw(result, args.plot)
    return 0


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of its commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    # Before the command or after it.
    common = argparse.ArgumentParser(add_help=False)
    for one, missing in ((parser, None), (common, argparse.SUPPRESS)):
        one.add_argument("--json", type=Path, default=missing, help="write the whole result to this file as well")
        one.add_argument("--rounds", type=_at_least(1), default=missing, help="alternating rounds (default: 5)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, what: str, more: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}. {more}",
            parents=[common],
            allow_abbrev=False,
        )

    loader = add("loader", "images per second and core of the input of MAE and DINO, beside the papers' in Pillow")
    loader.add_argument("--data", required=True, help="a folder of images")
    loader.add_argument("--num_images", type=_at_least(1), default=64, help="images of a round (default: %(default)s)")
    loader.add_argument(
        "--num_local_crops", type=_at_least(0), default=8, help="local crops of DINO (default: %(default)s)"
    )

    memory = add(
        "memory",
        "peak memory of DINO's head and loss, or of whole training steps",
        f"With --steps: {RUN_FLAGS} {AS_WRITTEN}",
    )
    memory.add_argument("--peers", action="store_true", help="head and loss beside lightly's (extra `bench`)")
    memory.add_argument("--steps", action="store_true", help="whole training steps of MAE and DINO")
    memory.add_argument("--archs", nargs="+", help=f"of --steps: timm names (default: {' '.join(STEP_ARCHS)})")
    memory.add_argument("--batch", type=_at_least(1), default=64, help="images at once (default: %(default)s)")
    memory.add_argument(
        "--num_local_crops", type=_at_least(0), default=8, help="local crops of DINO (default: %(default)s)"
    )
    memory.add_argument(
        "--num_prototypes", type=_at_least(2), default=65536, help="prototypes of DINO (default: %(default)s)"
    )

    step = add(
        "step",
        "images per second of a training step with fused and plain attention, or beside other steps",
        f"{RUN_FLAGS} Beside others a step is measured as written and, where that is what `auto` does, compiled; with "
        "--cuda_graphs true also recorded.",
    )
    step.add_argument("objective", choices=("mae", "dino", "dinov2"))
    step.add_argument("--peers", action="store_true", help="beside other libraries' (extra `bench`)")
    step.add_argument(
        "--beside",
        action="append",
        metavar="FLAGS",
        default=[],
        help="beside ours with more settings, as --beside='--FLAG ...'; may be given several times",
    )
    step.add_argument("--steps_per_round", type=_at_least(1), default=3, help="steps of a round (default: %(default)s)")
    step.add_argument(
        "--kinds", nargs="+", choices=("fp32", "bf16"), help="precisions (default: fp32, and bf16 if it is the run's)"
    )
    step.add_argument(
        "--num_samples",
        type=_at_least(1),
        default=100_000,
        help="images that `auto` follows from (default: %(default)s)",
    )

    whole = add("end_to_end", "images per second and data wait of a run, beside its step without input", RUN_FLAGS)
    whole.add_argument("objective", choices=("mae", "dino", "dinov2"))
    whole.add_argument("--data", required=True, help="the images, as data.source takes them")
    whole.add_argument("--archs", nargs="+", default=[], help="timm names, one run each (default: encoder.arch)")
    whole.add_argument("--cache", action="store_true", help="each run with pictures decoded beforehand as well")
    whole.add_argument(
        "--steps_per_round", type=_at_least(1), help="steps of a round (default: enough for the loader's workers)"
    )

    growth = add("scaling", "what a step, more processes and more data cost", f"{RUN_FLAGS} {AS_WRITTEN}")
    growth.add_argument("objective", choices=("mae", "dino", "dinov2"))
    growth.add_argument("--axes", nargs="+", choices=AXES, help="which (default: all that the objective has)")
    growth.add_argument("--plot", type=Path, help=f"draw them in this file ({', '.join(PLOTS)})")
    growth.add_argument(
        "--steps_per_round", type=_at_least(1), default=2, help="steps of a round (default: %(default)s)"
    )
    growth.add_argument(
        "--process_counts", type=_at_least(1), nargs="+", default=[1, 2], help="of the axis processes (default: 1 2)"
    )
    growth.add_argument(
        "--process_steps",
        type=_at_least(1),
        default=20,
        help="of the axis processes: steps measured (default: %(default)s)",
    )
    growth.add_argument(
        "--rows",
        type=_at_least(1),
        nargs="+",
        default=list(scaling.ROWS),
        help="of the axis data (default: 1000 to a million)",
    )
    return parser, dict(commands.choices)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is too few; at least {least}")
        return value

    number.__name__ = "int"  # what argparse calls it where the text is none
    return number


def _check(args: argparse.Namespace, settings: list[str], command: argparse.ArgumentParser) -> None:
    """End with what is wrong before anything is measured."""
    of_steps = args.command == "memory" and args.steps
    if settings and not (of_steps or args.command in ("step", "end_to_end", "scaling")):
        command.error(f"unrecognized arguments: {' '.join(settings)}")
    if args.rounds is not None and of_steps:
        command.error("--rounds: --steps has none")
    args.rounds = args.rounds or 5
    for flag in ("json", "plot"):
        path = getattr(args, flag, None)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            command.error(f"--{flag} {path}: {'is a folder' if path.is_dir() else f'there is no folder {path.parent}'}")
    if getattr(args, "plot", None) and args.plot.suffix not in PLOTS:
        command.error(f"--plot {args.plot}: ends in none of {', '.join(PLOTS)}")
    if args.command == "memory" and not args.steps and args.archs:
        command.error("--archs: is of --steps")
    if of_steps and args.peers:
        command.error("--peers: not with --steps; `step --peers` measures whole steps beside others, memory too")
    if args.command == "step" and args.kinds and not (args.peers or args.beside):
        command.error("--kinds: is of --peers and --beside")
    if getattr(args, "peers", False):
        needed = ("lightly", "transformers") if args.command == "step" else ("lightly",)
        if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
            command.error(f'--peers: {" and ".join(missing)} not installed; pip install -e ".[bench]"')


def _measure(args: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    if args.command == "loader":
        torch.set_num_threads(1)  # rates are those of one core
        return compare_loader(
            args.data, num_images=args.num_images, num_local_crops=args.num_local_crops, rounds=args.rounds
        )
    if args.command == "memory" and args.steps:
        return step_memory.memory_table(
            _step_configs(args, settings), args.batch, lambda row: print(f"done: {row}", file=sys.stderr)
        )
    if args.command == "memory":
        return compare_memory(
            batch=args.batch,
            num_local_crops=args.num_local_crops,
            num_prototypes=args.num_prototypes,
            rounds=args.rounds,
            peers=args.peers,
        )
    defaults = _defaults(args.objective)
    if args.command == "end_to_end":
        config = parse_run(defaults, [*settings, f"--data.source={args.data}"])
        return end_to_end.compare_end_to_end(
            config, archs=args.archs, cache=args.cache, steps=args.steps_per_round, rounds=args.rounds
        )
    if args.command == "scaling":
        return _scaling(args, defaults, [*SMALL_BASE, *settings])
    config, *beside = (
        parse_run(defaults, [*settings, *shlex.split(more)]).resolve(args.num_samples)[0] for more in ["", *args.beside]
    )
    if not (args.peers or beside):
        return compare_attention(config, steps=args.steps_per_round, rounds=args.rounds)
    return compare_steps(
        config,
        peers=args.peers,
        beside=dict(zip(args.beside, beside, strict=True)),
        steps=args.steps_per_round,
        rounds=args.rounds,
        kinds=args.kinds,
    )


def _defaults(objective: str) -> RunConfig:
    return importlib.import_module(f"scripts.pretrain_{objective}").DEFAULTS


def _step_configs(args: argparse.Namespace, settings: list[str]) -> dict[str, RunConfig]:
    own = {
        "mae": [],
        "dino": [
            f"--objective.num_prototypes={args.num_prototypes}",
            f"--objective.num_local_crops={args.num_local_crops}",
        ],
    }
    return {
        f"{objective} {arch}": parse_run(
            _defaults(objective), [f"--encoder.arch={arch}", f"--batch.size={args.batch}", *flags, *settings]
        ).resolve(100_000)[0]
        for objective, flags in own.items()
        for arch in args.archs or STEP_ARCHS
    }


def _scaling(args: argparse.Namespace, defaults: RunConfig, settings: list[str]) -> dict:
    if args.objective != "mae":
        settings = ["--objective.local_crop_size=48", *settings]
    config, _ = parse_run(defaults, settings).resolve(100_000)
    by_axis = {
        "image_size": lambda: scaling.scale_image_size(config, args.steps_per_round, args.rounds),
        "local_crops": lambda: scaling.scale_local_crops(config, args.steps_per_round, args.rounds),
        "batch": lambda: scaling.scale_batch(config, args.steps_per_round, args.rounds),
        "processes": lambda: scaling.scale_processes(
            args.objective, settings, args.process_counts, args.process_steps, args.rounds
        ),
        "data": lambda: scaling.scale_data(config, args.rows),
    }
    axes = args.axes or [axis for axis in AXES if axis != "local_crops" or args.objective != "mae"]
    return scaling.as_result(config, [by_axis[axis]() for axis in axes])


def _lines(args: argparse.Namespace, result: dict[str, Any]) -> list[str]:
    """The result as a table."""
    if args.command == "scaling":
        return scaling.as_lines(result)
    if args.command == "end_to_end":
        return end_to_end.as_lines(result)
    if "step_memory" in result:
        return step_memory.as_lines(result)
    median = {name: statistics.median(rates) for name, rates in result["rates"].items()}
    if "share" in result:
        lines = [
            f"{name:10} {peak:8.0f} MiB {median[name]:10.1f} images/s" for name, peak in result["peak_mib"].items()
        ]
        return lines + [f"ssl_vit needs {share:.0%} of {name}'s" for name, share in result["share"].items()]
    if "ratios_to" not in result:
        return [f"{name:36} {rate:8.1f} images/s   {_ratio(result['ratios'][name])}" for name, rate in median.items()]
    width = max(map(len, median))
    lines = [f"{'':{width}} images/s   peak MiB   GFLOP/image    MFU"]
    for name, rate in median.items():
        lines.append(
            f"{name:{width}} {rate:8.2f} {result['peak_mib'][name]:10.0f} {result['gflop_per_image'][name]:13.1f}"
            f" {result['mfu'][name]:6.0%}"
        )
    for base, found in result["ratios_to"].items():
        lines += [f"{name} over {base}: {_ratio(ratio)}" for name, ratio in found.items()]
    return lines


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"


if __name__ == "__main__":
    sys.exit(main())
