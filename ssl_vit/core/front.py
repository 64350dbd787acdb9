"""Front of every script: reads flags, ends in one line on a signal, shows each warning of a library once."""

import argparse
import difflib
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any, NoReturn, ParamSpec

from ssl_vit.core.text import plain, without_orders

P = ParamSpec("P")
program: str | None = None
"""Name of the command in usage lines; None: the script's file name."""
_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_ON_OFF = {"true": True, "false": False, "yes": True, "no": False}


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, raised in the main thread."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number


def handle_signals() -> None:
    """Let a signal end this process with one line. Scripts call this before imports that take seconds."""
    for number in _NUMBERS:
        signal.signal(number, lambda number, _: _end_at_once(number, ""))


def stoppable(hint: str = "") -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Let Ctrl-C and SIGTERM end a main function with one line and code 130 or 143; a second signal ends at once.

    Args:
        hint: end of that line, which says what the same command does next.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @wraps(main)
        def stopped_in_one_line(*args: P.args, **settings: P.kwargs) -> int:
            if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
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


def spell_out(words: Sequence[str], switches: Collection[str]) -> list[str]:
    """Rewrite `--name` and `--name true` of on-off flags as `--name=true`, the form that all parsers accept.

    Args:
        words: a command line.
        switches: names of the on-off flags.
    """
    spelled: list[str] = []
    is_bare = False
    for word in words:
        if is_bare and word.lower() in _ON_OFF:
            spelled[-1] = spelled[-1].replace("=true", f"={word}")
            is_bare = False
        else:
            is_bare = word.startswith("--") and word[2:] in switches
            spelled.append(f"{word}=true" if is_bare else word)
    return spelled


def nearest(name: str, names: Collection[str], prefix: str = "") -> str:
    """Suggest the name that was probably meant: the nearest spelling, with or without its section."""
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in names}
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    near = near or [by_leaf[leaf] for leaf in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_leaf, n=1)]
    return f"; did you mean {prefix}{near[0]}?" if near else "; --help-all lists them all"


class FlagParser(argparse.ArgumentParser):
    """Reads a script's flags by the rules of training's flags; ends with one line and code 2 on an error."""

    def __init__(self, **settings: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"prog": program, "allow_abbrev": False, "formatter_class": form, **settings})
        self.switches: set[str] = set()
        if self.add_help:
            self.add_argument("--help-all", action="help", help=argparse.SUPPRESS)

    def add_switch(self, name: str, help: str) -> None:
        """Add a flag that is on or off: `--name`, `--name true` or `--name=true`."""
        self.switches.add(name.removeprefix("--"))
        self.add_argument(name, type=_on_or_off, default=False, metavar="true", help=f"{help} [false]")

    def add_open_source(self) -> None:
        """Add the flag that lets a script open the images that a run's folder names."""
        what = "open the images that the run's folder says it was trained on; a stranger may have written it"
        self.add_switch("--open_source", what)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        given, rest = self.parse_known_args(args, namespace)
        if rest:
            self.refuse(rest)
        return given

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(spell_out(sys.argv[1:] if args is None else args, self.switches), namespace)

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """End with an error that names the first unknown word and the nearest flag."""
        name = words[0].partition("=")[0]
        known = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        if name.startswith("--"):
            self.error(f"{name}: no such flag{nearest(name[2:], known, '--')}")
        self.error(f"{words[0]}: not expected here; --help shows what is")

    def error(self, message: str) -> NoReturn:
        print(f"error: {plain(' '.join(message.split()))}", file=sys.stderr, flush=True)
        raise SystemExit(2)


def _on_or_off(text: str) -> bool:
    if text.lower() not in _ON_OFF:
        raise argparse.ArgumentTypeError(f"{text}: give true or false")
    return _ON_OFF[text.lower()]


@contextmanager
def warning_once() -> Iterator[None]:
    """Show a warning or unhandled log record of a line of code once in a process, not once per image."""
    seen, show = set(), warnings.showwarning

    def is_new(*place: object) -> bool:
        return place not in seen and seen.add(place) is None

    def show_once(message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any) -> None:
        if is_new(category, filename, lineno):
            show(plain(message), category, filename, lineno, *more)

    def log_once(record: logging.LogRecord) -> bool:
        record.msg, record.args = plain(record.getMessage()), ()
        return is_new(record.levelno, record.pathname, record.lineno)

    handler = logging.lastResort  # writes records that have no handler
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
    """Escape printed characters that the terminal cannot encode or would execute; return the changed streams."""
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
