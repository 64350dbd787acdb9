"""Measure ssl_vit beside its alternatives, in alternating rounds of one run, and print a table and JSON.

python scripts/benchmark.py loader --data FOLDER        input of MAE and DINO, with cache and without, and the papers'
python scripts/benchmark.py memory                      DINO's head and loss beside the pairwise form
python scripts/benchmark.py memory --steps              whole training steps of MAE and DINO, ViT-S, B and L
python scripts/benchmark.py step dino --config FILE     a training step with fused and with plain attention
python scripts/benchmark.py step mae --peers            a training step beside transformers and lightly
python scripts/benchmark.py end_to_end mae --data FOLDER   a whole run, beside its step on images that are ready
python scripts/benchmark.py scaling dino --plot FILE       cost against image size, crops, batch, processes and data
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch

from ssl_vit.benchmarks import end_to_end, scaling, step_memory
from ssl_vit.benchmarks.loader import compare_loader
from ssl_vit.benchmarks.memory import compare_memory
from ssl_vit.benchmarks.step import compare_attention, compare_peers
from ssl_vit.config import RunConfig, parse_run

AXES = ("image_size", "local_crops", "batch", "processes", "data")
# What `scaling` begins with; settings that are given win.
SMALL_BASE = ["--encoder.arch=vit_tiny_patch16_224", "--encoder.image_size=96", "--batch.size=8"]
STEP_ARCHS = [f"vit_{size}_patch16_224" for size in ("small", "base", "large")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    commands = parser.add_subparsers(dest="command", required=True)
    loader = commands.add_parser("loader")
    loader.add_argument("--data", required=True, help="a folder of images")
    loader.add_argument("--num_images", type=int, default=64, help="images of a round")
    loader.add_argument("--num_local_crops", type=int, default=8)
    memory = commands.add_parser("memory")
    memory.add_argument("--peers", action="store_true", help="beside lightly (extra `bench`)")
    memory.add_argument("--steps", action="store_true", help="whole training steps of MAE and DINO")
    memory.add_argument("--archs", nargs="+", default=STEP_ARCHS, help="of --steps: timm names")
    memory.add_argument("--batch", type=int, default=64)
    memory.add_argument("--num_local_crops", type=int, default=8)
    memory.add_argument("--num_prototypes", type=int, default=65536)
    step = commands.add_parser("step")
    step.add_argument("objective", choices=("mae", "dino", "dinov2"))
    step.add_argument("--peers", action="store_true", help="beside other libraries (extra `bench`)")
    step.add_argument("--steps_per_round", type=int, default=3, help="steps of a round")
    step.add_argument("--kinds", nargs="+", choices=("fp32", "bf16"), help="precisions beside peers; by itself both")
    step.add_argument("--num_samples", type=int, default=100_000, help="images that settings of `auto` follow from")
    whole = commands.add_parser("end_to_end")
    whole.add_argument("objective", choices=("mae", "dino", "dinov2"))
    whole.add_argument("--data", required=True, help="the images, as data.source takes them")
    whole.add_argument("--archs", nargs="+", default=[], help="timm names, one run each")
    whole.add_argument("--cache", action="store_true", help="each run with pictures decoded beforehand as well")
    whole.add_argument("--steps_per_round", type=int, help="steps of a round; by itself as many as workers need")
    growth = commands.add_parser("scaling")
    growth.add_argument("objective", choices=("mae", "dino", "dinov2"))
    growth.add_argument("--axes", nargs="+", choices=AXES, help="by themselves all that the objective has")
    growth.add_argument("--plot", type=Path, help="draw them in this file (.png or .webp)")
    growth.add_argument("--steps_per_round", type=int, default=2, help="steps of a round")
    growth.add_argument("--process_counts", type=int, nargs="+", default=[1, 2])
    growth.add_argument("--process_steps", type=int, default=20, help="steps that are measured in processes")
    growth.add_argument("--rows", type=int, nargs="+", default=scaling.ROWS, help="of the axis data")
    args, settings = parser.parse_known_args()
    takes_settings = args.command in ("step", "end_to_end", "scaling") or (args.command == "memory" and args.steps)
    if settings and not takes_settings:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    try:
        result = _measure(args, settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "share" in result:
        for name, peak in result["peak_mib"].items():
            print(f"{name:10} {peak:8.0f} MiB {_median(result['rates'][name]):10.1f} images/s")
        for name, share in result["share"].items():
            print(f"ssl_vit needs {share:.0%} of {name}'s")
    elif args.command == "scaling":
        print("\n".join(scaling.as_lines(result)))
        if args.plot:
            scaling.draw(result, args.plot)
    elif "step_memory" in result:
        print("\n".join(step_memory.as_lines(result)))
    elif args.command == "end_to_end":
        print("\n".join(end_to_end.as_lines(result)))
    elif "ratios_to" in result:
        _print_peers(result)
    else:
        for name, rates in result["rates"].items():
            ratio = result["ratios"][name]
            spread = f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
            print(f"{name:36} {_median(rates):8.1f} images/s   {spread}")
    print(f"{result['what']}; {', '.join(f'{key} {value}' for key, value in result['machine'].items())}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _measure(args: argparse.Namespace, settings: list[str]) -> dict:
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
    config, _ = parse_run(defaults, settings).resolve(args.num_samples)
    if args.peers:
        return compare_peers(config, steps=args.steps_per_round, rounds=args.rounds, kinds=args.kinds)
    return compare_attention(config, steps=args.steps_per_round, rounds=args.rounds)


def _defaults(objective: str) -> RunConfig:
    sys.path.insert(0, str(Path(__file__).parents[1]))
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
        for arch in args.archs
    }


def _scaling(args: argparse.Namespace, defaults: RunConfig, settings: list[str]) -> dict:
    if args.objective != "mae":
        settings = ["--objective.local_crop_size=48", *settings]
    config, _ = parse_run(defaults, settings).resolve(100_000)
    by_axis = {
        "image_size": lambda: scaling.scale_image_size(config, args.steps_per_round, args.rounds),
        "local_crops": lambda: scaling.scale_local_crops(config, args.steps_per_round, args.rounds),
        "batch": lambda: scaling.scale_batch(config, args.steps_per_round, args.rounds),
        "processes": lambda: scaling.scale_processes(args.objective, settings, args.process_counts, args.process_steps),
        "data": lambda: scaling.scale_data(config, args.rows),
    }
    axes = args.axes or [axis for axis in AXES if axis != "local_crops" or args.objective != "mae"]
    return scaling.as_result(config, [by_axis[axis]() for axis in axes])


def _print_peers(result: dict) -> None:
    print(f"{'':38} images/s   peak MiB   GFLOP/image    MFU")
    for name, rates in result["rates"].items():
        print(
            f"{name:38} {_median(rates):8.2f} {result['peak_mib'][name]:10.0f} {result['gflop_per_image'][name]:13.1f}"
            f" {result['mfu'][name]:6.0%}"
        )
    for peer, found in result["ratios_to"].items():
        for name, ratio in found.items():
            print(f"{name} over {peer}: {ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]")


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    sys.exit(main())
