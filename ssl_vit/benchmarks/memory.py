"""Peak memory of DINO's head and loss, beside the loss in its pairwise form; each in a process of its own."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

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
    before = _peak_kib()
    step()
    return (_peak_kib() - before) / 2**10


def _peak_kib() -> int:
    """Most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins there with that of the process that started this one
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compare_memory(*, batch: int = 64, num_local_crops: int = 8, num_prototypes: int = 65536, rounds: int = 3) -> dict:
    """Peak memory of both losses, alternating, in fresh processes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = f"batch={batch}, num_local_crops={num_local_crops}, num_prototypes={num_prototypes}, device={device!r}"
    peaks: dict[str, list[float]] = {kind: [] for kind in LOSSES}
    for _ in range(rounds):
        for kind in LOSSES:
            code = f"from ssl_vit.benchmarks.memory import peak_mib; print(peak_mib({kind!r}, {settings}))"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            peaks[kind].append(float(done.stdout))
    shares = [own / pairwise for own, pairwise in zip(peaks["ssl_vit"], peaks["pairwise"], strict=True)]
    return {
        "what": f"head and loss at batch {batch}, 2 + {num_local_crops} crops, {num_prototypes:,} prototypes",
        "peak_mib": peaks,
        "share": sorted(shares)[len(shares) // 2],
        "machine": machine(),
    }
