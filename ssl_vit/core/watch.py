"""Finds processes that give no sign of life: stopped, or on a machine that is frozen or cut off.

A process that is busy, such as with an evaluation of hours, is not silent: a separate thread gives its sign.
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
"""Seconds without a sign after which other processes warn; they warn again after each such period."""
MAX_WAIT = 240.0
"""Minutes without a sign after which the other processes end."""
GO_ON = "The same command goes on from the newest checkpoint, or begins anew where there is none."
_WATCHED = 32
"""Processes that each process watches; a bound spares the store of thousands of processes."""
_GONE = 2**40  # added to the count of a process that ended normally


class Watch:
    """Gives this process's sign of life and names the other processes that give none.

    One thread talks to the store and may block on it if process 0 was stopped; a second thread counts silent turns.
    It counts turns, not seconds, so that a process that was stopped itself blames no other when it continues.

    Args:
        store: a `torch.distributed` store that no other thread uses, such as a clone.
        index: rank of this process among `number` processes.
    """

    def __init__(self, store: Any, index: int, number: int) -> None:
        self.index = index
        self._watched = {0, *((index + step) % number for step in range(1, _WATCHED + 1))} - {index}
        self.max_wait, self.flag = MAX_WAIT, ""
        """Limit in minutes, and the flag that set it, if any, to name in messages."""
        self.progress = 0
        """Grows as the main thread works: while it grows, the main thread waits for no other process."""
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
        """Tell the other processes that this one has ended, not hung."""
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
        """Give a sign of life and read those of the watched processes."""
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
        """Count the turns for which each process was silent; warn or end if there were too many."""
        rounds, progress, signs = self._rounds, self.progress, self._signs
        old_rounds, old_progress, old_signs = self._before
        self._before = (rounds, progress, signs)
        for other in self._watched:
            if signs[other] >= _GONE or progress != old_progress:
                self._turns[other] = 0
            elif rounds == old_rounds:
                self._turns[other] += other == 0  # process 0 holds the store; without it no other can be heard
            else:
                self._turns[other] = 0 if signs[other] != old_signs[other] else self._turns[other] + 1
        silent = {other: turns * EVERY for other, turns in enumerate(self._turns) if turns * EVERY >= SILENT}
        longest = max(silent.values(), default=0.0)
        if longest >= 60 * self.max_wait:
            self._end(f"error: {self._describe(silent)}; the limit is {self._limit()}")
        self._told = self._told if silent else 0
        if longest - self._told * SILENT >= SILENT and self._speaks(silent):
            self._told = int(longest / SILENT)
            tqdm.write(f"WARNING: waiting for {self._describe(silent)}; the limit is {self._limit()}", file=sys.stderr)

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
        """End the process, whose main thread blocks where no exception reaches it; complete files stay complete."""
        try:
            tqdm.write(f"{text}. {GO_ON}", file=sys.stderr)
            self.at_end()
            sys.stdout.flush()
        finally:
            os._exit(1)
