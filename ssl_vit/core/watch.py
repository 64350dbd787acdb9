"""Processes that give no sign of life: stopped, or on a machine that is frozen or cut off.

One that is busy, with an evaluation for hours, is none of them: a thread of its own gives the sign.
"""

import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from typing import Any

from tqdm import tqdm

EVERY = 5.0
"""Seconds between two signs of life."""
SILENT = 60.0
"""Seconds without one after which the others say so, and then again."""
MAX_WAIT = 240.0
"""Minutes without one after which the others end."""
_WATCHED = 32
"""Others that a process looks after, so that the store of thousands of them is not busy with it."""
_GONE = 2**40  # added to the count of a process that has ended well


class Watch:
    """Gives the sign of life of this process, and says which of the others give none.

    One thread talks to the store, where it may wait for a process 0 that was stopped; another counts what it has heard.
    It counts turns, not seconds: a process that was stopped itself blames nobody when it goes on.

    Args:
        store: `torch.distributed`'s, or a clone of it for this thread alone.
        index: number of this process among `number`.
    """

    def __init__(self, store: Any, index: int, number: int) -> None:
        self.index = index
        self._watched = {0, *((index + step) % number for step in range(1, _WATCHED + 1))} - {index}
        self.max_wait, self.flag = MAX_WAIT, ""
        """Minutes; the flag is named where there is one."""
        self.progress = 0
        """Changes with what the main thread gets done: as long as it does, it waits for nobody."""
        self.at_end: Callable[[], None] = lambda: None
        self._store, self._ended = store, Event()
        self._rounds, self._signs = 0, [0] * number
        self._places: dict[int, tuple[str, str]] = {}  # host and pid
        self._turns, self._told = [0] * number, 0
        self._before = (0, 0, [0] * number)
        self._talking = Thread(target=self._talk, daemon=True)

    def start(self) -> None:
        self._talking.start()
        Thread(target=self._count, daemon=True).start()

    def close(self) -> None:
        """Let the others know that this process has ended, not hung."""
        self._ended.set()
        self._talking.join(timeout=2)

    def _talk(self) -> None:
        with suppress(RuntimeError, OSError):  # the store has ended with process 0, or cannot be reached
            self._store.set(f"watch/place/{self.index}", f"{platform.node()}\n{os.getpid()}")
            while True:
                self.hear()
                if self._ended.wait(EVERY):
                    break
            self._store.add(f"watch/{self.index}", _GONE)

    def _count(self) -> None:
        while not self._ended.wait(EVERY):
            self.turn()

    def hear(self) -> None:
        """Give a sign of life, and look for those of the others."""
        self._store.add(f"watch/{self.index}", 1)
        signs = list(self._signs)
        for other in self._watched:
            signs[other] = self._store.add(f"watch/{other}", 0)
        self._signs = signs
        for other in {*self._watched, self.index} - set(self._places):
            if self._store.check([f"watch/place/{other}"]):
                host, _, pid = self._store.get(f"watch/place/{other}").decode().partition("\n")
                self._places[other] = (host, pid)
        self._rounds += 1

    def turn(self) -> None:
        """Count for how many turns nothing was heard of each, and say so or end."""
        rounds, progress, signs = self._rounds, self.progress, self._signs
        old_rounds, old_progress, old_signs = self._before
        self._before = (rounds, progress, signs)
        for other in self._watched:
            if signs[other] >= _GONE or progress != old_progress:
                self._turns[other] = 0
            elif rounds == old_rounds:
                self._turns[other] += other == 0  # the store is with it: of the others nothing can be heard
            else:
                self._turns[other] = 0 if signs[other] != old_signs[other] else self._turns[other] + 1
        silent = {other: turns * EVERY for other, turns in enumerate(self._turns) if turns * EVERY >= SILENT}
        longest = max(silent.values(), default=0.0)
        if longest >= 60 * self.max_wait:
            self._end(f"error: {self._describe(silent)}; {self._limit()} are over")
        self._told = self._told if silent else 0
        if longest - self._told * SILENT >= SILENT and self._speaks(silent):
            self._told = int(longest / SILENT)
            tqdm.write(f"WARNING: waiting for {self._describe(silent)}; {self._limit()} end this", file=sys.stderr)

    def _describe(self, silent: dict[int, float]) -> str:
        names = []
        for other in silent:
            host, pid = self._places.get(other, ("", ""))
            names.append(f"process {other}" + (f" on {host} (pid {pid})" if host else ""))
        minutes = max(silent.values()) / 60
        what = f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        return f"{what}: no sign of life for {minutes:.3g} min; stopped, or its machine is frozen or cut off"

    def _limit(self) -> str:
        return f"{self.max_wait:g} min{f' ({self.flag})' if self.flag else ''}"

    def _speaks(self, silent: dict[int, float]) -> bool:
        """Whether this process is the first on its machine that gives a sign of life."""
        host = platform.node()
        near = [other for other, place in self._places.items() if place[0] == host and other not in silent]
        return self.index == min(near, default=self.index)

    def _end(self, text: str) -> None:
        """End the process, whose main thread waits where no exception reaches it; files that are whole stay so."""
        try:
            tqdm.write(f"{text}. The same command goes on from the newest checkpoint.", file=sys.stderr)
            self.at_end()
            sys.stdout.flush()
        finally:
            os._exit(1)
