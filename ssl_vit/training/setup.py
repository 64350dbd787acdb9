"""A run that is ready to train: what it is made of, where it goes on, and how it is saved."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from ssl_vit.core.distributed import PATIENCE, on_main_process, start_processes
from ssl_vit.core.machine import resolve_precision
from ssl_vit.core.settings import section
from ssl_vit.core.text import plain
from ssl_vit.data.bad_images import look_beforehand
from ssl_vit.data.decoded import open_decoded
from ssl_vit.data.loader import Batches
from ssl_vit.data.sampler import StepSampler
from ssl_vit.data.sources.source import Source
from ssl_vit.data.sources.stream import Stream, open_images
from ssl_vit.data.stream_loader import StreamLoader
from ssl_vit.data.transform import Transform
from ssl_vit.data.workers import choose_num_workers
from ssl_vit.models.vit import choose_attention
from ssl_vit.objectives.objective import Objective
from ssl_vit.runs.checkpoint import load_checkpoint, prune_checkpoints, save_checkpoint, step_of
from ssl_vit.runs.facts import facts
from ssl_vit.runs.heartbeat import State, beat, end_of_start
from ssl_vit.runs.provenance import note_session
from ssl_vit.training import ending
from ssl_vit.training.config import RunConfig
from ssl_vit.training.continuing import check_run_folder, go_on_as_before, open_run_folder
from ssl_vit.training.describe import describe
from ssl_vit.training.device import fsdp
from ssl_vit.training.device.compile import compile_blocks, resolve_compile
from ssl_vit.training.device.cuda_graphs import BlockGraphs, resolve_cuda_graphs
from ssl_vit.training.device.micro_batch import choose_micro_batch
from ssl_vit.training.faults import Faults
from ssl_vit.training.observe.metrics import MetricLog
from ssl_vit.training.observe.tracking import check_tracker
from ssl_vit.training.optim import build_optimizer

SPARING = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # no copy of gradients out of what DDP sends


@runtime_checkable
class Ending(Protocol):
    """What judges a run and what it ends with, given as a module: `results` for pre-training."""

    def prepare(self, config: RunConfig, source: Source | Stream) -> tuple[Source | Stream, Any]:
        """The pictures to learn from, and what `judges` is in the others; None where nothing can be judged."""
        ...

    def evaluate_in_training(
        self, config: RunConfig, accelerator: Accelerator, objective: Any, judges: Any, step: int, log: MetricLog
    ) -> None: ...

    def finish(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        objective: Any,
        source: Any,  # what prepare returned
        judges: Any,
        step: int,
        collapse: str,
    ) -> None:
        """Write what the run ends with, and then its ending.json, by which it is known to be finished.

        Args:
            collapse: when the features collapsed and how, to be repeated; empty where they did not.
        """
        ...


@dataclass
class Run:
    """A run that is ready to train."""

    config: RunConfig
    accelerator: Accelerator
    source: Source | Stream
    pictures: Source | Stream  # what is trained on: the source, or its pictures decoded beforehand
    judges: Any  # None where nothing has labels
    ending: Ending
    transform: Transform
    model: torch.nn.Module  # the objective as prepared by Accelerate; its forward is called through this
    objective: Objective
    optimizer: torch.optim.Optimizer
    num_steps: int
    num_micro: int
    compiled: bool  # blocks are torch.compile's
    block_graphs: BlockGraphs
    deadline: float  # of time.monotonic
    step: int = 0  # steps done
    faults: Faults = field(default_factory=Faults)
    stream_loader: StreamLoader | None = None  # where a stream has come to
    saves: bool = True  # False: no checkpoint is ever written, as a benchmark wants it

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def progress(self) -> float:
        """The share of the run that is done, by which all schedules go."""
        return self.config.progress(self.step, self.num_steps)


def set_up(config: RunConfig, ending: Ending = ending) -> Run:
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
    device = cast(torch.device, start_processes(config.max_wait).device)
    precision = resolve_precision(config.precision, device)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision, kwargs_handlers=[PATIENCE, SPARING])
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    with section("batch"):
        config.batch.num_micro(accelerator.num_processes)  # refuses a batch that cannot be cut

    with accelerator.main_process_first():  # the first one fills the caches
        source = open_images(config.data)
        source, judges = ending.prepare(config, source)
    config, lengthened = go_on_as_before(config, source.num_samples)
    num_steps = config.num_steps(source.num_samples)
    config, reasons = config.resolve(source.num_samples, len(source.class_names))
    check_run_folder(config)
    if config.batch.auto:
        config, reason = choose_micro_batch(config, accelerator, precision)
        reasons.append(reason)
    objective = config.build_objective()
    choose_attention(objective, objective.encoder.num_patches, accelerator.device, precision)
    transform = config.build_transform(objective.encoder)
    pictures, num_channels = source, objective.encoder.in_chans
    on_main_process(lambda: look_beforehand(source, config.data, num_channels))
    if isinstance(source, Source):
        pictures = open_decoded(source, config.data, num_channels)
    if pictures is not source:  # decoded beforehand, so that all of its bad images are known
        on_main_process(lambda: look_beforehand(pictures, config.data, num_channels))

    accelerator.wait_for_everyone()  # so that nobody checks a folder that is being made
    config, checkpoint = on_main_process(lambda: open_run_folder(config, lengthened))
    if accelerator.is_main_process:
        done = 0 if checkpoint is None else step_of(checkpoint)
        beat(Path(config.output_dir), "starting", done, num_steps)
    optimizer = build_optimizer(objective, config.optim, precision)
    compiled = resolve_compile(config.compile, accelerator.device, num_steps, accelerator.is_fsdp2)
    num_micro = config.batch.num_micro(accelerator.num_processes)
    graphed = resolve_cuda_graphs(
        config.cuda_graphs,
        accelerator.device,
        num_processes=accelerator.num_processes,
        num_micro=num_micro,
        fills_memory=config.batch.auto,
        is_sharded=accelerator.is_fsdp2,
        grad_checkpointing=config.encoder.grad_checkpointing,
    )
    model, optimizer = fsdp.prepare(accelerator, objective, optimizer, precision)
    if compiled:
        compile_blocks(objective)

    run = Run(
        config,
        accelerator,
        source,
        pictures,
        judges,
        ending,
        transform,
        model,
        objective,
        optimizer,
        num_steps,
        num_micro=num_micro,
        compiled=compiled,
        block_graphs=BlockGraphs(graphed, must_work=config.cuda_graphs is True),
        deadline=math.inf if config.max_hours is None else started + 3600 * config.max_hours,
    )
    state = {} if checkpoint is None else resume(run, checkpoint)
    if isinstance(source, Stream):
        place = (accelerator.process_index, accelerator.num_processes)
        run.stream_loader = StreamLoader.open(source, config.data, config.seed, *place, state.get("stream"))
    describe(run, precision, checkpoint)
    if accelerator.is_main_process:
        note_session(
            run.folder,
            source,
            seed=config.seed,
            start_step=run.step,
            num_steps=run.num_steps,
            num_processes=accelerator.num_processes,
            num_micro=run.num_micro,
            precision=precision,
        )
    accelerator.print("".join(f"auto       {plain(reason)}\n" for reason in reasons), end="")
    return run


def resume(run: Run, checkpoint: Path) -> dict[str, Any]:
    """Put a run where a checkpoint left off, but for its stream, and return what else is known of it."""
    state = load_checkpoint(checkpoint, run.model, run.optimizer)
    scaler = run.accelerator.scaler
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
    run.step = state["step"]
    run.faults = Faults(**state.get("faults", {}))
    return state


def as_written(run: Run) -> AbstractContextManager[Any]:
    """For what is done beside training: batches of other sizes, which are not worth compiling for."""
    return torch.compiler.set_stance("force_eager") if run.compiled else nullcontext()


def build_sampler(run: Run) -> StepSampler:
    """Which samples this process trains on, from the step that the run is at."""
    assert isinstance(run.source, Source)
    return StepSampler(
        num_samples=len(run.source),
        batch_size=run.config.batch.size,
        num_steps=run.num_steps,
        seed=run.config.seed,
        start_step=run.step,
        num_micro=run.num_micro,
        process_index=run.accelerator.process_index,
        num_processes=run.accelerator.num_processes,
        order=run.source.mixture.order if run.source.mixture else None,
    )


def open_batches(
    run: Run, sampler: StepSampler | None, note_bad: Callable[[Any], None] | None
) -> AbstractContextManager[Iterator[dict[str, torch.Tensor]]]:
    """The micro-batches of this process, from the step that the run is at; at its end the workers end."""
    num_channels, device = run.objective.encoder.in_chans, run.accelerator.device
    num_workers = choose_num_workers(run.config.data.num_workers, device)
    if run.stream_loader is None:
        assert isinstance(run.pictures, Source)
        assert sampler is not None
        return Batches(
            run.pictures,
            run.transform,
            sampler,
            num_channels=num_channels,
            num_workers=num_workers,
            device=device,
            note_bad=note_bad,
        )
    return closing(
        run.stream_loader.batches(
            run.transform,
            batch_size=run.config.batch.size,
            num_steps=run.num_steps,
            start_step=run.step,
            num_micro=run.num_micro,
            num_channels=num_channels,
            num_workers=num_workers,
            device=device,
            note_bad=note_bad,
        )
    )


def heartbeat(run: Run, state: State, images_per_second: float | None = None) -> None:
    """Tell watchers what the run is doing."""
    if run.accelerator.is_main_process:
        beat(run.folder, state, run.step, run.num_steps, images_per_second)


def save(run: Run, *, is_last: bool) -> Path | None:
    """Save a checkpoint and delete those that need not stay.

    Returns:
        Its folder; None where the run saves nothing, or goes on although it could not be written, to try again at the
        next save.

    Raises:
        OSError: the last one could not be written, even after those that it takes the place of were deleted.
    """
    if not run.saves:
        return None
    accelerator, config = run.accelerator, run.config.checkpoint
    state: dict[str, Any] = {
        **facts(run.objective, run.source, accelerator.device, accelerator.num_processes),
        "backbone": backbone_prefix(run.objective),
        "class_names": list(run.source.class_names),
        "num_steps": run.num_steps,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "faults": run.faults.to_plain(),
    }
    if run.stream_loader is not None:
        state["stream"] = run.stream_loader.state()
    try:
        folder = save_checkpoint(run.folder, run.step, run.model, run.optimizer, state)
    except OSError as error:
        if not is_last:
            accelerator.print(f"WARNING: {plain(error)}; the run goes on, and the next save tries again")
            return None
        on_main_process(lambda: prune_checkpoints(run.folder, replace(config, keep=max(1, config.keep - 1))))
        folder = save_checkpoint(run.folder, run.step, run.model, run.optimizer, state)
    on_main_process(lambda: prune_checkpoints(run.folder, config))
    return folder


def backbone_prefix(objective: Objective) -> str:
    """Where the backbone's parameters stand among the objective's, so that an export needs no objective."""
    backbone = objective.backbone()
    return next(f"{name}." for name, module in objective.named_modules() if module is backbone)
