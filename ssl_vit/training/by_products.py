"""Figures, scores, traces and the like: a run makes them beside its weights and can end without them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ssl_vit.core.distributed import world_size
from ssl_vit.core.text import plain


@contextmanager
def by_product(what: str, say: Callable[[str], None] = print, *, shared: bool = False) -> Iterator[None]:
    """Leave `what` out with a warning where this block fails, in whatever way: the run is worth more.

    Args:
        what: a noun phrase, the warning's beginning.
        shared: all processes work on it together, so that one of several that fails cannot go on without the others.
    """
    try:
        yield
    except Exception as error:
        if shared and world_size() > 1:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        say(f"WARNING: {plain(what)} left out: {plain(reason, 300)}")
