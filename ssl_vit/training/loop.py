"""The training loop, the same for every objective, read from top to bottom."""

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from ssl_vit.core.distributed import end_processes, lost_process, on_main_process, when_others_hang
from ssl_vit.core.front import stoppable
from ssl_vit.core.shipped import folder
from ssl_vit.core.text import plain
from ssl_vit.core.watch import GO_ON
from ssl_vit.core.writing import report_error
from ssl_vit.runs.best import SCORES, Best, best_checkpoint, is_best_yet
from ssl_vit.runs.checkpoint import load_checkpoint, newest_checkpoint
from ssl_vit.runs.folder import RESULTS_FILE, is_finished, write_heartbeat
from ssl_vit.training import ending as pretraining
from ssl_vit.training.config import RunConfig, parse_run
from ssl_vit.training.device import prepare
from ssl_vit.training.device.micro_batch import explain_out_of_memory
from ssl_vit.training.faults import by_product
from ssl_vit.training.observe.metrics import MetricLog
from ssl_vit.training.observe.monitor import Monitor
from ssl_vit.training.setup import (
    Ending,
    Run,
    build_sampler,
    eager,
    heartbeat,
    open_batches,
    resume,
    save,
    set_up,
    unsharded,
)
from ssl_vit.training.signals import EXIT_COLLAPSED, EXIT_STOPPED, OUT_OF_TIME, StopSignal


@stoppable(GO_ON)
def main(defaults: RunConfig, quickstart: str | None = None, ending: Ending = pretraining) -> int:
    """Entry point of the scripts that train: read the settings, train, return the exit code.

    Without any argument `quickstart`, a file in configs/, runs. Invalid settings or data end in one line and code
    2; a fault during the run, such as an image that cannot be decoded, in one line and code 1.
    """
    args = sys.argv[1:]
    if not args and quickstart is not None:
        settings = folder("configs") / quickstart
        print(f"No settings given, so this is the quickstart: --config {settings}")
        args = [f"--config={settings}"]
    run = None
    try:
        try:
            run = set_up(parse_run(defaults, args), ending)
        except ValueError as error:
            return report_error(error)
        return train(run)
    except (FloatingPointError, OSError, ValueError) as error:
        text = " ".join(str(error).split()).rstrip(".")
        has_some = run is not None and any((run.folder / "checkpoints").glob("step-*"))
        whole = " The checkpoints before it are whole." if has_some else ""
        print(f"error: {plain(text)}.{whole}", file=sys.stderr)
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
    when_others_hang(lambda: write_heartbeat(run.folder, "failed", run.step, run.num_steps))
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
                pass  # the run went back to a checkpoint and continues from there
        if code == 0:
            with scoring(run):
                finish(run, nothing_done)
        return code
    except torch.OutOfMemoryError:
        heartbeat(run, "failed")  # explained below, after the tensors of the step are freed
    except KeyboardInterrupt:
        heartbeat(run, "stopped")
        raise
    except BaseException:
        heartbeat(run, "failed")
        raise
    step, device, num_processes = run.train_step, run.accelerator.device, run.accelerator.num_processes
    step.graphs.clear()
    step.optimizer.state.clear()
    prepare.release_reducer(step.model)
    with eager(run):
        why = explain_out_of_memory(run.config, run.objective, device, run.per_device, num_processes)
    raise ValueError(why + ("; --cuda_graphs false needs less" if step.graphs.enabled else ""))


def train_steps(run: Run, stop: StopSignal) -> int | None:
    """The loop, from the step that the run is at to its end or to what stops it.

    Returns:
        The exit code, or None where the run went back to a checkpoint and is to go on from there.
    """
    sampler = None if run.stream_loader is not None else build_sampler(run)
    monitor = Monitor(run, sampler)
    log, start_step = monitor.log, run.step
    run.train_step.model.train()
    heartbeat(run, "training")
    with open_batches(run, sampler, monitor.note_bad) as batches, closing(monitor):
        batches = monitor.timed(batches)
        evaluate(run, monitor)  # the weights that it starts from, or those of a step that a kill left without scores
        while run.step < run.num_steps:
            monitor.trace.next_step()
            draw_figure(run, monitor)
            progress = run.progress
            losses = run.train_step.forward_backward(batches, run.step, progress)
            if monitor.sees_spike(losses) and go_back(run, log):
                return None
            settings, taken = run.train_step.update(losses, progress)
            monitor.note_step(losses, taken)
            run.step += 1
            save_due, signal_number, collapsed = monitor.is_save_due(), stop.agreed(), False
            if save_due or signal_number or log.is_due():
                collapsed = monitor.report(settings, progress)
            if save_due or signal_number or collapsed:
                is_last = run.step == run.num_steps or bool(signal_number) or collapsed
                with monitor.paused(), monitor.trace.part("checkpoint"):
                    folder = save(run, is_last=is_last)
                if signal_number or collapsed:
                    return stopped(run, folder, signal_number)
            monitor.check_bad_images()
            evaluate(run, monitor)
        if start_step < run.num_steps:
            draw_figure(run, monitor)
    return 0


def evaluate(run: Run, monitor: Monitor) -> None:
    """Score the backbone as it is now, where that is due and not done, and save it if it is the best to be kept."""
    config, by = run.config, run.config.checkpoint.keep_best
    if not is_evaluation_due(run) or on_main_process(lambda: monitor.log.is_scored(run.step)):
        return
    with monitor.paused(), scoring(run):
        heartbeat(run, "evaluating")
        run.train_step.graphs.clear()  # the memory of a step, which the evaluation may need
        objective = unsharded(run)
        with eager(run), by_product(f"evaluation at step {run.step:,}", monitor.log.report, shared=True):
            run.ending.evaluate_in_training(config, run.accelerator, objective, run.eval_data, run.step, monitor.log)
        if run.step and by in SCORES and on_main_process(lambda: is_best_yet(run.folder, by, run.step)):
            save(run, is_last=False)


@contextmanager
def scoring(run: Run) -> Iterator[None]:
    """Say that memory was too small for the scores, not for a step.

    Raises:
        ValueError: it did not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = run.config.evaluation.batch_size
        raise ValueError(
            f"out of memory while scoring, with {size} images at once; lower --evaluation.batch_size"
        ) from error


def is_evaluation_due(run: Run) -> bool:
    """Whether to score the backbone at this step; at the end of the run `finish` does it, unless scores choose."""
    every, step = run.config.evaluation.every_steps, run.step
    if run.eval_data is None or every is None:
        return False
    if step == 0:  # of the weights that it starts from; a new head has nothing to be scored
        return run.config.encoder.pretrained is not None and run.objective.leaves == "backbone"
    if step == run.num_steps:
        return run.config.checkpoint.keep_best in SCORES
    return step % every == 0


def draw_figure(run: Run, monitor: Monitor) -> None:
    """Draw what is known before the next step, where a figure is due."""
    if pretraining.is_figure_due(run.config, run.step, run.num_steps):
        with monitor.paused():
            objective = unsharded(run)
            with eager(run), by_product(f"figure at step {run.step:,}", monitor.log.report):
                pretraining.draw_in_training(run.config, run.accelerator, objective, run.source, run.step, monitor.log)


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


def go_back(run: Run, log: MetricLog) -> bool:
    """Put a run whose loss jumped in its present step behind that step, with the weights of its newest checkpoint.

    Nothing is learned from the samples since that checkpoint. The run is saved at once, so that a kill does not take it
    back before the jump.

    Returns:
        Whether there was a checkpoint.
    """
    faults, step = run.faults, run.step
    checkpoint = on_main_process(lambda: newest_checkpoint(run.folder))
    if checkpoint is None:  # none could be written
        log.report(f"WARNING: the loss jumped in step {step + 1:,}, and no checkpoint is there to go back to.")
        return False
    run.train_step.optimizer.zero_grad()
    run.train_step.optimizer.state.clear()
    resume(run, checkpoint)
    log.report(
        f"WARNING: the loss jumped in step {step + 1:,}. Back to {checkpoint} and on from step {step + 1:,}, past the "
        f"samples since then (rewind {faults.rewinds + 1} of {run.config.rewind_on_spike})."
    )
    log.write({"step": step + 1, "rewound_to": run.step})
    run.step = step + 1
    run.faults = replace(faults, rewinds=faults.rewinds + 1, recent_losses=run.faults.recent_losses)
    save(run, is_last=False)
    return True


def finish(run: Run, nothing_done: bool) -> None:
    """Write the final outputs, unless they existed when the run had nothing left to do."""
    config, accelerator = run.config, run.accelerator
    if nothing_done and is_done(run):
        accelerator.print(f"This run is finished: {run.folder / RESULTS_FILE}. --fresh starts it anew.")
    else:
        heartbeat(run, "finishing")
        run.train_step.graphs.clear()
        best = load_best(run)
        objective = unsharded(run)
        with eager(run):
            eval_data, collapse = run.eval_data, run.faults.collapse
            run.ending.finish(config, accelerator, objective, run.source, eval_data, run.num_steps, collapse, best)
    if run.faults.collapse:
        accelerator.print(f"WARNING: the features of this backbone collapsed at {plain(run.faults.collapse)}")
    heartbeat(run, "finished")


def load_best(run: Run) -> Best | None:
    """Put the weights of the best checkpoint into a run that has ended; None if they are the last, or none are kept."""
    by = run.config.checkpoint.keep_best
    best = on_main_process(lambda: best_checkpoint(run.folder, by)) if run.saves else None
    if by != "none" and best is None:
        run.accelerator.print(f"note       no checkpoint has a {by}, so the last weights are exported")
    if best is None or best.step == run.step:
        return None
    run.accelerator.print(f"best       {best}: its weights are exported and scored, not those of step {run.step:,}")
    state = load_checkpoint(best.folder, run.train_step.model, run.train_step.optimizer)
    run.faults = replace(run.faults, collapse=state.get("faults", {}).get("collapse", ""))  # that of these weights
    return best


def is_done(run: Run) -> bool:
    """Whether the run has all its steps and everything it ends with; every process calls this."""
    # The main process decides: it may write the file before another process looks.
    return broadcast_object_list([run.step == run.num_steps and is_finished(run.folder, run.num_steps)])[0]
