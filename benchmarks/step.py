"""A training step beside its alternatives, on this device, in the settings of a config."""

import argparse
import shlex
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.flags import RUN_FLAGS, add_number, add_objective, defaults_of
from benchmarks.peers import PEERS, kind_of
from benchmarks.peers import Step as PeerStep
from benchmarks.rounds import Ratio, alternate, contender, machine, ratio_lines, ratios, synchronize
from benchmarks.step_memory import peak_of
from ssl_vit.core.front import FlagParser
from ssl_vit.core.machine import resolve_precision
from ssl_vit.core.settings import as_plain
from ssl_vit.data.augment.masking import num_kept
from ssl_vit.data.transform import pair
from ssl_vit.models.vit import choose_attention, set_fused_attention
from ssl_vit.objectives.dino import DINOConfig
from ssl_vit.objectives.mae import MAEConfig
from ssl_vit.training.config import RunConfig, parse_run
from ssl_vit.training.device.cuda_graphs import resolve_cuda_graphs
from ssl_vit.training.device.prepare import LEAST_STEPS, resolve_compile
from ssl_vit.training.step import prepare_step

HELP = "images per second of a training step with fused and plain attention, or beside other steps"
MORE = (
    f"{RUN_FLAGS} Beside others a step is measured as written and, where that is what `auto` does, compiled; with "
    "--cuda_graphs true also recorded."
)


def add_flags(parser: FlagParser) -> None:
    add_objective(parser)
    parser.add_switch("--peers", "beside other libraries' (extra `bench`)")
    parser.add_argument(
        "--beside",
        action="append",
        metavar="FLAGS",
        default=[],
        help="beside ours with more settings, as --beside='--FLAG ...'; may be given several times",
    )
    add_number(parser, "--steps_per_round", 1, 3, "steps of a round")
    parser.add_argument(
        "--kinds", nargs="+", choices=("fp32", "bf16"), help="precisions (default: fp32, and bf16 if it is the run's)"
    )
    add_number(parser, "--num_samples", 1, 100_000, "images that `auto` follows from")


def check(args: argparse.Namespace, settings: list[str]) -> str | None:
    """What is wrong with the flags."""
    return "--kinds: is of --peers and --beside" if args.kinds and not (args.peers or args.beside) else None


def measure(args: argparse.Namespace, settings: list[str]) -> dict:
    config, *beside = (
        parse_run(defaults_of(args.objective), [*settings, *shlex.split(more)]).resolve(args.num_samples)[0]
        for more in ["", *args.beside]
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


def as_lines(result: dict) -> list[str]:
    """The result as a table."""
    if "ratios_to" not in result:
        return ratio_lines(result)
    width = max(map(len, result["rates"]))
    lines = [f"{'':{width}} images/s   peak MiB   GFLOP/image    MFU"]
    for name, rates in result["rates"].items():
        peak, flops = result["peak_mib"][name], result["gflop_per_image"][name]
        rate, mfu = statistics.median(rates), result["mfu"][name]
        lines.append(f"{name:{width}} {rate:8.2f} {peak:10.0f} {flops:13.1f} {mfu:6.0%}")
    for base, found in result["ratios_to"].items():
        lines += [f"{name} over {base}: {Ratio(**ratio)}" for name, ratio in found.items()]
    return lines


def own_step(config: RunConfig, batch: int, device: torch.device, dtype: torch.dtype | None) -> PeerStep:
    """One step of ours as the training loop takes it, on images that are there; `dtype` is autocast's, None = fp32.

    With `compile` and `cuda_graphs` true as `prepare_step`, else as the blocks are written.
    """
    precision = kind_of(dtype)
    objective = config.build_objective().to(device)
    encoder = objective.encoder
    choose_attention(objective, encoder.attention_length, device, precision)
    images: dict[str, Tensor] = {}
    masked = config.objective if isinstance(config.objective, MAEConfig) else None
    if masked is not None:
        images["images"] = torch.randn(batch, encoder.in_chans, *encoder.image_size, device=device)
    elif isinstance(config.objective, DINOConfig):
        local_size = pair(config.objective.local_crop_size)
        images["global_crops"] = torch.randn(batch, 2, encoder.in_chans, *encoder.image_size, device=device)
        images["local_crops"] = torch.randn(
            batch, config.objective.num_local_crops, encoder.in_chans, *local_size, device=device
        )

    def with_masks() -> dict[str, Tensor]:
        """Drawn in each step, as other libraries do; in a run they come with the images."""
        if masked is None:
            return images
        order = torch.rand(batch, encoder.num_patches, device=device).argsort(dim=1)
        kept = num_kept(encoder.num_patches, masked.mask_ratio)
        drawn = {"keep": order[:, :kept]}
        if masked.predict_ratio is not None:
            drawn["predict"] = order[:, kept : kept + round(encoder.num_patches * masked.predict_ratio)]
        return images | drawn

    step = prepare_step(config, objective, with_masks, device, precision)

    def whole() -> None:
        step.forward_backward()
        step.update()

    return whole


def compare_attention(config: RunConfig, *, steps: int = 5, rounds: int = 5) -> dict:
    """Images per second of whole training steps on a batch made up of noise.

    Args:
        config: a run's settings, without `auto`.
        steps: steps of a round.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = config.build_objective().to(device)
    encoder, size = objective.encoder, config.batch.per_device or config.batch.size
    step = prepare_step(replace(config, cuda_graphs=False), objective, size, device)  # a recording attends in one way

    def attending(fused: bool) -> Callable[[], int]:
        def one_step() -> None:
            set_fused_attention(objective, fused)
            step.forward_backward()
            step.update()

        return contender(one_step, size, steps)

    rates = alternate({"fused attention": attending(True), "plain attention": attending(False)}, rounds)
    return {
        "what": f"training step of {type(objective).__name__}, {config.encoder.arch} {encoder.embed_dim} wide, "
        f"{encoder.num_patches} patches, batch {size}, precision {resolve_precision(config.precision, device)}",
        "rates": rates,
        "ratios": {name: vars(ratio) for name, ratio in ratios(rates, "fused attention").items()},
        "settings": as_plain(config),
        "machine": machine(),
    }


def compare_steps(
    config: RunConfig,
    *,
    peers: bool = False,
    beside: Mapping[str, RunConfig] | None = None,
    steps: int = 3,
    rounds: int = 5,
    kinds: list[str] | None = None,
) -> dict:
    """Images per second of whole training steps beside other ones, each in fp32 and in the run's precision.

    Args:
        config: a run's settings, without `auto`; `compile` and `cuda_graphs` may say so.
        peers: beside other libraries' steps.
        beside: beside our own with other settings, by name.
        steps: steps of a round.
        kinds: which of fp32 and bf16; None = both, or fp32 alone where the run's precision is that.

    Returns:
        Of each contender `rates`, `peak_mib` of a step (on a GPU reserved memory, weights and moments included; on a
        CPU tensors above those), `gflop_per_image` and `mfu`, and by baseline `ratios_to`.

    Raises:
        ValueError: other libraries have no such step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = config.batch.per_device or config.batch.size
    has_bf16 = resolve_precision(config.precision, device) == "bf16"
    dtypes = {"fp32": None, "bf16": torch.bfloat16}
    kinds = kinds or (["fp32", "bf16"] if has_bf16 else ["fp32"])
    contenders: dict[str, PeerStep] = {}
    peaks: dict[str, float] = {}

    def add(name: str, make: Callable[..., PeerStep], config: RunConfig, kind: str) -> None:
        before = 0
        if device.type == "cuda":
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(device)
            torch.cuda.reset_peak_memory_stats(device)
        step = contenders[name] = make(config, size, device, dtypes[kind])
        if device.type == "cuda":  # what is recorded writes to memory that counts as free, but nobody else can have
            for _ in range(2):
                step()
            peaks[name] = (torch.cuda.max_memory_reserved(device) - before) / 2**20

    makers = _peers_of(config) if peers else {}
    settings = {"ssl_vit": config} | {f"ssl_vit {name}": changed for name, changed in (beside or {}).items()}
    own: dict[str, list[str]] = {label: [] for label in settings}  # names of contenders
    for kind in kinds:
        for label, changed in settings.items():
            own[label].append(f"{label}, {kind}")
            add(own[label][-1], own_step, replace(changed, compile=False, cuda_graphs=False), kind)
        for library, make in makers.items():
            add(f"{library}, {kind}", make, config, kind)
    peak_flops = {kind: matmul_flops(device, dtypes[kind]) for kind in kinds}
    flops = {name: count_flops(step) for name, step in contenders.items()}
    for label, changed in settings.items():
        is_plain = changed.encoder.family().has_plain_blocks
        compiled = resolve_compile(changed.compile, device, LEAST_STEPS, is_sharded=False, has_plain_blocks=is_plain)
        recorded = resolve_cuda_graphs(
            changed.cuda_graphs,
            device,
            grad_checkpointing=changed.encoder.grad_checkpointing,
            has_plain_blocks=is_plain,
        )
        for kind in kinds if compiled or recorded else []:
            name = label + ", compiled" * compiled + ", CUDA graphs" * recorded + f", {kind}"
            own[label].append(name)
            add(name, own_step, replace(changed, compile=compiled, cuda_graphs=recorded), kind)
            flops[name] = flops[f"{label}, {kind}"]  # operations can be counted only as they are written

    rates = alternate({name: contender(step, size, steps) for name, step in contenders.items()}, rounds)
    if device.type != "cuda":
        peaks = {name: peak_of(step, device) for name, step in contenders.items()}
    ours, changed_ones = own.pop("ssl_vit"), [name for names in own.values() for name in names]
    compared = {f"{library}, {kind}": ours + changed_ones for kind in kinds for library in makers}
    compared |= {name: changed_ones for name in ours if changed_ones}
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "what": f"training step of {type(config.objective).__name__.removesuffix('Config')}, {config.encoder.arch}, "
        f"batch {size}, {config.encoder.image_size} px",
        "rates": rates,
        "ratios_to": {
            base: {name: vars(ratios(rates, base)[name]) for name in names} for base, names in compared.items()
        },
        "peak_mib": peaks,
        "gflop_per_image": {name: count / size / 1e9 for name, count in flops.items()},
        "matmul_gflop_per_second": {kind: value / 1e9 for kind, value in peak_flops.items()},
        "mfu": {name: median[name] * flops[name] / size / peak_flops[name.rpartition(", ")[2]] for name in contenders},
        "settings": as_plain(config),
        "machine": machine(),
    }


def _peers_of(config: RunConfig) -> dict[str, Callable[..., PeerStep]]:
    makers = PEERS.get(type(config.objective), {})
    if not makers:
        raise ValueError(f"--peers: none does the step of {type(config.objective).__name__.removesuffix('Config')}")
    if not config.encoder.family().has_plain_blocks:
        raise ValueError(f"--peers: have plain Vision Transformers alone; encoder.arch is {config.encoder.arch!r}")
    if isinstance(config.objective, MAEConfig) and config.objective.decoder != "self":
        raise ValueError(
            f"objective.decoder={config.objective.decoder!r}: --peers have the standard decoder alone; leave one of "
            "them out, or set this by --beside='--objective.decoder cross'"
        )
    return makers


def matmul_flops(device: torch.device, dtype: torch.dtype | None, seconds: float = 1.0) -> float:
    """Floating-point operations per second of a large matrix product: what a step's use is judged by."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype or torch.float32) for _ in range(2))
    best = 0.0
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        torch.matmul(a, b)
        synchronize()
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def count_flops(step: PeerStep) -> int:
    """Operations of the matrix products of one step, forward and backward, whichever kernel does attention."""
    with FlopCounterMode(display=False, custom_mapping=_attention_flops()) as counter:
        step()
    return counter.get_total_flops()


def _attention_flops() -> dict[Any, Callable[..., int]]:
    """Of fused attention's kernels what plain attention takes: two products, and twice as many backward. torch counts
    what kernels compute again as well, and nothing at all for the one on CPUs.
    """

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return 2 * sdpa_flop_count(query, key, value)

    found: dict[Any, Callable[..., int]] = {}
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        name = f"_scaled_dot_product_{kind}"
        found[getattr(torch.ops.aten, name)] = forward
        found[getattr(torch.ops.aten, f"{name}_backward")] = backward
    return found
