"""The training loop, the same for every objective, read from top to bottom."""

import sys
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import broadcast_object_list

from ssl_vit.core.distributed import end_processes, lost_process, on_main_process, when_others_hang
from ssl_vit.core.front import stoppable
from ssl_vit.core.settings import as_plain
from ssl_vit.core.text import plain
from ssl_vit.core.writing import tell_error
from ssl_vit.data.bad_images import BadImages
from ssl_vit.runs.checkpoint import newest_checkpoint
from ssl_vit.runs.folder import METRICS_FILE, RESULTS_FILE, is_finished
from ssl_vit.runs.heartbeat import beat
from ssl_vit.training import ending
from ssl_vit.training.by_products import by_product
from ssl_vit.training.config import RunConfig, parse_run
from ssl_vit.training.device import fsdp
from ssl_vit.training.device.micro_batch import explain_out_of_memory
from ssl_vit.training.faults import SkippedSteps, SpikeWatch, spread, take_step
from ssl_vit.training.observe.metrics import CollapseAlarm, MetricLog
from ssl_vit.training.observe.profiling import StepTrace
from ssl_vit.training.observe.tracking import start_tracker
from ssl_vit.training.optim import clip_gradients, clip_groups, set_schedule
from ssl_vit.training.setup import Ending, Run, as_written, build_sampler, heartbeat, open_batches, resume, save, set_up
from ssl_vit.training.signals import EXIT_COLLAPSED, EXIT_STOPPED, OUT_OF_TIME, StopSignal
from ssl_vit.training.step import seed_step

GO_ON = "The same command goes on from the newest checkpoint."
CONFIGS = Path(__file__).parents[2] / "configs"


@stoppable("The same command goes on from the newest checkpoint.")
def main(defaults: RunConfig, quickstart: str | None = None, ending: Ending = ending) -> int:
    """Entry point of the scripts that train: read the settings, train, return the exit code.

    Without any argument `quickstart`, a file in configs/, runs. Settings or data that cannot work end in one line and
    code 2; what goes wrong on the way, such as an image that cannot be decoded, in one line and code 1.
    """
    args = sys.argv[1:]
    if not args and quickstart is not None:
        print(f"No settings given, so this is the quickstart: --config {CONFIGS / quickstart}")
        args = [f"--config={CONFIGS / quickstart}"]
    try:
        try:
            run = set_up(parse_run(defaults, args), ending)
        except ValueError as error:
            return tell_error(error)
        return train(run)
    except (FloatingPointError, OSError, ValueError) as error:
        text = " ".join(str(error).split()).rstrip(".")
        print(f"error: {plain(text)}. The checkpoints before it are whole.", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not lost_process(error):
            raise
        reason = plain(" ".join(str(error).split()), 200)
        print(f"error: another process of this run ended or cannot be reached ({reason}). {GO_ON}", file=sys.stderr)
        return 1
    finally:
        end_processes()


def train(run: Run) -> int:
    """Train to the end or to a signal, saving on the way; then export and evaluate.

    Returns:
        The exit code: 0; after saving, 128 + the signal (130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1), 75 (`max_hours` are
        over) or 3 (collapse, with `on_collapse` stop).

    Raises:
        FloatingPointError: too many steps in a row were skipped.
        ValueError: the device's memory does not suffice, or an image cannot be decoded.
    """
    nothing_done = run.step == run.num_steps
    when_others_hang(lambda: beat(run.folder, "failed", run.step, run.num_steps))
    if run.faults.collapse and run.config.on_collapse == "stop" and not is_done(run):
        heartbeat(run, "stopped")
        run.accelerator.print(
            f"This run stopped since it collapsed at {plain(run.faults.collapse)}\n"
            "--on_collapse warn goes on with it, --fresh starts it anew."
        )
        return EXIT_COLLAPSED
    try:
        with StopSignal(run.deadline).listening() as stop:
            while (code := train_steps(run, stop)) is None:
                pass  # went back, and goes on from there
        if code == 0:
            finish(run, nothing_done)
        return code
    except torch.OutOfMemoryError:
        heartbeat(run, "failed")  # and what it means is said outside, where the tensors of the step are gone
    except KeyboardInterrupt:
        heartbeat(run, "stopped")
        raise
    except BaseException:
        heartbeat(run, "failed")
        raise
    device, num_processes = run.accelerator.device, run.accelerator.num_processes
    per_device = run.config.batch.size // (run.num_micro * num_processes)
    run.block_graphs.clear()
    run.optimizer.state.clear()
    with as_written(run):
        why = explain_out_of_memory(run.config, run.objective, device, per_device, num_processes)
    raise ValueError(why + ("; --cuda_graphs false needs less" if run.block_graphs.enabled else ""))


def train_steps(run: Run, stop: StopSignal) -> int | None:
    """The loop, from where the run is to its end or to what stops it.

    Returns:
        The exit code, or None where the run went back to a checkpoint and is to go on from there.
    """
    config, accelerator, objective = run.config, run.accelerator, run.objective
    device, start_step = accelerator.device, run.step
    sampler = None if run.stream_loader is not None else build_sampler(run)
    log = MetricLog(
        run.folder / METRICS_FILE,
        start_step=start_step,
        num_steps=run.num_steps,
        batch_size=config.batch.size,
        log_every=config.log_every,
        is_writer=accelerator.is_main_process,
        quiet=config.quiet,
        tracker=start_tracker(
            config.tracking, run.folder, as_plain(config), start_step, is_writer=accelerator.is_main_process
        ),
    )
    bad_images = None
    if config.data.on_bad_image == "skip":
        bad_images = BadImages(
            run.source,
            config.data,
            run.folder,
            metrics=run.folder / METRICS_FILE,
            start_step=start_step,
            num_channels=objective.encoder.in_chans,
            is_writer=accelerator.is_main_process,
        )
    skipped = SkippedSteps(run.faults, sampler, run.folder, config.max_skipped_steps)
    spikes = SpikeWatch(run.faults) if run.faults.rewinds < config.rewind_on_spike else None
    clipped = clip_groups(objective, config.optim)
    alarm = CollapseAlarm()
    trace = StepTrace(config.profile if accelerator.is_main_process else 0, run.folder, device, log)
    evaluate_every = config.evaluation.every_steps
    run.model.train()
    heartbeat(run, "training")
    note_bad = bad_images.note if bad_images else None
    with open_batches(run, sampler, note_bad) as batches, closing(log), closing(trace):
        for step in range(start_step, run.num_steps):
            trace.next_step()
            draw_picture(run, step, log)
            progress = run.progress
            losses: dict[str, torch.Tensor] = {}
            for micro in range(run.num_micro):
                waiting = time.perf_counter()
                with trace.part("data wait"):
                    batch = next(batches)
                log.add_data_wait(time.perf_counter() - waiting)
                seed_step(config.seed, step, micro, accelerator.process_index)
                last = micro == run.num_micro - 1
                with nullcontext() if last else accelerator.no_sync(run.model):
                    with trace.part("forward"), run.block_graphs.active():
                        parts = run.model(batch, progress)
                    with trace.part("backward"):
                        accelerator.backward(spread(parts["loss"]) / run.num_micro)
                for name, value in parts.items():
                    share = value.detach() / run.num_micro
                    losses[name] = losses[name] + share if name in losses else share
            if spikes is not None and spikes.sees_spike(losses["loss"]):
                go_back(run, step, log)
                return None
            settings = set_schedule(run.optimizer, config.optim, progress, config.batch.size)
            with trace.part("optimizer"):
                accelerator.unscale_gradients(run.optimizer)
                losses["grad_norm"] = clip_gradients(clipped, config.optim.clip_grad)
                taken = take_step(accelerator, run.optimizer, losses["grad_norm"])
            with trace.part("after step"):
                objective.after_step(progress, taken)
            run.optimizer.zero_grad()
            skipped.note(step, taken, losses["loss"])

            run.step = done = step + 1
            save_due = done % config.checkpoint.every_steps == 0 or done == run.num_steps
            save_due |= spikes is not None and spikes.begins(done)  # to have something to go back to
            if run.source.num_samples is not None:
                settings["epoch"] = done * config.batch.size / run.source.num_samples
            log.add_step(losses, taken)
            signal_number = stop.agreed()
            collapsed = False
            if save_due or signal_number or log.is_due():
                skipped.settle()
                settings["skipped_steps"] = run.faults.skipped_steps
                costly = {name: value.item() for name, value in objective.diagnostics().items()}
                if bad_images is not None:
                    before = bad_images.count
                    settings["bad_images"] = bad_images.settle(done)
                    if bad_images.count > before == 0:
                        log.say(f"WARNING: pictures that cannot be decoded are passed over; see {bad_images.path}")
                values = log.write_interval(costly | settings, progress)
                heartbeat(run, "training", values["images_per_second"])
                # Weights that have hardly moved look like a collapse and are none.
                judged = progress >= float(config.optim.warmup) and "loss" in values
                known = {**as_plain(config), "num_images": run.source.num_samples}
                diagnosis = objective.diagnose(values, known) if judged else None
                if collapsed := alarm.raised(diagnosis):
                    run.faults.collapse = f"step {done:,}. {diagnosis}"
                    log.say(f"WARNING: collapse at {run.faults.collapse}")
                    collapsed = config.on_collapse == "stop"
                elif alarm.is_over and run.faults.collapse:
                    run.faults.collapse = ""
                    log.say(f"note       no sign of collapse in the last {alarm.calm} log intervals")
            if save_due or signal_number or collapsed:
                paused = log.pause()
                with trace.part("checkpoint"):
                    folder = save(run, is_last=done == run.num_steps or bool(signal_number) or collapsed)
                log.go_on(paused)
                if signal_number or collapsed:
                    return stopped(run, folder, signal_number)
            if bad_images is not None:
                bad_images.check(done * config.batch.size)
            if run.judges and evaluate_every and done % evaluate_every == 0 and done < run.num_steps:
                paused = log.pause()
                heartbeat(run, "evaluating")
                run.block_graphs.clear()  # the memory of a step, which the evaluation may need
                judged_objective = fsdp.whole(config, run.model, objective, device)
                with as_written(run), by_product(f"evaluation at step {done:,}", log.say, shared=True):
                    run.ending.evaluate_in_training(config, accelerator, judged_objective, run.judges, done, log)
                log.go_on(paused)
        if start_step < run.num_steps:
            draw_picture(run, run.num_steps, log)
    return 0


def draw_picture(run: Run, step: int, log: MetricLog) -> None:
    """Draw what is known before `step`, where a picture is due."""
    if ending.is_picture_due(run.config, step, run.num_steps):
        paused = log.pause()
        objective = fsdp.whole(run.config, run.model, run.objective, run.accelerator.device)
        with as_written(run), by_product(f"figure at step {step:,}", log.say):
            ending.draw_in_training(run.config, run.accelerator, objective, run.source, step, log)
        log.go_on(paused)


def stopped(run: Run, folder: Path | None, signal_number: int) -> int:
    """Say why a run stopped that has just been saved; signal number 0 is a collapse."""
    where = f"at step {run.step:,} of {run.num_steps:,}"
    heartbeat(run, "stopped")
    if not signal_number:
        run.accelerator.print(
            f"Stopped {where} (--on_collapse stop), saved {folder}. --on_collapse warn goes on from there."
        )
        return EXIT_COLLAPSED
    why = f"after {run.config.max_hours:g} hours" if signal_number == OUT_OF_TIME else "by a signal"
    run.accelerator.print(f"Stopped {why} {where} and saved {folder}. The same command goes on from there.")
    return EXIT_STOPPED[signal_number]


def go_back(run: Run, step: int, log: MetricLog) -> None:
    """Put a run whose loss jumped in `step` behind that step, with the weights of its newest checkpoint.

    What was drawn since that checkpoint is not learned from. It is saved at once, so that the run is there to stay.
    """
    faults = run.faults
    # There is one from `SpikeWatch.begins` on.
    checkpoint = cast(Path, on_main_process(lambda: newest_checkpoint(run.folder)))
    run.optimizer.zero_grad()
    run.optimizer.state.clear()
    resume(run, checkpoint)
    log.say(
        f"WARNING: the loss jumped in step {step + 1:,}. Back to {checkpoint} and on from step {step + 1:,}, past the "
        f"samples since then (rewind {faults.rewinds + 1} of {run.config.rewind_on_spike})."
    )
    log.write({"step": step + 1, "rewound_to": run.step})
    run.step = step + 1
    run.faults = replace(faults, rewinds=faults.rewinds + 1, recent_losses=run.faults.recent_losses)
    save(run, is_last=True)


def finish(run: Run, nothing_done: bool) -> None:
    """Write what a run ends with, unless it was there when nothing was left to do."""
    config, accelerator = run.config, run.accelerator
    if nothing_done and is_done(run):
        accelerator.print(f"This run is finished: {run.folder / RESULTS_FILE}. --fresh starts it anew.")
    else:
        heartbeat(run, "finishing")
        run.block_graphs.clear()
        objective = fsdp.whole(config, run.model, run.objective, accelerator.device)
        with as_written(run):
            judges, collapse = run.judges, run.faults.collapse
            run.ending.finish(config, accelerator, objective, run.source, judges, run.num_steps, collapse)
    if run.faults.collapse:
        accelerator.print(f"WARNING: the features of this backbone collapsed at {plain(run.faults.collapse)}")
    heartbeat(run, "finished")


def is_done(run: Run) -> bool:
    """Whether the run has all its steps and everything it ends with; every process calls this."""
    # What the main process sees counts: it may write the file before another one looks.
    return broadcast_object_list([run.step == run.num_steps and is_finished(run.folder, run.num_steps)])[0]
