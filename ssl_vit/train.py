"""The training loop, the same for every objective, read from top to bottom."""

import sys
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from ssl_vit import results
from ssl_vit.checkpoint import load_checkpoint, prune_checkpoints, save_checkpoint
from ssl_vit.config import RunConfig, parse_run, section
from ssl_vit.data.bad_images import BadImages
from ssl_vit.data.loader import build_loader, choose_num_workers
from ssl_vit.data.sampler import StepSampler
from ssl_vit.data.sources import Source, open_source
from ssl_vit.distributed import (
    EXIT_COLLAPSED,
    EXIT_STOPPED,
    PATIENCE,
    StopSignal,
    on_main_process,
    resolve_precision,
    seed_step,
    start_processes,
)
from ssl_vit.export.provenance import facts
from ssl_vit.metrics import CollapseAlarm, MetricLog
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.vit import choose_attention
from ssl_vit.objectives.objective import Objective, Transform
from ssl_vit.optim import build_optimizer, clip_gradients, set_schedule
from ssl_vit.run_folder import METRICS_FILE, RESULTS_FILE, check_run_folder, is_finished, open_run_folder
from ssl_vit.sessions import note_session

CONFIGS = Path(__file__).parents[1] / "configs"


@runtime_checkable
class Ending(Protocol):
    """What judges a run and what it ends with, given as a module: `results` for pre-training."""

    def prepare(self, config: RunConfig, source: Source) -> tuple[Source, Any]:
        """The pictures to learn from, and what `judges` is in the others; None where nothing can be judged."""
        ...

    def evaluate_in_training(
        self, config: RunConfig, accelerator: Accelerator, objective: Any, judges: Any, step: int, log: MetricLog
    ) -> None: ...

    def finish(
        self, config: RunConfig, accelerator: Accelerator, objective: Any, source: Source, judges: Any, step: int
    ) -> None:
        """Write what the run ends with, and then its results.json, by which it is known to be finished."""
        ...


@dataclass
class Run:
    """A run that is ready to train."""

    config: RunConfig
    accelerator: Accelerator
    source: Source
    judges: Any  # None where nothing has labels
    ending: Ending
    transform: Transform
    model: torch.nn.Module  # the objective as prepared by Accelerate; its forward is called through this
    objective: Objective
    optimizer: torch.optim.Optimizer
    num_steps: int
    num_micro: int
    start_step: int

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)


def main(defaults: RunConfig, quickstart: str | None = None, ending: Ending = results) -> int:
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
            print(f"error: {error}", file=sys.stderr)
            return 2
        return train(run)
    except (FloatingPointError, OSError, ValueError) as error:
        text = " ".join(str(error).split()).rstrip(".")
        print(f"error: {text}. The checkpoints before it are whole.", file=sys.stderr)
        return 1
    finally:
        if torch.distributed.is_initialized():
            PartialState().destroy_process_group()


def set_up(config: RunConfig, ending: Ending = results) -> Run:
    """Build everything a run needs, and put it where its newest checkpoint left off.

    Raises:
        ValueError: settings or data that cannot work, in one line.
    """
    check_run_folder(config)
    device = cast(torch.device, start_processes().device)
    precision = resolve_precision(config.precision, device)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision, kwargs_handlers=[PATIENCE])
    with section("batch"):
        num_micro = config.batch.num_micro(accelerator.num_processes)

    with accelerator.main_process_first():  # the first one fills the caches
        source = open_source(config.data)
        source, judges = ending.prepare(config, source)
    num_steps = config.num_steps(len(source))
    config, reasons = config.resolve(len(source), len(source.class_names))
    check_run_folder(config)
    objective = config.build_objective()
    choose_attention(objective, objective.encoder.num_patches, accelerator.device, precision)
    transform = build_transform(config, objective.encoder)

    checkpoint = on_main_process(lambda: open_run_folder(config))
    model, optimizer = accelerator.prepare(objective, build_optimizer(objective, config.optim, precision))
    start_step = 0
    if checkpoint is not None:
        start_step = resume(checkpoint, accelerator, model, optimizer)

    run = Run(
        config,
        accelerator,
        source,
        judges,
        ending,
        transform,
        model,
        objective,
        optimizer,
        num_steps,
        num_micro,
        start_step,
    )
    describe(run, precision, checkpoint)
    if accelerator.is_main_process:
        note_session(
            run.folder,
            source,
            seed=config.seed,
            start_step=start_step,
            num_processes=accelerator.num_processes,
            num_micro=num_micro,
            precision=precision,
        )
    accelerator.print("".join(f"auto       {reason}\n" for reason in reasons), end="")
    return run


def build_transform(config: RunConfig, encoder: Encoder) -> Transform:
    """What happens to an image before the objective sees it.

    Raises:
        ValueError: sizes or normalisation that do not fit the encoder.
    """
    for name in ("mean", "std"):
        values = getattr(config.data, name)
        if len(values) != encoder.in_chans:
            raise ValueError(
                f"data.{name}={values!r}: has {len(values)} values, and encoder.in_chans is {encoder.in_chans}: "
                "give one for each channel"
            )
    with section("objective"):
        return config.objective.build_transform(
            encoder.image_size, encoder.patch_size, config.data.mean, config.data.std
        )


def resume(
    checkpoint: Path,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Fill model and optimizer from a checkpoint and return the step to go on at."""
    state = load_checkpoint(checkpoint, model, optimizer)
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return state["step"]


def describe(run: Run, precision: str, checkpoint: Path | None) -> None:
    """Print what is about to be trained, on what, and how."""
    config, accelerator = run.config, run.accelerator
    trainable = sum(parameter.numel() for parameter in run.objective.parameters() if parameter.requires_grad)
    processes = f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
    micro = f"{run.num_micro} micro-batch{'es' if run.num_micro > 1 else ''}"
    per_device = config.batch.size // (run.num_micro * accelerator.num_processes)
    rule = "base_lr x batch / 256" if config.optim.lr_scaling == "linear" else "base_lr x sqrt(batch / 1024)"
    accelerator.print(
        f"data       {run.source.name}: {len(run.source):,} images"
        + (f", {len(run.source.class_names)} classes" if run.source.class_names else ", no labels")
        + (f"\n           {run.source.attribution}" if run.source.attribution else "")
        + f"\nmodel      {config.encoder.arch}, {run.objective.encoder.embed_dim} wide, "
        f"{type(run.objective).__name__}, {trainable / 1e6:.1f} M trainable parameters"
        f"\ndevice     {processes} on {accelerator.device.type}, precision {precision}"
        f"\nbatch      {config.batch.size} = {processes} x {micro} x {per_device} images"
        f"\nlr         {config.optim.peak_lr(config.batch.size):.2e} = {rule}, base_lr {config.optim.base_lr:g}"
        f"\nlength     {run.num_steps:,} steps = {run.num_steps * config.batch.size / len(run.source):.1f} epochs"
        f"\nfolder     {run.folder}"
    )
    if checkpoint is not None:
        accelerator.print(f"Going on from {checkpoint}, step {run.start_step:,} of {run.num_steps:,}")


def train(run: Run) -> int:
    """Train to the end or to a signal, saving on the way; then export and evaluate.

    Returns:
        The exit code: 0; after saving, 130 (Ctrl-C), 143 (SIGTERM) or 3 (collapse, with `on_collapse` stop).
    """
    config, accelerator, objective = run.config, run.accelerator, run.objective
    device = accelerator.device
    sampler = StepSampler(
        num_samples=len(run.source),
        batch_size=config.batch.size,
        num_steps=run.num_steps,
        seed=config.seed,
        start_step=run.start_step,
        num_micro=run.num_micro,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        order=run.source.mixture.order if run.source.mixture else None,
    )
    log = MetricLog(
        run.folder / METRICS_FILE,
        start_step=run.start_step,
        num_steps=run.num_steps,
        batch_size=config.batch.size,
        log_every=config.log_every,
        is_writer=accelerator.is_main_process,
    )
    bad_images = None
    if config.data.on_bad_image == "skip":
        bad_images = BadImages(
            run.source,
            config.data,
            run.folder,
            metrics=run.folder / METRICS_FILE,
            start_step=run.start_step,
            num_channels=objective.encoder.in_chans,
            is_writer=accelerator.is_main_process,
        )
    batches = build_loader(
        run.source,
        run.transform,
        sampler,
        num_channels=objective.encoder.in_chans,
        num_workers=choose_num_workers(config.data.num_workers, device),
        device=device,
        note_bad=bad_images.note if bad_images else None,
    )
    alarm = CollapseAlarm()
    evaluate_every = config.evaluation.every_steps
    run.model.train()
    with StopSignal().listening() as stop, closing(batches):
        for step in range(run.start_step, run.num_steps):
            results.draw_in_training(config, accelerator, objective, run.source, step, log)
            progress = step / run.num_steps
            losses: dict[str, torch.Tensor] = {}
            for micro in range(run.num_micro):
                waiting = time.perf_counter()
                batch = next(batches)
                log.add_data_wait(time.perf_counter() - waiting)
                seed_step(config.seed, step, micro, accelerator.process_index)
                last = micro == run.num_micro - 1
                with nullcontext() if last else accelerator.no_sync(run.model):
                    parts = run.model(batch, progress)
                    accelerator.backward(parts["loss"] / run.num_micro)
                for name, value in parts.items():
                    losses[name] = losses.get(name, torch.zeros((), device=device)) + value.detach() / run.num_micro
            settings = set_schedule(run.optimizer, config.optim, progress, config.batch.size)
            if config.optim.clip_grad is not None:
                accelerator.unscale_gradients(run.optimizer)
                losses["grad_norm"] = clip_gradients(objective, config.optim)
            run.optimizer.step()
            if not accelerator.optimizer_step_was_skipped:  # fp16 found an overflow and skipped the step
                objective.after_step(progress)
            run.optimizer.zero_grad()

            done = step + 1
            save_due = done % config.checkpoint.every_steps == 0 or done == run.num_steps
            # Logged before each save, so that weights are never saved after a loss that was not finite.
            settings["epoch"] = done * config.batch.size / len(run.source)
            log.add_step(losses)
            signal_number = stop.agreed()
            collapsed = False
            if save_due or signal_number or log.is_due():
                costly = {name: value.item() for name, value in objective.diagnostics().items()}
                if bad_images is not None:
                    before = bad_images.count
                    settings["bad_images"] = bad_images.settle(done)
                    if bad_images.count > before == 0:
                        log.say(f"WARNING: pictures that cannot be decoded are passed over; see {bad_images.path}")
                values = log.write_interval(costly | settings, progress)
                if bad_images is not None:
                    bad_images.check(done * config.batch.size)
                # Weights that have hardly moved look like a collapse and are none.
                diagnosis = objective.diagnose(values) if progress >= float(config.optim.warmup) else None
                if collapsed := alarm.raised(diagnosis):
                    log.say(f"WARNING: collapse at step {done:,}. {diagnosis}")
                    collapsed = config.on_collapse == "stop"
            if save_due or signal_number or collapsed:
                paused = log.pause()
                folder = save(run, done, is_last=done == run.num_steps or bool(signal_number) or collapsed)
                log.go_on(paused)
            if collapsed:
                log.close()
                accelerator.print(
                    f"Stopped at step {done:,} of {run.num_steps:,} (--on_collapse stop), saved {folder}."
                )
                return EXIT_COLLAPSED
            if signal_number:
                log.close()
                accelerator.print(
                    f"Stopped by a signal at step {done:,} of {run.num_steps:,} and saved {folder}. "
                    "The same command goes on from there."
                )
                return EXIT_STOPPED[signal_number]
            if run.judges and evaluate_every and done % evaluate_every == 0 and done < run.num_steps:
                paused = log.pause()
                run.ending.evaluate_in_training(config, accelerator, objective, run.judges, done, log)
                log.go_on(paused)
    if run.start_step < run.num_steps:
        results.draw_in_training(config, accelerator, objective, run.source, run.num_steps, log)
    log.close()
    # What the main process sees counts: it may write the file before another one looks.
    if run.start_step == run.num_steps and broadcast_object_list([is_finished(run.folder, run.num_steps)])[0]:
        accelerator.print(f"This run is finished: {run.folder / RESULTS_FILE}. --fresh starts it anew.")
        return 0
    run.ending.finish(config, accelerator, objective, run.source, run.judges, run.num_steps)
    return 0


def save(run: Run, step: int, *, is_last: bool) -> Path | None:
    """Save a checkpoint and delete those that need not stay.

    Returns:
        Its folder; None where it could not be written and the run goes on, to try again at the next save.

    Raises:
        OSError: the last one could not be written, even after those that it takes the place of were deleted.
    """
    accelerator, config = run.accelerator, run.config.checkpoint
    state: dict[str, Any] = {
        **facts(run.objective, run.source, accelerator.device, accelerator.num_processes),
        "backbone": backbone_prefix(run.objective),
        "class_names": list(run.source.class_names),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
    }
    try:
        folder = save_checkpoint(run.folder, step, run.model, run.optimizer, state)
    except OSError as error:
        if not is_last:
            accelerator.print(f"WARNING: {error}; the run goes on, and the next save tries again")
            return None
        on_main_process(lambda: prune_checkpoints(run.folder, replace(config, keep=max(1, config.keep - 1))))
        folder = save_checkpoint(run.folder, step, run.model, run.optimizer, state)
    on_main_process(lambda: prune_checkpoints(run.folder, config))
    return folder


def backbone_prefix(objective: Objective) -> str:
    """Where the backbone's parameters stand among the objective's, so that an export needs no objective."""
    backbone = objective.backbone()
    return next(f"{name}." for name, module in objective.named_modules() if module is backbone)
