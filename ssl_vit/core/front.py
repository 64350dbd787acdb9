"""What every script does around its work: a signal ends it in one line, and libraries' warnings come once."""

import argparse
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec

from ssl_vit.core.text import plain, without_orders

P = ParamSpec("P")
_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, raised where the main thread is."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number


def heed_signals() -> None:
    """Let a signal end this process in one line; for scripts, before imports that take seconds."""
    for number in _NUMBERS:
        signal.signal(number, lambda number, _: _end_at_once(number, ""))


def stoppable(hint: str = "") -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Let Ctrl-C and SIGTERM end a main function in one line with code 130 or 143; a second signal ends at once.

    Args:
        hint: what the line says after that: what the same command does.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @wraps(main)
        def stopped_in_one_line(*args: P.args, **settings: P.kwargs) -> int:
            if threading.current_thread() is not threading.main_thread():  # which alone gets signals
                return main(*args, **settings)
            owner, received = os.getpid(), 0

            def stop(number: int, frame: FrameType | None) -> None:
                nonlocal received
                if os.getpid() != owner:  # a worker that has just been forked
                    return None if number == signal.SIGINT else os._exit(128 + number)
                if received:
                    _end_at_once(number, hint)
                received = number
                raise Stopped(number)

            shown = _show_any_text()
            before = {number: signal.signal(number, stop) for number in _NUMBERS}
            try:
                with warning_once():
                    return main(*args, **settings)
            except KeyboardInterrupt as error:
                number = error.number if isinstance(error, Stopped) else signal.SIGINT
                _say(number, hint)
                return 128 + number
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
                for stream in shown:
                    del stream.write

        return stopped_in_one_line

    return decorate


def add_open_source(parser: argparse.ArgumentParser) -> None:
    """The flag that lets a script open what a run's folder names, as `--open_source` or `--open_source true`."""
    parser.add_argument(
        "--open_source",
        nargs="?",
        const=True,
        default=False,
        type={"true": True, "false": False}.get,
        choices=(True, False),
        metavar="true",
        help="open the images that the run's folder says it was trained on; a stranger may have written it [false]",
    )


@contextmanager
def warning_once() -> Iterator[None]:
    """Show what a line of code warns of, or logs unasked, once in a process: not for each image anew."""
    seen, show = set(), warnings.showwarning

    def is_new(*place: object) -> bool:
        return place not in seen and seen.add(place) is None

    def show_once(message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any) -> None:
        if is_new(category, filename, lineno):
            show(plain(message), category, filename, lineno, *more)

    def log_once(record: logging.LogRecord) -> bool:
        record.msg, record.args = plain(record.getMessage()), ()
        return is_new(record.levelno, record.pathname, record.lineno)

    handler = logging.lastResort  # which writes what nobody asked for
    warnings.showwarning = show_once
    if handler is not None:
        handler.addFilter(log_once)
    try:
        yield
    finally:
        warnings.showwarning = show
        if handler is not None:
            handler.removeFilter(log_once)


def _show_any_text() -> list[Any]:
    """Print what the terminal's encoding lacks, or would do more than show, as escapes; returns the streams."""
    changed = []
    for stream in {sys.stdout, sys.stderr}:
        if isinstance(stream, io.TextIOWrapper) and "write" not in vars(stream):
            stream.reconfigure(errors="backslashreplace")
            stream.write = lambda text, write=stream.write: write(without_orders(text))
            changed.append(stream)
    return changed


def _end_at_once(number: int, hint: str) -> None:
    _say(number, hint)
    sys.stdout.flush()
    os._exit(128 + number)


def _say(number: int, hint: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        print(f"Stopped by {name}. {hint}".rstrip(), file=sys.stderr, flush=True)
