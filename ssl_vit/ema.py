"""Exponential moving average of one module in another."""

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, momentum: float, taken: Bool[Tensor, ""] | None = None) -> None:
    """average = momentum x average + (1 - momentum) x model, for every parameter; buffers are copied.

    Args:
        taken: scalar on the device; where it is False nothing moves.

    Raises:
        ValueError: the two modules do not have the same parameters.
    """
    averages, values = dict(average.named_parameters()), dict(model.named_parameters())
    if averages.keys() != values.keys():
        raise ValueError(f"cannot average {type(model).__name__}: {sorted(averages.keys() ^ values.keys())[:3]} differ")
    if averages:
        foreach: Any = torch
        targets = list(averages.values())
        share: float | Tensor = 1 - momentum if taken is None else taken * (1 - momentum)
        steps = foreach._foreach_sub([values[name] for name in averages], targets)
        foreach._foreach_mul_(steps, share)  # by a tensor, which averaging functions of torch do not take
        foreach._foreach_add_(targets, steps)
    for buffer, value in zip(average.buffers(), model.buffers(), strict=True):
        buffer.copy_(value if taken is None else torch.where(taken, value, buffer))
