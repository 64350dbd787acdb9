"""Peak memory of DINO's head and loss, beside the loss in its pairwise form and lightly's."""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.peers import lightly_head_and_loss
from benchmarks.rounds import alternate, machine, ratios
from ssl_vit.objectives.heads import DINOHead
from ssl_vit.objectives.prototype_loss import dino_prototype_loss

EMBED_DIM = 384  # ViT-S


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


def peak_of(step: Callable[[], None], device: torch.device) -> float:
    """MiB that a call needs at its peak above what stood before.

    On CPUs counted over tensors: unlike the process's own peak, that does not depend on what the allocator keeps.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    kineto: Any = profiler.profiler.kineto_results
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))) / 2**20


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

    def work(step: Callable[[], None]) -> Callable[[], int]:
        def run() -> int:
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            return batch

        return run

    rates = alternate({kind: work(step) for kind, step in steps.items()}, rounds)
    peaks = {kind: peak_of(step, torch.device(device)) for kind, step in steps.items()}
    return {
        "what": f"head and loss at batch {batch}, 2 + {num_local_crops} crops, {num_prototypes:,} prototypes, fp32",
        "peak_mib": peaks,
        "share": {kind: peaks["ssl_vit"] / peak for kind, peak in peaks.items() if kind != "ssl_vit"},
        "rates": rates,
        "ratios": {name: vars(ratio) for name, ratio in ratios(rates, "pairwise").items()},
        "machine": machine(),
    }
