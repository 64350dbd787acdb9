"""Where a run's time goes: a trace of a few steps, and a summary of at most ten lines."""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ssl_vit.metrics import MetricLog
from ssl_vit.writing import replace_text

WARMUP = 3  # steps before the trace
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
    """Traces some steps of a run after a warm-up of a few, and changes nothing else.

    On a GPU the time of a part is taken between events of its stream, since the host runs ahead: what the GPU spends on
    it, and what it waits for it.

    Args:
        num_steps: steps to trace; 0 = none, and then `part` does nothing.
        folder: gets `trace.json.gz`, for ui.perfetto.dev or chrome://tracing, and the summary.
    """

    def __init__(self, num_steps: int, folder: Path, device: torch.device, log: MetricLog) -> None:
        self.num_steps, self.folder, self.device, self.log = num_steps, folder, device, log
        self._seen = 0  # steps begun
        self._profiler: profile | None = None
        self._began: Any = None
        self._marks: list[tuple[str, Any, Any]] = []

    def next_step(self) -> None:
        """Begin a step; the trace starts or ends here if it is time for that."""
        if self.num_steps and self._seen == WARMUP:
            paused = self.log.pause()
            self._start()
            self.log.go_on(paused)
        elif self._seen == WARMUP + self.num_steps:
            self._finish(self.num_steps)
        self._seen += 1

    def part(self, name: str) -> AbstractContextManager[Any]:
        """A context around a part of a step, one of `PARTS`; parts do not overlap."""
        return _NOTHING if self._profiler is None else self._timed(name)

    def close(self) -> None:
        """End a trace that is not at its end, with the steps it has."""
        if 0 < self._seen <= WARMUP and self.num_steps:
            self.log.say(f"WARNING: --profile {self.num_steps}: too few steps to trace any; {WARMUP} warm up")
        self._finish(self._seen - WARMUP)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        with record_function(name):
            before = self._mark()
            yield
            self._marks.append((name, before, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _milliseconds(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) if self.device.type == "cuda" else 1000 * (after - before)

    def _start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # without a GPU it reports that as an error
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        self._profiler = profile(activities=activities)
        self._profiler.start()
        self._began = self._mark()

    def _finish(self, num_steps: int) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        paused = self.log.pause()
        ended = self._mark()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        profiler.stop()
        spent = dict.fromkeys(PARTS, 0.0)
        for name, before, after in self._marks:
            spent[name] += self._milliseconds(before, after)
        total = self._milliseconds(self._began, ended)
        lines = summarize(spent, total, num_steps, _kernels(profiler) if self.device.type == "cuda" else None)
        trace = self.folder / TRACE_FILE
        lines.append(f"trace: {trace}, for ui.perfetto.dev")
        try:
            replace_text(self.folder / SUMMARY_FILE, "".join(f"{line}\n" for line in lines))
            profiler.export_chrome_trace(str(trace))
        except OSError as error:  # the run matters more
            self.log.say(f"WARNING: {trace}: cannot be written: {error.strerror}")
        if not self.log.quiet:
            self.log.say("\n".join(lines))
        self.log.go_on(paused)


def summarize(spent: dict[str, float], total: float, num_steps: int, kernels: list[Kernel] | None) -> list[str]:
    """Lines that say where the time of some steps went.

    Args:
        spent: milliseconds of each part.
        total: milliseconds of all steps.
        kernels: what the GPU did, if there is one.
    """
    lines = [f"profile of {num_steps} steps: {total / num_steps:.1f} ms a step while it is traced"]
    for name, value in [*spent.items(), (OTHER, total - sum(spent.values()))]:
        lines.append(f"  {name:16}{value / num_steps:10.1f} ms {value / total:7.1%}")
    if kernels is not None:
        by_name: dict[str, int] = {}
        for kernel in kernels:
            by_name[kernel.name] = by_name.get(kernel.name, 0) + kernel.duration
        longest = sorted(by_name, key=lambda name: by_name[name], reverse=True)[:_NUM_KERNELS]
        listed = ", ".join(f"{_short(name)} {by_name[name] / 1e6 / total:.1%}" for name in longest)
        lines.append(f"GPU busy {busy(kernels) / 1e6 / total:.1%} of the time; most in {listed or 'nothing'}")
    return lines


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
