"""Peak memory of DINO's head and loss, beside the loss in its pairwise form and lightly's."""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from benchmarks import step_memory
from benchmarks.flags import AS_WRITTEN, RUN_FLAGS, add_number, at_least
from benchmarks.peers import lightly_head_and_loss
from benchmarks.rounds import alternate, contender, machine, ratios
from benchmarks.step_memory import peak_of
from ssl_vit.core.front import FlagParser
from ssl_vit.objectives.heads import DINOHead
from ssl_vit.objectives.prototype_loss import dino_prototype_loss

HELP = "peak memory of DINO's head and loss, or of whole training steps"
MORE = f"With --steps: {RUN_FLAGS} {AS_WRITTEN}"
EMBED_DIM = 384  # ViT-S


def add_flags(parser: FlagParser) -> None:
    parser.add_switch("--peers", "head and loss beside lightly's (extra `bench`)")
    parser.add_switch("--steps", "whole training steps of MAE and DINO")
    archs = " ".join(step_memory.ARCHS)
    parser.add_argument("--archs", nargs="+", help=f"of --steps: timm names (default: {archs})")
    parser.add_argument("--batch", type=at_least(1), default=64, help="images at once (default: %(default)s)")
    add_number(parser, "--num_local_crops", 0, 8, "local crops of DINO")
    add_number(parser, "--num_prototypes", 2, 65536, "prototypes of DINO")


def check(args: argparse.Namespace, settings: list[str]) -> str | None:
    """What is wrong with the flags."""
    if settings and not args.steps:
        return f"{settings[0].partition('=')[0]}: no such flag without --steps"
    if args.steps and args.rounds is not None:
        return "--rounds: --steps has none"
    if args.archs and not args.steps:
        return "--archs: is of --steps"
    if args.steps and args.peers:
        return "--peers: not with --steps; `step --peers` measures whole steps beside others, memory too"
    return None


def measure(args: argparse.Namespace, settings: list[str]) -> dict:
    if args.steps:
        dino = [f"--objective.{name}={getattr(args, name)}" for name in ("num_prototypes", "num_local_crops")]
        configs = step_memory.configs_of(args.archs or step_memory.ARCHS, args.batch, settings, dino)
        return step_memory.memory_table(configs, args.batch, lambda row: print(f"done: {row}", file=sys.stderr))
    return compare_memory(
        batch=args.batch,
        num_local_crops=args.num_local_crops,
        num_prototypes=args.num_prototypes,
        rounds=args.rounds,
        peers=args.peers,
    )


def as_lines(result: dict) -> list[str]:
    """The result as a table."""
    if "step_memory" in result:
        return step_memory.as_lines(result)
    rates = {name: statistics.median(values) for name, values in result["rates"].items()}
    lines = [f"{name:10} {peak:8.0f} MiB {rates[name]:10.1f} images/s" for name, peak in result["peak_mib"].items()]
    return lines + [f"ssl_vit needs {share:.0%} of {name}'s" for name, share in result["share"].items()]


def pairwise_loss(
    student_logits: Float[Tensor, "s b k"], teacher_probs: Float[Tensor, "t b k"], temp: float = 0.1
) -> Float[Tensor, ""]:
    """The loss term by term: a log-softmax for each pair of views."""
    terms = [
        torch.sum(-probs * F.log_softmax(logits / temp, dim=-1), dim=-1).mean()
        for t, probs in enumerate(teacher_probs)
        for s, logits in enumerate(student_logits)
        if s != t
    ]
    return torch.stack(terms).mean()


def head_and_loss(
    kind: str, *, batch: int, num_local_crops: int, num_prototypes: int, device: str
) -> Callable[[], None]:
    """Forward and backward of head and loss on class tokens, teacher included, in fp32.

    Args:
        kind: ssl_vit | pairwise (the same head, its logits and the loss term by term) | lightly.
    """
    torch.manual_seed(0)
    views = 2 + num_local_crops
    features = torch.randn(views, batch, EMBED_DIM, device=device, requires_grad=True)
    if kind == "lightly":
        head_type, loss = lightly_head_and_loss(num_prototypes, device)
    else:
        head_type, loss = partial(DINOHead, num_prototypes=num_prototypes), None
    head = head_type(EMBED_DIM).to(device)
    teacher = head_type(EMBED_DIM).to(device).requires_grad_(False)

    def step() -> None:
        with torch.no_grad():
            logits = teacher(features[:2].flatten(0, 1)).unflatten(0, (2, batch))
        if loss is not None:
            value = loss(list(logits), list(head(features.flatten(0, 1)).chunk(views)), teacher_temp=0.04)
        elif kind == "pairwise":
            value = pairwise_loss(head(features), (logits / 0.04).softmax(dim=-1))
        else:
            bottleneck, prototypes = head(features, as_factors=True)
            value = dino_prototype_loss(bottleneck, prototypes, (logits / 0.04).softmax(dim=-1))
        value.backward()

    return step


def compare_memory(
    *, batch: int = 64, num_local_crops: int = 8, num_prototypes: int = 65536, rounds: int = 3, peers: bool = False
) -> dict:
    """Peak memory and rate of head and loss in each kind, alternating.

    Args:
        peers: lightly's too.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = {
        kind: head_and_loss(
            kind, batch=batch, num_local_crops=num_local_crops, num_prototypes=num_prototypes, device=device
        )
        for kind in ("pairwise", "ssl_vit", *(["lightly"] if peers else []))
    }

    rates = alternate({kind: contender(step, batch) for kind, step in steps.items()}, rounds)
    peaks = {kind: peak_of(step, torch.device(device)) for kind, step in steps.items()}
    return {
        "what": f"head and loss at batch {batch}, 2 + {num_local_crops} crops, {num_prototypes:,} prototypes, fp32",
        "peak_mib": peaks,
        "share": {kind: peaks["ssl_vit"] / peak for kind, peak in peaks.items() if kind != "ssl_vit"},
        "rates": rates,
        "ratios": {name: vars(ratio) for name, ratio in ratios(rates, "pairwise").items()},
        "machine": machine(),
    }
