"""What stands in for CUDA graphs where there is no GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Rerun:
    """Stands in for a CUDA graph: a replay does the work again and fills the tensors of the first time.

    A forward pass writes over the gradients, whose memory on a GPU is that of what it leaves for the backward pass.
    """

    def __init__(self, work: Callable[[], Any], after: "Rerun | None") -> None:
        self.work, self.grad = work, torch.is_grad_enabled()
        result = work()
        self.result: list[Tensor | None] = [result] if isinstance(result, Tensor) else list(result)
        self.shares_memory: list[Tensor | None] = []
        self.replays = -1  # the proof's does not count
        if after is not None:
            after.shares_memory = self.result

    def replay(self) -> None:
        self.replays += 1
        for gradient in self.shares_memory:
            if gradient is not None:
                gradient.detach().fill_(torch.nan)
        with torch.set_grad_enabled(self.grad):
            found = self.work()
        for kept, new in zip(self.result, [found] if isinstance(found, Tensor) else found, strict=True):
            if kept is not None:
                kept.detach().copy_(new.detach())


class FakeCapture:
    """Captures without a GPU."""

    made: list[Rerun]

    def __init__(self, device: torch.device, slot: int) -> None: ...

    @contextmanager
    def aside(self) -> Iterator[None]:
        with torch.random.fork_rng([]):
            yield

    def __call__(self, work: Callable[[], Any], after: Rerun | None = None) -> tuple[Rerun, Any]:
        graph = Rerun(work, after)
        self.made.append(graph)
        return graph, tuple(graph.result) if after is not None else graph.result[0]
