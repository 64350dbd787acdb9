"""Exponential moving average of one module in another."""

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, momentum: float) -> None:
    """average = momentum x average + (1 - momentum) x model, for every parameter; buffers are copied.

    Raises:
        ValueError: the two modules do not have the same parameters.
    """
    averages, values = dict(average.named_parameters()), dict(model.named_parameters())
    if averages.keys() != values.keys():
        raise ValueError(f"cannot average {type(model).__name__}: {sorted(averages.keys() ^ values.keys())[:3]} differ")
    get_ema_multi_avg_fn(momentum)(list(averages.values()), [values[name] for name in averages], None)
    for buffer, value in zip(average.buffers(), model.buffers(), strict=True):
        buffer.copy_(value)
