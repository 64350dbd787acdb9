"""Peak memory of DINO's head and loss, beside the loss in its pairwise form."""

from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from ssl_vit.benchmarks.rounds import machine
from ssl_vit.objectives.dino import dino_loss
from ssl_vit.objectives.heads import DINOHead


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


LOSSES = {"pairwise": pairwise_loss, "ssl_vit": dino_loss}


def peak_mib(kind: str, *, batch: int, num_local_crops: int, num_prototypes: int, device: str) -> float:
    """MiB that one forward and backward of head and loss need above what stood before, teacher included."""
    torch.manual_seed(0)
    views = 2 + num_local_crops
    head = DINOHead(384, num_prototypes=num_prototypes).to(device)
    teacher = DINOHead(384, num_prototypes=num_prototypes).to(device).requires_grad_(False)
    features = torch.randn(views, batch, 384, device=device, requires_grad=True)

    def step() -> None:
        with torch.no_grad():
            probs = (teacher(features[:2]) / 0.04).softmax(dim=-1)
        LOSSES[kind](head(features), probs).backward()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return _peak_of_tensors(profiler) / 2**20


def _peak_of_tensors(profiler: profile) -> int:
    """Most bytes that tensors held at once above what stood before.

    Unlike the process's own peak, this does not depend on what the allocator keeps.
    """
    assert profiler.profiler is not None
    kineto: Any = profiler.profiler.kineto_results
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def compare_memory(*, batch: int = 64, num_local_crops: int = 8, num_prototypes: int = 65536, rounds: int = 3) -> dict:
    """Peak memory of both losses, alternating."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peaks: dict[str, list[float]] = {kind: [] for kind in LOSSES}
    for _ in range(rounds):
        for kind in LOSSES:
            peak = peak_mib(
                kind, batch=batch, num_local_crops=num_local_crops, num_prototypes=num_prototypes, device=device
            )
            peaks[kind].append(peak)
    shares = [own / pairwise for own, pairwise in zip(peaks["ssl_vit"], peaks["pairwise"], strict=True)]
    return {
        "what": f"head and loss at batch {batch}, 2 + {num_local_crops} crops, {num_prototypes:,} prototypes",
        "peak_mib": peaks,
        "share": sorted(shares)[len(shares) // 2],
        "machine": machine(),
    }
