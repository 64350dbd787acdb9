"""Schedules as pure functions of progress, the share of the run that is done, in [0, 1]."""

import math


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def warmup_cosine(progress: float, warmup: float, peak: float, end: float) -> float:
    """A line from 0 to `peak` over the first `warmup` share of the run, then half a cosine down to `end`."""
    if progress < warmup:
        return peak * progress / warmup
    return cosine((progress - warmup) / (1 - warmup), peak, end)


def warmup_linear(progress: float, warmup: float, start: float, end: float) -> float:
    """A line from `start` to `end` over the first `warmup` share of the run, then `end`."""
    return start + (end - start) * progress / warmup if progress < warmup else end
