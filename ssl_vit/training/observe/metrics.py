"""What a run reports: metrics.jsonl always, a progress bar on a terminal, readable lines elsewhere."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm import tqdm

from ssl_vit.core.distributed import mean_over_processes
from ssl_vit.core.reading import entry, parse_json, read_lines, read_metrics
from ssl_vit.core.text import plain
from ssl_vit.core.writing import JsonLines, forget_after
from ssl_vit.training.faults import by_product
from ssl_vit.training.observe.tracking import Tracker


class MetricLog:
    """Averages scalars between log steps, and writes them.

    Losses stay on the device until a log step, so that logging never makes the device wait.
    """

    def __init__(
        self,
        path: Path,
        *,
        start_step: int,
        num_steps: int,
        batch_size: int,
        log_every: int,
        is_writer: bool,
        quiet: bool = False,
        tracker: Tracker | None = None,
    ) -> None:
        self.num_steps, self.batch_size = num_steps, batch_size
        self.log_every, self.is_writer = log_every, is_writer
        self.step, self.start_step = start_step, start_step
        self._file = JsonLines(path)
        self.quiet, self.tracker = quiet, tracker
        self.on_terminal = sys.stderr.isatty()
        if is_writer:
            forget_after(path, start_step)
        self._knn = last_value(path, "eval_knn")
        self.bar = tqdm(
            total=num_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            disable=quiet or not (is_writer and self.on_terminal),
        )
        self._start = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._taken: int | Tensor = 0
        self._data_wait = 0.0
        self._since = time.perf_counter()

    def add_data_wait(self, seconds: float) -> None:
        """Add seconds in which the step waited for its batch."""
        self._data_wait += seconds

    def add_step(self, losses: dict[str, Tensor], taken: Bool[Tensor, ""] | None = None) -> None:
        """Note the losses of a finished step.

        Args:
            taken: on the device; the losses of a step that was not taken are left out of the averages.
        """
        for name, value in losses.items():
            value = value.detach()
            self._sums[name] = self._sums.get(name, 0) + (value if taken is None else torch.where(taken, value, 0.0))
        self._taken = self._taken + (1 if taken is None else taken)
        self._count += 1
        self.step += 1
        self.bar.update()

    def is_scored(self, step: int) -> bool:
        """Whether the file has scores of this step, written before the run was interrupted."""
        return any(line["step"] == step for line in self.scores())

    def scores(self) -> list[dict[str, Any]]:
        """The file's lines with scores during training."""
        return [line for line in read_metrics(self._file.path) if any(name.startswith("eval_") for name in line)]

    def is_due(self) -> bool:
        """Whether this is a step to log at."""
        return self.step % self.log_every == 0 or self.step == self.num_steps

    def write_interval(self, values: dict[str, float], progress: float) -> dict[str, Any]:
        """Write the averages since the last call, and `values` as they are. Every process calls this at the same steps.

        Returns:
            The record, the same on every process except for times; without averages if no step was taken.
        """
        names = sorted(self._sums)
        num_taken = int(self._taken)
        means: list[float] = []
        if num_taken == 0:
            names = []
        elif names:
            sums = torch.stack([self._sums[name].float() for name in names])
            means = mean_over_processes(sums / num_taken).tolist()
        seconds = time.perf_counter() - self._since
        record = {
            "step": self.step,
            **dict(zip(names, means, strict=True)),
            **values,
            "progress": progress,
            "images_per_second": self._count * self.batch_size / seconds,
            "data_wait": self._data_wait / seconds,
            "memory_mib": memory_mib(),
        }
        self.write(record)
        self._show(record)
        self._reset()
        return record

    def _show(self, record: dict[str, Any]) -> None:
        if self.quiet:
            return
        rate, wait = record["images_per_second"], record["data_wait"]
        knn = "" if self._knn is None else f"k-NN {self._knn:.1%}"
        loss = f"{record['loss']:.4f}" if "loss" in record else "none (all steps skipped)"
        if self.on_terminal:
            parts = [f"loss {loss}", f"{rate:.0f} images/s", f"{wait:.0%} waiting for data", knn]
            self.bar.set_postfix_str(", ".join(filter(None, parts)))
        elif self.is_writer:
            done = self.step - self.start_step
            left = (time.perf_counter() - self._start) / done * (self.num_steps - self.step)
            print(
                f"step {self.step}/{self.num_steps}  loss {loss}  lr {record['lr']:.2e}  "
                f"{rate:.0f} images/s  {wait:.0%} waiting for data  {knn + '  ' if knn else ''}"
                f"{tqdm.format_interval(left)} left",
                flush=True,
            )

    def write(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, and send it to the tracker."""
        self._knn = record.get("eval_knn", self._knn)
        if self.is_writer:
            # JSON has no infinity; the gradient's norm is infinite where fp16 overflowed.
            plain = {key: value if math.isfinite(value) else None for key, value in record.items()}
            self._file.append([plain])
            self._track(lambda tracker: tracker.log(plain))

    def figure(self, path: Path, step: int) -> None:
        """Send a figure to the tracker."""
        self._track(lambda tracker: tracker.figure(path, step))

    def _track(self, send: Callable[[Tracker], None]) -> None:
        """Use the tracker, if there is one; a tracker that fails is dropped."""
        tracker, self.tracker = self.tracker, None
        if tracker is not None:
            with by_product(f"tracker {tracker.name} fails and is", self.report):
                send(tracker)
                self.tracker = tracker

    def report(self, text: str) -> None:
        """Print above the progress bar."""
        if self.is_writer:
            with tqdm.external_write_mode():
                print(plain(text), flush=True)

    def pause(self) -> float:
        """The present time, for `go_on`: the time between the two calls is not counted as training."""
        return time.perf_counter()

    def go_on(self, paused: float) -> None:
        """Leave the time since `paused` out of rates and estimates."""
        self._since += time.perf_counter() - paused
        self._start += time.perf_counter() - paused

    def close(self) -> None:
        self.bar.close()
        self._track(lambda tracker: tracker.finish())


def memory_mib() -> float:
    """Memory of this process in MiB: the peak that it reserved on its GPU; without a GPU, its resident memory now."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 2**20
    return psutil.Process().memory_info().rss / 2**20


class CollapseAlarm:
    """Raised once, when `patience` log intervals in a row look collapsed: one alone may be chance.

    Ten healthy ones in a row arm it again, and `is_over` is True at the tenth.
    """

    def __init__(self, patience: int = 3, calm: int = 10) -> None:
        self.patience, self.calm = patience, calm
        self._armed, self._bad, self._good = True, 0, 0

    @property
    def is_over(self) -> bool:
        return self._good == self.calm

    def raised(self, diagnosis: str | None) -> bool:
        """Note an interval's diagnosis; True if it is the one to warn at."""
        self._bad, self._good = (self._bad + 1, 0) if diagnosis else (0, self._good + 1)
        if self.is_over:
            self._armed = True
        if self._armed and self._bad == self.patience:
            self._armed = False
            return True
        return False


def last_value(path: Path, name: str) -> float | None:
    """The last value of a name in metrics.jsonl; None if there is none."""
    found = None
    for line in read_lines(path):
        if f'"{name}"'.encode() in line:
            found = entry(parse_json(line, path), name, float | None, path)
    return found
