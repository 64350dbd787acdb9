"""A training step of every objective beside MAE's, on the same images and, where they share one, the same backbone."""

import argparse
import shlex
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.flags import add_number, defaults_of
from benchmarks.rounds import alternate, contender, machine, ratio_lines, ratios
from benchmarks.step import count_flops
from ssl_vit.core.front import FlagParser
from ssl_vit.data.transform import InputSpec
from ssl_vit.training.config import RunConfig, parse_run
from ssl_vit.training.step import prepare_step

HELP = "a training step of every objective, beside MAE's"
MORE = "Any flag of all training scripts may follow, such as --encoder.image_size or --precision."
# Name -> training script and flags: the papers' crops, heads and mask ratios at 224 pixels.
_VIT = "--encoder.arch=vit_small_patch16_224"
_CONVNEXT = "--encoder.arch=convnextv2_tiny"
_PROTOTYPES = "--objective.num_prototypes=65536"
STEPS: dict[str, tuple[str, str]] = {
    "MAE": ("mae", f"{_VIT} --encoder.pos_embed=sincos"),
    "SimMIM": ("simmim", f"{_VIT} --encoder.image_size=224"),
    "DINO": ("dino", f"{_VIT} {_PROTOTYPES}"),
    "SimDINO": ("dino", f"{_VIT} --objective.loss=coding_rate"),
    "DINOv2": ("dinov2", f"{_VIT} {_PROTOTYPES}"),
    "SimDINOv2": ("dinov2", f"{_VIT} --objective.loss=coding_rate"),
    "LeJEPA": ("lejepa", _VIT),
    "SimMIM, ConvNeXt V2-T": ("simmim", f"{_CONVNEXT} --encoder.image_size=224"),
    "FCMAE, ConvNeXt V2-T": ("fcmae", _CONVNEXT),
}


def add_flags(parser: FlagParser) -> None:
    add_number(parser, "--batch", 1, 4, "images of a step")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="NAME", help=f"some of: {', '.join(STEPS)}")


def measure(args: argparse.Namespace, settings: list[str]) -> dict:
    names = dict.fromkeys(["MAE", *(args.only or STEPS)])
    configs = {}
    for name in names:
        script, flags = STEPS[name]
        words = [*shlex.split(flags), "--precision=no", "--data.source=x", *settings]
        configs[name], _ = parse_run(defaults_of(script), words).resolve(1_281_167)
    return compare_objectives(configs, batch=args.batch, rounds=args.rounds)


def as_lines(result: dict) -> list[str]:
    """The result as a table: rates, and how much longer a step takes than MAE's."""
    lines = ratio_lines(result)
    return [
        f"{line}   {result['gflop_per_image'][name]:6.1f} GFLOP"
        for name, line in zip(result["rates"], lines, strict=True)
    ]


def compare_objectives(configs: Mapping[str, RunConfig], *, batch: int, rounds: int) -> dict[str, Any]:
    """Images per second of whole training steps, on noise that has been cropped, masked and normalised beforehand.

    On a CPU the seconds are the process's own, which others on the machine do not lengthen.

    Args:
        configs: settings by name, without `auto`; the first is what the others are compared with.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = {name: _step(config, batch, device) for name, config in configs.items()}
    flops: dict[str, float] = {}

    def take(name: str) -> None:
        """The first step, before the rounds, is one whose operations are counted."""
        if name in flops:
            steps[name]()
        else:
            flops[name] = count_flops(steps[name]) / batch / 1e9

    clock = time.perf_counter if device.type == "cuda" else time.process_time
    rates = alternate({name: contender(partial(take, name), batch) for name in steps}, rounds, clock)
    first = next(iter(rates))
    times = {name: [1 / rate for rate in values] for name, values in rates.items()}
    return {
        "what": f"a training step of {batch} images, and how many times {first}'s it takes",
        "rates": rates,
        "seconds_per_image": {name: statistics.median(values) for name, values in times.items()},
        "ratios": {name: vars(ratio) for name, ratio in ratios(times, first).items()},
        "gflop_per_image": flops,
        "machine": machine(),
    }


def _step(config: RunConfig, batch: int, device: torch.device) -> Callable[[], None]:
    objective = config.build_objective().to(device)
    encoder = objective.encoder
    spec = InputSpec(encoder.image_size, encoder.stride, config.data.normalization)
    transform, rng = config.objective.build_transform(spec), np.random.default_rng(0)
    samples = [
        transform(torch.from_numpy(rng.integers(0, 256, (encoder.in_chans, 256, 256), dtype=np.uint8)), rng)
        for _ in range(batch)
    ]
    images = transform.on_device({name: torch.stack([each[name] for each in samples]) for name in samples[0]}, device)
    step = prepare_step(config, objective, lambda: images, device, "no" if config.precision == "no" else None)

    def whole() -> None:
        step.forward_backward()
        step.update()

    return whole
