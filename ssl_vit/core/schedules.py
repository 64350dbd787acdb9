"""Schedules as pure functions of progress, the completed share of the run, in [0, 1]."""

import math
from collections.abc import Sequence


def progress_at(step: int, num_steps: int, extended: Sequence[Sequence[int]] = ()) -> float:
    """Progress before `step`: the completed share of the run, which all schedules follow.

    A run that is lengthened midway continues from its progress linearly to 1 at its new end: schedules are stretched.
    A finished run that is lengthened goes from 0 to 1 again, over the added steps.

    Args:
        num_steps: length of the whole run.
        extended: for each time the run was lengthened, the step of that moment and the length until then.
    """
    start, done = 0, 0.0
    for switch, length in extended:
        if step < switch:
            num_steps = length
            break
        done = 0.0 if switch == length else done + (1 - done) * (switch - start) / (length - start)
        start = switch
    return done + (1 - done) * (step - start) / (num_steps - start)


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def warmup_cosine(progress: float, warmup: float, peak: float, end: float) -> float:
    """Linear from 0 to `peak` over the first `warmup` share of the run, then half a cosine down to `end`."""
    if progress < warmup:
        return peak * progress / warmup
    return cosine((progress - warmup) / (1 - warmup), peak, end)


def warmup_drop(progress: float, warmup: float, peak: float, drop_at: float) -> float:
    """Linear from 0 to `peak` over the first `warmup` share of the run, then `peak`, and a tenth of it from `drop_at`
    on."""
    if progress < warmup:
        return peak * progress / warmup
    return peak if progress < drop_at else 0.1 * peak


def warmup_linear(progress: float, warmup: float, start: float, end: float) -> float:
    """Linear from `start` to `end` over the first `warmup` share of the run, then `end`."""
    return start + (end - start) * progress / warmup if progress < warmup else end
