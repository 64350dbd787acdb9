"""A run that is ready to train: what it is made of, where it goes on, and how it is saved."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from ssl_vit.core.distributed import PROCESS_GROUP_KWARGS, on_main_process, start_processes
from ssl_vit.core.machine import resolve_precision
from ssl_vit.core.settings import section
from ssl_vit.core.text import plain
from ssl_vit.data.bad_images import look_beforehand
from ssl_vit.data.decoded import open_decoded
from ssl_vit.data.loader import Batches
from ssl_vit.data.sampler import StepSampler
from ssl_vit.data.sources.source import Source
from ssl_vit.data.sources.stream import Stream, open_images
from ssl_vit.data.stream_loader import StreamLoader, passing_errors_on
from ssl_vit.data.tiles import cut_into_tiles
from ssl_vit.data.workers import choose_num_workers
from ssl_vit.models.vit import choose_attention
from ssl_vit.objectives.objective import Objective
from ssl_vit.runs.best import Best, check_keep_best, tidy
from ssl_vit.runs.checkpoint import load_checkpoint, save_checkpoint, step_of
from ssl_vit.runs.folder import State, end_of_start, write_heartbeat
from ssl_vit.runs.provenance import facts, note_session
from ssl_vit.training import ending as pretraining
from ssl_vit.training.config import RunConfig
from ssl_vit.training.continuing import check_run_folder, go_on_as_before, length_of, open_run_folder
from ssl_vit.training.device import prepare
from ssl_vit.training.device.cuda_graphs import BlockGraphs, resolve_cuda_graphs
from ssl_vit.training.device.memory import check_pair
from ssl_vit.training.device.micro_batch import choose_micro_batch
from ssl_vit.training.device.prepare import compile_blocks, resolve_compile
from ssl_vit.training.faults import Faults
from ssl_vit.training.observe.metrics import MetricLog
from ssl_vit.training.observe.tracking import check_tracker
from ssl_vit.training.optim import build_optimizer
from ssl_vit.training.step import TrainingStep

DDP_KWARGS = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # gradients are views into DDP's buckets


@runtime_checkable
class Ending(Protocol):
    """Evaluation and final outputs of a run, given as a module: `training.ending` for pre-training."""

    def prepare(self, config: RunConfig, source: Source | Stream) -> tuple[Source | Stream, Any]:
        """The images to learn from, and the `eval_data` that the other functions get; None if nothing can be scored."""
        ...

    def evaluate_in_training(
        self, config: RunConfig, accelerator: Accelerator, objective: Any, eval_data: Any, step: int, log: MetricLog
    ) -> None: ...

    def finish(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        objective: Any,
        source: Any,  # what prepare returned
        eval_data: Any,
        step: int,
        collapse: str,
        best: Best | None,
    ) -> None:
        """Write the final outputs, and then results.json, which marks the run as finished.

        Args:
            collapse: when and how the features collapsed, to be repeated; empty if they did not.
            best: the checkpoint of the weights, if they are not the last.
        """
        ...


@dataclass
class Run:
    """A run that is ready to train."""

    config: RunConfig
    accelerator: Accelerator
    ending: Ending
    source: Source | Stream
    images: Source | Stream
    """What is trained on: the source, or its images decoded beforehand."""
    eval_data: Any
    """What scores the run; None where nothing has labels."""
    objective: Objective
    train_step: TrainingStep
    num_steps: int
    deadline: float
    """Of time.monotonic."""
    compiled: bool = False
    """Whether blocks are torch.compile's."""
    step: int = 0
    """Steps done."""
    faults: Faults = field(default_factory=Faults)
    stream_loader: StreamLoader | None = None
    """Where a streamed source has come to."""
    saves: bool = True
    """False: no checkpoint is ever written, as a benchmark wants it."""

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def progress(self) -> float:
        """The share of the run that is done; all schedules follow from it."""
        return self.config.progress(self.step, self.num_steps)

    @property
    def per_device(self) -> int:
        """Images of a micro-batch."""
        return self.config.batch.size // (self.train_step.num_micro * self.accelerator.num_processes)


def set_up(config: RunConfig, ending: Ending = pretraining) -> Run:
    """Build everything a run needs, and put it where its newest checkpoint left off.

    Raises:
        ValueError: settings or data that cannot work, in one line.
    """
    try:
        return _set_up(config, ending)
    except BaseException as error:
        end_of_start(Path(config.output_dir), error)
        raise


def _set_up(config: RunConfig, ending: Ending) -> Run:
    started = time.monotonic()
    check_run_folder(config)
    check_tracker(config.tracking)
    accelerator, precision = _start(config)
    check_pair(config)
    with accelerator.main_process_first():  # the main process fills the caches
        source, eval_data = ending.prepare(config, open_images(config.data))
        source = cut_into_tiles(source, config.data) if isinstance(source, Source) else source
    config, lengthened, reasons = go_on_as_before(config, source.num_samples)
    num_steps = config.num_steps(source.num_samples)
    config, why = config.resolve(source.num_samples, len(source.class_names))
    check_run_folder(config)
    if config.batch.auto:
        config, reason = choose_micro_batch(config, accelerator, precision)
        why.append(reason)
    objective = config.build_objective()
    check_keep_best(config.checkpoint, objective, has_labels=eval_data is not None)
    choose_attention(objective, objective.encoder.attention_length, accelerator.device, precision)
    images = _open_decoded(source, config, objective.encoder.in_chans)
    accelerator.wait_for_everyone()  # no process may check a folder while it is created
    config, checkpoint = on_main_process(lambda: open_run_folder(config, lengthened, objective.frozen))
    num_steps = num_steps if checkpoint is None else length_of(config, checkpoint, num_steps)
    if accelerator.is_main_process:
        write_heartbeat(Path(config.output_dir), "starting", step_of(checkpoint) if checkpoint else 0, num_steps)
    is_plain = objective.encoder.has_plain_blocks
    compiled = resolve_compile(config.compile, accelerator.device, num_steps, accelerator.is_fsdp2, is_plain)
    run = Run(
        config,
        accelerator,
        ending,
        source,
        images,
        eval_data,
        objective,
        _prepare_step(config, accelerator, objective, precision, compiled=compiled),
        num_steps,
        deadline=math.inf if config.max_hours is None else started + 3600 * config.max_hours,
        compiled=compiled,
    )
    before = None if checkpoint is None else resume(run, checkpoint).get("stream")
    if isinstance(source, Stream):
        place = accelerator.process_index, accelerator.num_processes
        run.stream_loader = StreamLoader.open(source, config.data, config.seed, *place, before)
    describe(run, precision, checkpoint)
    if accelerator.is_main_process:
        note_session(
            run.folder,
            source,
            seed=config.seed,
            start_step=run.step,
            num_steps=run.num_steps,
            num_processes=accelerator.num_processes,
            num_micro=run.train_step.num_micro,
            precision=precision,
        )
    accelerator.print("".join(f"auto       {plain(reason)}\n" for reason in (*reasons, *why)), end="")
    return run


def _start(config: RunConfig) -> tuple[Accelerator, str]:
    """The processes of the run and the precision that they compute in.

    Raises:
        ValueError: a precision that the device lacks, or a batch that cannot be cut among the processes.
    """
    device = cast(torch.device, start_processes(config.max_wait).device)
    precision = resolve_precision(config.precision, device)
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision=precision, kwargs_handlers=[PROCESS_GROUP_KWARGS, DDP_KWARGS]
    )
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.tf32  # of convolutions
    with section("batch"):
        config.batch.num_micro(accelerator.num_processes)
    return accelerator, precision


def _open_decoded(source: Source | Stream, config: RunConfig, num_channels: int) -> Source | Stream:
    """The images to train on, decoded beforehand if `data.cache` says so; bad images are reported once."""
    on_main_process(lambda: look_beforehand(source, config.data, num_channels))
    if not isinstance(source, Source):
        return source
    images = open_decoded(source, config.data, num_channels)
    if images is not source:  # decoded, so all bad images are known
        on_main_process(lambda: look_beforehand(images, config.data, num_channels))
    return images


def _prepare_step(
    config: RunConfig, accelerator: Accelerator, objective: Objective, precision: str, *, compiled: bool
) -> TrainingStep:
    """The training step of an objective that Accelerate has prepared, compiled and recorded as the settings say."""
    optimizer = build_optimizer(objective, config.optim, precision)
    graphed = resolve_cuda_graphs(
        config.cuda_graphs,
        accelerator.device,
        num_processes=accelerator.num_processes,
        num_micro=config.batch.num_micro(accelerator.num_processes),
        fills_memory=config.batch.auto,
        is_sharded=accelerator.is_fsdp2,
        grad_checkpointing=config.encoder.grad_checkpointing,
        has_plain_blocks=objective.encoder.has_plain_blocks,
    )
    model, optimizer = prepare.prepare(accelerator, objective, optimizer, precision)
    if compiled:
        compile_blocks(objective)
    graphs = BlockGraphs(graphed, must_work=config.cuda_graphs is True)
    return TrainingStep(config, objective, model, optimizer, graphs, accelerator=accelerator)


def describe(run: Run, precision: str, checkpoint: Path | None) -> None:
    """Print what is about to be trained, on what, and how."""
    config, accelerator = run.config, run.accelerator
    trainable = sum(parameter.numel() for parameter in run.objective.parameters() if parameter.requires_grad)
    processes = f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
    micro = f"{run.train_step.num_micro} micro-batch{'es' if run.train_step.num_micro > 1 else ''}"
    rule = "base_lr x batch / 256" if config.optim.lr_scaling == "linear" else "base_lr x sqrt(batch / 1024)"
    num_samples, drawn = run.source.num_samples, run.num_steps * config.batch.size
    count = "images of unknown number" if num_samples is None else f"{num_samples:,} images"
    accelerator.print(
        f"data       {plain(run.source.name)}: {count}"
        + (f", {run.source.num_classes} classes" if run.source.num_classes else ", no labels")
        + (f"\n           {plain(run.source.attribution)}" if run.source.attribution else "")
        + f"\nmodel      {config.encoder.arch}, {run.objective.encoder.embed_dim} wide, "
        f"{run.objective.name}, {trainable / 1e6:.1f} M trainable parameters"
        f"\ndevice     {processes} on {accelerator.device.type}, precision {precision}"
        + (", compiled" if run.compiled else "")
        + (", CUDA graphs" if run.train_step.graphs.enabled else "")
        + f"\nbatch      {config.batch.size} = {processes} x {micro} x {run.per_device} images"
        f"\nlr         {config.optim.peak_lr(config.batch.size):.2e} = {rule}, base_lr {config.optim.base_lr:g}"
        f"\nlength     {run.num_steps:,} steps = "
        + (f"{drawn:,} images" if num_samples is None else f"{drawn / num_samples:.1f} epochs")
        + f"\nfolder     {plain(run.folder)}"
    )
    notes = [*config.notes(num_samples), *run.source.notes]
    if run.num_steps != (now := config.num_steps(num_samples)):
        notes.append(f"images came or went: {config.epochs:g} epochs are {now:,} steps now, and the run keeps its own")
    notes += run.stream_loader.notes() if run.stream_loader is not None else ()
    if accelerator.is_main_process and isinstance(run.source, Source):
        notes += [note for note in (run.source.note_of_dropped(run.objective.encoder.in_chans),) if note]
    for note in notes:
        accelerator.print(f"note       {plain(note)}")
    if config.extended:
        step, length = config.extended[-1]
        lr = config.optim.lr_at(done := config.progress(step, run.num_steps), config.batch.size)
        how = "schedules begin anew" if done == 0 else f"schedules are stretched from progress {done:.3g}"
        accelerator.print(f"lengthened at step {step:,} of {length:,}: {how}, lr {lr:.2e}, to step {run.num_steps:,}")
    if checkpoint is not None:
        accelerator.print(f"Going on from {plain(checkpoint)}, step {run.step:,} of {run.num_steps:,}")


def resume(run: Run, checkpoint: Path) -> dict[str, Any]:
    """Load a checkpoint into a run and return its state; the caller restores the position in a stream."""
    state = load_checkpoint(checkpoint, run.train_step.model, run.train_step.optimizer)
    if run.accelerator.scaler is not None and state["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.step = state["step"]
    run.faults = Faults(**state.get("faults", {}))
    return state


def eager(run: Run) -> AbstractContextManager[Any]:
    """Run eagerly in this block: batches of other sizes would be compiled anew."""
    return torch.compiler.set_stance("force_eager") if run.compiled else nullcontext()


def unsharded(run: Run) -> Objective:
    """The objective with unsharded parameters on every process; every process calls this."""
    return prepare.unsharded(run.config, run.train_step.model, run.objective, run.accelerator.device)


def build_sampler(run: Run) -> StepSampler:
    """Which samples this process trains on, from the step that the run is at."""
    assert isinstance(run.source, Source)
    return StepSampler(
        num_samples=len(run.source),
        batch_size=run.config.batch.size,
        num_steps=run.num_steps,
        seed=run.config.seed,
        start_step=run.step,
        num_micro=run.train_step.num_micro,
        process_index=run.accelerator.process_index,
        num_processes=run.accelerator.num_processes,
        repeats=run.config.batch.repeats,
        order=run.source.mixture.order if run.source.mixture else None,
    )


def open_batches(
    run: Run, sampler: StepSampler | None, note_bad: Callable[[Any], None] | None
) -> AbstractContextManager[Iterator[dict[str, torch.Tensor]]]:
    """The micro-batches of this process, from the step that the run is at; at its end the workers end."""
    num_channels, device = run.objective.encoder.in_chans, run.accelerator.device
    transform = run.config.build_transform(run.objective.encoder)
    num_workers = choose_num_workers(run.config.data.num_workers, device)
    if run.stream_loader is None:
        assert isinstance(run.images, Source) and sampler is not None  # noqa: PT018
        return Batches(
            run.images,
            transform,
            sampler,
            num_channels=num_channels,
            num_workers=num_workers,
            device=device,
            note_bad=note_bad,
        )
    return passing_errors_on(
        run.stream_loader.batches(
            transform,
            batch_size=run.config.batch.size,
            num_steps=run.num_steps,
            start_step=run.step,
            num_micro=run.train_step.num_micro,
            num_channels=num_channels,
            num_workers=num_workers,
            device=device,
            note_bad=note_bad,
        )
    )


def heartbeat(run: Run, state: State, images_per_second: float | None = None) -> None:
    """Write the heartbeat file, which tells what the run is doing."""
    if run.accelerator.is_main_process:
        write_heartbeat(run.folder, state, run.step, run.num_steps, images_per_second)


def save(run: Run, *, is_last: bool) -> Path | None:
    """Save a checkpoint and delete old ones.

    Returns:
        Its folder; None if the run saves nothing, or if the checkpoint could not be written and the next save tries
        again.

    Raises:
        OSError: the last checkpoint could not be written, even after older ones were deleted.
    """
    if not run.saves:
        return None
    accelerator, config, objective = run.accelerator, run.config.checkpoint, run.objective
    state: dict[str, Any] = {
        **facts(objective, run.source, accelerator.device, accelerator.num_processes),
        # Prefix of the backbone's parameters: with it an export needs no objective.
        "backbone": next(f"{name}." for name, part in objective.named_modules() if part is objective.backbone()),
        "class_names": list(run.source.class_names),
        "num_steps": run.num_steps,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "faults": run.faults.to_plain(),
    }
    if run.stream_loader is not None:
        state["stream"] = run.stream_loader.state()
    try:
        folder = save_checkpoint(run.folder, run.step, run.train_step.model, run.train_step.optimizer, state)
    except OSError as error:
        if not is_last:
            accelerator.print(f"WARNING: {plain(error)}; the run goes on, and the next save tries again")
            return None
        on_main_process(lambda: tidy(run.folder, replace(config, keep=max(1, config.keep - 1))))
        folder = save_checkpoint(run.folder, run.step, run.train_step.model, run.train_step.optimizer, state)
    on_main_process(lambda: tidy(run.folder, config))
    return folder
