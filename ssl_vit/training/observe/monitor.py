"""What only watches a run: its log, spikes, skipped steps, bad images, collapse and profile, behind one object."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from ssl_vit.core.settings import as_plain
from ssl_vit.data.bad_images import BadImages
from ssl_vit.data.sampler import StepSampler
from ssl_vit.runs.folder import METRICS_FILE
from ssl_vit.training.faults import SkippedSteps, SpikeWatch
from ssl_vit.training.observe.metrics import CollapseAlarm, MetricLog
from ssl_vit.training.observe.profiling import StepTrace
from ssl_vit.training.observe.tracking import start_tracker
from ssl_vit.training.setup import Run, heartbeat


class Monitor:
    """Watches a run from the step that it is at; every process has one. Nothing here changes what is learned."""

    def __init__(self, run: Run, sampler: StepSampler | None) -> None:
        config, accelerator = run.config, run.accelerator
        self.run, self._start_step, is_writer = run, run.step, accelerator.is_main_process
        metrics = run.folder / METRICS_FILE
        tracker = start_tracker(config.tracking, run.folder, as_plain(config), run.step, is_writer=is_writer)
        self.log = MetricLog(
            metrics,
            start_step=run.step,
            num_steps=run.num_steps,
            batch_size=config.batch.size,
            log_every=config.log_every,
            is_writer=is_writer,
            quiet=config.quiet,
            tracker=tracker,
        )
        self.bad_images = None
        if config.data.on_bad_image == "skip":
            self.bad_images = BadImages(
                run.source,
                config.data,
                run.folder,
                metrics=metrics,
                start_step=run.step,
                num_channels=run.objective.encoder.in_chans,
                is_writer=is_writer,
            )
        self._skipped = SkippedSteps(run.faults, sampler, run.folder, config.max_skipped_steps)
        self._spikes = SpikeWatch(run.faults) if run.faults.rewinds < config.rewind_on_spike else None
        self._alarm = CollapseAlarm()
        self.trace = StepTrace(config.profile if is_writer else 0, run.folder, accelerator.device, self.log)
        run.train_step.part = self.trace.part

    @property
    def note_bad(self) -> Callable[[Any], None] | None:
        """What the loader calls with the rows of bad images; None where they end the run."""
        return self.bad_images.note if self.bad_images else None

    def timed(self, batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """The same batches; the time that each is waited for is noted."""
        while True:
            waiting = time.perf_counter()
            batch = next(batches)
            self.log.add_data_wait(time.perf_counter() - waiting)
            yield batch

    def sees_spike(self, losses: dict[str, Tensor]) -> bool:
        """Whether the loss jumped and the run is to go back; every process calls this."""
        return self._spikes is not None and self._spikes.sees_spike(losses["loss"])

    def note_step(self, losses: dict[str, Tensor], taken: Bool[Tensor, ""]) -> None:
        """Note the present step, which was taken or skipped."""
        self._skipped.note(self.run.step, taken, losses["loss"])
        self.log.add_step(losses, taken)

    def is_save_due(self) -> bool:
        """Whether the run is to be saved now."""
        done, run = self.run.step, self.run
        due = done % run.config.checkpoint.every_steps == 0 or done == run.num_steps
        return due or (self._spikes is not None and self._spikes.begins(done))  # to have something to go back to

    def report(self, settings: dict[str, float], progress: float) -> bool:
        """Write the averages since the last report, and look for a collapse; every process calls this.

        Returns:
            Whether the run is to stop because its features collapsed.
        """
        run, log = self.run, self.log
        self._skipped.settle()
        values: dict[str, float] = {name: value.item() for name, value in run.objective.diagnostics().items()}
        values |= settings
        if run.source.num_samples is not None:
            values["epoch"] = run.step * run.config.batch.size / run.source.num_samples
        values["skipped_steps"] = run.faults.skipped_steps
        if self.bad_images is not None:
            before = self.bad_images.count
            values["bad_images"] = self.bad_images.settle(run.step)
            if self.bad_images.count > before == 0:
                log.report(f"WARNING: images that cannot be decoded are passed over; see {self.bad_images.path}")
        written = log.write_interval(values, progress)
        heartbeat(run, "training", written["images_per_second"])
        # Weights that have hardly moved look like a collapse and are none.
        is_judged = progress >= float(run.config.optim.warmup) and "loss" in written
        known = {**as_plain(run.config), "num_images": run.source.num_samples}
        diagnosis = run.objective.diagnose(written, known) if is_judged else None
        if self._alarm.raised(diagnosis):
            run.faults.collapse = f"step {run.step:,}. {diagnosis}"
            log.report(f"WARNING: collapse at {run.faults.collapse}")
            return run.config.on_collapse == "stop"
        if self._alarm.is_over and run.faults.collapse:
            run.faults.collapse = ""
            log.report(f"note       no sign of collapse in the last {self._alarm.calm} log intervals")
        return False

    def check_bad_images(self) -> None:
        """Stop a run that has seen too many bad images; every process calls this after every step.

        Raises:
            ValueError: more than `data.max_bad_share` of the images cannot be decoded.
        """
        if self.bad_images is not None:
            self.bad_images.check(self.run.step * self.run.config.batch.size)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of this block out of rates and estimates."""
        began = self.log.pause()
        yield
        self.log.go_on(began)

    def close(self) -> None:
        """End log and trace; the trace first, which still writes to the log."""
        self.trace.close()
        self.log.close()
