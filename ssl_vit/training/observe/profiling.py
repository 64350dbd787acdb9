"""Where a run's time goes: a trace of a few steps, and a summary of at most ten lines."""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from ssl_vit.core.writing import replace_text, replacing
from ssl_vit.training.faults import by_product
from ssl_vit.training.observe.metrics import MetricLog

WARMUP = 3  # steps before any is timed
NOTABLE = 4 / 3  # how many times as long a traced step must take to be warned of
TRACE_FILE, SUMMARY_FILE = "trace.json.gz", "profile.txt"
PARTS: tuple[str, ...] = ("data wait", "forward", "backward", "optimizer", "after step", "checkpoint")
OTHER = "logging, other"
_NOTHING = nullcontext()
_NUM_KERNELS = 3


class Kernel(NamedTuple):
    """Something that a GPU did, in nanoseconds."""

    name: str
    start: int
    duration: int


class StepTrace:
    """Times some steps of a run after a warm-up, then traces as many, and changes nothing else.

    Tracing takes time of its own, which may be many times that of a small step. So the shares are those of the steps
    before the trace, and the summary gives both times. On a GPU the time of a part is taken between events of its
    stream, since the host runs ahead: it covers what the GPU computes for the part and what it waits for it.

    Args:
        num_steps: steps to time, and to trace; 0 = none, and then `part` does nothing.
        folder: gets `trace.json.gz`, for ui.perfetto.dev or chrome://tracing, and the summary.
    """

    def __init__(self, num_steps: int, folder: Path, device: torch.device, log: MetricLog) -> None:
        self.num_steps, self.folder, self.device, self.log = num_steps, folder, device, log
        self._number = -WARMUP - 1  # of the present step; the first one that is timed has 0
        self._profiler: profile | None = None
        self._began: Any = None
        self._marks: list[tuple[str, Any, Any]] = []
        self._timed, self._traced = (0, 0.0), (0, 0.0)  # steps, and the milliseconds that they took

    def next_step(self) -> None:
        """Begin a step; timing and trace start or end here if it is time for that."""
        if self.num_steps == 0:
            return
        paused = self.log.pause()
        self._number += 1
        if self._number == -WARMUP:
            with by_product("trace", self.log.report):
                self._profiler = self._start()
        elif self._profiler is not None:
            self._profiler.step()
        if self._number == self.num_steps:
            self._timed = (self.num_steps, self._since_began())
        elif self._number in (0, self.num_steps + 1):  # the step between them is the trace's warm-up
            self._began = self._mark()
        elif self._number == 2 * self.num_steps + 1:
            self._traced = (self.num_steps, self._since_began())
            self._finish()
        self.log.go_on(paused)

    def part(self, name: str) -> AbstractContextManager[Any]:
        """A context around a part of a step, one of `PARTS`; parts do not overlap."""
        if 0 <= self._number < self.num_steps:
            return self._time(name)
        return record_function(name) if self._profiler is not None and self._number >= 0 else _NOTHING

    def close(self) -> None:
        """End timing and trace with the steps they have."""
        if self.num_steps == 0:
            return
        number = self._number + 1  # steps begun since the warm-up
        if 0 < number <= self.num_steps:
            self._timed = (number, self._since_began())
        if number <= self.num_steps + 1:
            self.log.report(
                f"WARNING: --profile {self.num_steps}: too few steps to trace any: {WARMUP} warm up, {self.num_steps} "
                "are timed, and one begins the trace"
            )
        else:
            self._traced = (number - self.num_steps - 1, self._since_began())
        self._finish()

    @contextmanager
    def _time(self, name: str) -> Iterator[None]:
        before = self._mark()
        yield
        self._marks.append((name, before, self._mark()))

    def _since_began(self) -> float:
        ended = self._mark()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self._milliseconds(self._began, ended)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _milliseconds(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) if self.device.type == "cuda" else 1000 * (after - before)

    def _start(self) -> profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # without a GPU it reports that as an error
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        steps = schedule(wait=WARMUP + self.num_steps, warmup=1, active=self.num_steps, repeat=1)
        profiler = profile(activities=activities, schedule=steps)
        profiler.start()
        return profiler

    def _finish(self) -> None:
        profiler, self._profiler, self.num_steps = self._profiler, None, 0
        (num_timed, untraced), (num_traced, traced) = self._timed, self._traced
        if profiler is not None:
            with by_product("trace", self.log.report):
                profiler.stop()
        if num_timed == 0:
            return
        spent = dict.fromkeys(PARTS, 0.0)
        for name, before, after in self._marks:
            spent[name] += self._milliseconds(before, after)
        lines = summarize(spent, untraced, num_timed)
        with by_product(f"trace {self.folder / TRACE_FILE}", self.log.report):
            if profiler is not None and num_traced > 0:
                lines.append(compare(untraced / num_timed, traced / num_traced))
                if self.device.type == "cuda":
                    lines.append(name_kernels(_kernels(profiler), traced))
                lines.append(f"trace of {num_traced} more: {self.folder / TRACE_FILE}, for ui.perfetto.dev")
                with replacing(self.folder / TRACE_FILE) as unfinished:
                    profiler.export_chrome_trace(str(unfinished))
            replace_text(self.folder / SUMMARY_FILE, "".join(f"{line}\n" for line in lines))
        if not self.log.quiet:
            for line in lines:
                self.log.report(line)


def summarize(spent: dict[str, float], total: float, num_steps: int) -> list[str]:
    """Lines that say where the time of some steps went.

    Args:
        spent: milliseconds of each part.
        total: milliseconds of all steps.
    """
    lines = [f"profile of {num_steps} steps: {total / num_steps:.1f} ms a step"]
    for name, value in [*spent.items(), (OTHER, total - sum(spent.values()))]:
        lines.append(f"  {name:16}{value / num_steps:10.1f} ms {value / total:7.1%}")
    return lines


def compare(untraced: float, traced: float) -> str:
    """A line that says what tracing does to a step; both in milliseconds."""
    line = f"while traced: {traced:.1f} ms a step"
    if traced <= untraced * NOTABLE:
        return line
    return f"{line}, {traced / untraced:.1f} times as long: trust the shares above, not durations in the trace"


def name_kernels(kernels: list[Kernel], total: float) -> str:
    """A line about what the GPU did in `total` milliseconds of traced steps."""
    by_name: dict[str, int] = {}
    for kernel in kernels:
        by_name[kernel.name] = by_name.get(kernel.name, 0) + kernel.duration
    longest = sorted(by_name, key=lambda name: by_name[name], reverse=True)[:_NUM_KERNELS]
    listed = ", ".join(f"{_short(name)} {by_name[name] / 1e6 / total:.1%}" for name in longest)
    return f"GPU busy {busy(kernels) / 1e6 / total:.1%} of the traced time; most in {listed or 'nothing'}"


def busy(kernels: Iterable[Kernel]) -> int:
    """Nanoseconds in which at least one kernel ran."""
    total, until = 0, 0
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        end = kernel.start + kernel.duration
        total += max(0, end - max(kernel.start, until))
        until = max(until, end)
    return total


def _kernels(profiler: profile) -> list[Kernel]:
    assert profiler.profiler is not None
    kineto: Any = profiler.profiler.kineto_results
    return [
        Kernel(event.name(), event.start_ns(), event.duration_ns())
        for event in kineto.events()
        if event.device_type().name == "CUDA" and not event.is_user_annotation()
    ]


def _short(name: str) -> str:
    """A kernel's name without return type and arguments, at most 40 characters."""
    return name.removeprefix("void ").split("(")[0].split("<")[0][-40:] or name[:40]
