"""Schedules as pure functions of progress, the share of the run that is done, in [0, 1]."""

import math
from collections.abc import Sequence


def progress_at(step: int, num_steps: int, extended: Sequence[Sequence[int]] = ()) -> float:
    """The share of a run that is done before `step`, by which all schedules go.

    A run that was lengthened on its way goes on from its progress then, in a line to 1 at its new end: schedules are
    stretched. One that was at its end goes from 0 to 1 once more, over the added steps.

    Args:
        num_steps: of the whole run.
        extended: the step at which the run was lengthened, and its length until then, for each time.
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
    """A line from 0 to `peak` over the first `warmup` share of the run, then half a cosine down to `end`."""
    if progress < warmup:
        return peak * progress / warmup
    return cosine((progress - warmup) / (1 - warmup), peak, end)


def warmup_linear(progress: float, warmup: float, start: float, end: float) -> float:
    """A line from `start` to `end` over the first `warmup` share of the run, then `end`."""
    return start + (end - start) * progress / warmup if progress < warmup else end
