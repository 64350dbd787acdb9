"""What is printed before a run starts."""

from pathlib import Path
from typing import TYPE_CHECKING

from ssl_vit.core.schedules import warmup_cosine
from ssl_vit.core.text import plain
from ssl_vit.data.sources.source import Source

if TYPE_CHECKING:
    from ssl_vit.training.setup import Run


def describe(run: "Run", precision: str, checkpoint: Path | None) -> None:
    """Print what is about to be trained, on what, and how."""
    config, accelerator = run.config, run.accelerator
    trainable = sum(parameter.numel() for parameter in run.objective.parameters() if parameter.requires_grad)
    processes = f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
    micro = f"{run.num_micro} micro-batch{'es' if run.num_micro > 1 else ''}"
    per_device = config.batch.size // (run.num_micro * accelerator.num_processes)
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
        + (", CUDA graphs" if run.block_graphs.enabled else "")
        + f"\nbatch      {config.batch.size} = {processes} x {micro} x {per_device} images"
        f"\nlr         {config.optim.peak_lr(config.batch.size):.2e} = {rule}, base_lr {config.optim.base_lr:g}"
        f"\nlength     {run.num_steps:,} steps = "
        + (f"{drawn:,} images" if num_samples is None else f"{drawn / num_samples:.1f} epochs")
        + f"\nfolder     {plain(run.folder)}"
    )
    notes = [*run.source.notes, *(run.stream_loader.notes() if run.stream_loader is not None else ())]
    if accelerator.is_main_process and isinstance(run.source, Source):
        notes += [note for note in (run.source.note_of_dropped(run.objective.encoder.in_chans),) if note]
    for note in notes:
        accelerator.print(f"note       {plain(note)}")
    if config.extended:
        (step, length), peak = config.extended[-1], config.optim.peak_lr(config.batch.size)
        done = config.progress(step, run.num_steps)
        lr = warmup_cosine(done, float(config.optim.warmup), peak, config.optim.min_lr)
        how = "schedules begin anew" if done == 0 else f"schedules are stretched from progress {done:.3g}"
        accelerator.print(f"lengthened at step {step:,} of {length:,}: {how}, lr {lr:.2e}, to step {run.num_steps:,}")
    if checkpoint is not None:
        accelerator.print(f"Going on from {plain(checkpoint)}, step {run.step:,} of {run.num_steps:,}")
