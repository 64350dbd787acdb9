"""Frozen features of pictures: what every evaluation is given. One pass gives all kinds of them."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ssl_vit.core.distributed import gather_with_gradient, process_index, world_size
from ssl_vit.data.augment.evaluation import EvalTransform
from ssl_vit.data.loader import read_batches
from ssl_vit.data.sources.source import Source
from ssl_vit.data.workers import leave_signals_to_the_main_process
from ssl_vit.evaluation.left_out import without_bad
from ssl_vit.models.encoder import Encoder

FEATURES = ("cls", "mean", "cls+mean", "cls4", "cls4+mean")
"""Kinds of features: class token, mean of the patch tokens, class tokens of the last four blocks, and both together."""


def select_feature(pieces: Mapping[str, Tensor], kind: str) -> Float[Tensor, "n d"]:
    """One kind of feature out of what `extract_features` returns.

    Args:
        pieces: "cls" [n, layers, d], class tokens of the last blocks, the last one last; "mean" [n, d].
        kind: one of `FEATURES`. "cls4" takes all blocks where there are fewer than four.
    """
    parts = []
    for name in kind.split("+"):
        if name == "mean":
            parts.append(pieces["mean"])
        else:
            parts.append(pieces["cls"][:, -4 if name == "cls4" else -1 :].flatten(1))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def num_layers_for(kinds: Sequence[str], encoder: Encoder) -> int:
    """How many of the last blocks these kinds of features need."""
    return min(4, encoder.num_layers) if any("cls4" in kind for kind in kinds) else 1


def extract_features(
    encoder: Encoder,
    source: Source,
    indices: Int[np.ndarray, " n"],
    transform: EvalTransform,
    *,
    batch_size: int,
    device: torch.device,
    num_layers: int = 1,
    num_workers: int = 0,
    autocast_dtype: torch.dtype | None = None,
    max_bad_share: float | None = None,
    show_progress: bool = True,
) -> dict[str, Tensor]:
    """Encode pictures of a source, all of them at once in memory; see `stream_features`.

    Args:
        max_bad_share: images that cannot be decoded are left out, up to this share of all; None = the first one raises.

    Returns:
        fp32 tensors on the CPU: "cls" [n, num_layers, d] of the last blocks; "mean" [n, d] of the patch tokens; and
        int64 "places" [n] of these images in `indices`. On other processes than the main one they are empty.

    Raises:
        ValueError: see `stream_features` and `left_out.check_bad_share`.
    """
    batches = stream_features(
        encoder,
        source,
        indices,
        transform,
        batch_size=batch_size,
        device=device,
        num_layers=num_layers,
        num_workers=num_workers,
        autocast_dtype=autocast_dtype,
        skip_bad=max_bad_share is not None,
        show_progress=show_progress,
    )
    found = without_bad(batches, source, indices, encoder.in_chans, max_bad_share)
    return found or {name: torch.empty(0) for name in ("cls", "mean", "places")}


def stream_features(
    encoder: Encoder,
    source: Source,
    indices: Int[np.ndarray, " n"],
    transform: EvalTransform,
    *,
    batch_size: int,
    device: torch.device,
    num_layers: int = 1,
    num_workers: int = 0,
    autocast_dtype: torch.dtype | None = None,
    with_patches: bool = False,
    skip_bad: bool = False,
    show_progress: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """Encode pictures of a source, batch by batch in constant memory, shared among the processes.

    Every process calls this; the main one is given the features, the others yield nothing. The encoder runs in eval
    mode (every module gets its own mode back afterwards) and no global random state is read or changed, so that
    evaluating in the middle of a training run does not alter the run.

    Args:
        encoder: the backbone, already on `device`.
        indices: rows of the source, in the order in which the features come back.
        batch_size: pictures that a process encodes at once.
        num_layers: last blocks whose class tokens are returned.
        num_workers: processes that decode; 0 decodes in this one.
        autocast_dtype: run the encoder under autocast in this type; None = as it is.
        with_patches: return the patch tokens as well.
        skip_bad: encode a blank image where one cannot be decoded, and say so; else it raises.
        show_progress: a progress bar on stderr, where that is a terminal.

    Returns:
        batches of fp32 tensors on the CPU: "cls" [b, num_layers, d], "mean" [b, d] and, where asked for, "patches"
        [b, n, d], row-major; and the flag "good" [b], False where an image cannot be decoded.

    Raises:
        ValueError: no rows to encode, or an image that cannot be decoded.
    """

    def encode(images: Tensor) -> dict[str, Tensor]:
        layers = encoder.last_layers(images, num_layers)
        batch = {
            "cls": torch.stack([features.cls for features in layers], dim=1),
            "mean": layers[-1].patches.float().mean(dim=1),
        }
        return {**batch, "patches": layers[-1].patches} if with_patches else batch

    return stream(
        encode,
        encoder,
        source,
        indices,
        transform,
        num_channels=encoder.in_chans,
        batch_size=batch_size,
        device=device,
        num_workers=num_workers,
        autocast_dtype=autocast_dtype,
        skip_bad=skip_bad,
        show_progress=show_progress,
    )


def stream(
    compute: Callable[[Float[Tensor, "b c h w"]], dict[str, Tensor]],
    module: nn.Module,
    source: Source,
    indices: Int[np.ndarray, " n"],
    transform: EvalTransform,
    *,
    num_channels: int,
    batch_size: int,
    device: torch.device,
    num_workers: int = 0,
    autocast_dtype: torch.dtype | None = None,
    skip_bad: bool = False,
    show_progress: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """What `compute` makes of a source's pictures, see `stream_features`.

    Args:
        compute: turns normalised images on the device into tensors with a row for each image.
        module: what `compute` uses, which is put into eval mode meanwhile.
    """
    loader = _loader(source, indices, num_channels, transform, batch_size, num_workers, skip_bad)
    loader.pin_memory = device.type == "cuda"
    left = len(indices)
    with (
        _eval_mode(module),
        tqdm(total=left, desc="features", unit="image", leave=False, disable=_no_bar(show_progress)) as bar,
    ):
        for images, good in read_batches(loader):
            with (
                torch.inference_mode(),
                torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
            ):
                found = compute(transform.on_device(images, device))
                found["good"] = good.to(device, torch.uint8)
                found = {name: v.float() if v.is_floating_point() else v for name, v in found.items()}
                batch = {name: gather_with_gradient(values) for name, values in found.items()}
            count = min(left, batch_size * world_size())
            left -= count
            bar.update(count)
            if process_index() == 0:
                # Cloned out here: a tensor made under inference mode is of no use where gradients are needed.
                taken = {name: values[:count].cpu().clone() for name, values in batch.items()}
                yield taken | {"good": taken["good"].bool()}


def pixel_features(
    source: Source,
    indices: Int[np.ndarray, " n"],
    num_channels: int,
    size: int = 16,
    crop_pct: float = 1.0,
    num_workers: int = 0,
    max_bad_share: float | None = None,
) -> dict[str, Tensor]:
    """Raw pixels at `size` x `size` in [0, 1], flattened: the baseline that any learned feature has to beat.

    Returns:
        "mean" [n, d] and "places" [n], as of `extract_features`.

    Raises:
        ValueError: no rows, or images that cannot be decoded; see `extract_features`.
    """
    transform = EvalTransform((size, size), (0.0,) * num_channels, (1.0,) * num_channels, crop_pct)
    skip_bad = max_bad_share is not None
    loader = _loader(source, indices, num_channels, transform, 256, num_workers, skip_bad, shared=False)
    batches = ({"mean": images.flatten(1).float() / 255, "good": good} for images, good in read_batches(loader))
    return without_bad(batches, source, indices, num_channels, max_bad_share)


class _Images(Dataset):
    """Chosen rows of a source at the encoder's size, and whether they could be decoded: else the image is blank."""

    def __init__(
        self, source: Source, indices: np.ndarray, num_channels: int, transform: EvalTransform, skip_bad: bool
    ) -> None:
        self.source, self.indices, self.num_channels, self.transform = source, indices, num_channels, transform
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[UInt8[Tensor, "c h w"], bool]:
        row = int(self.indices[position])
        try:
            image = self.source.image(row, self.num_channels)
        except ValueError:
            if not self.skip_bad:
                raise
            return torch.zeros(self.num_channels, *self.transform.size, dtype=torch.uint8), False
        return self.transform(image, row), True


def _loader(
    source: Source,
    indices: np.ndarray,
    num_channels: int,
    transform: EvalTransform,
    batch_size: int,
    num_workers: int,
    skip_bad: bool,
    shared: bool = True,
) -> DataLoader:
    """Batches in the order of `indices`; if `shared`, each process's part of them, filled up with the last row."""
    if len(indices) == 0:
        raise ValueError(f"source={source.name!r}: no rows were chosen, so there is nothing to encode")
    if shared and world_size() > 1:
        step = batch_size * world_size()
        rounds = np.arange(-(-len(indices) // step) * step).reshape(-1, world_size(), batch_size)
        mine = np.minimum(rounds[:, process_index()].ravel(), len(indices) - 1)
        indices = indices[mine]
    return DataLoader(
        _Images(source, indices, num_channels, transform, skip_bad),
        batch_size=batch_size,
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),  # without one of its own a loader draws from the global generator
    )


def _no_bar(show_progress: bool) -> bool:
    return not (show_progress and process_index() == 0 and sys.stderr.isatty())


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    # Module by module, because parts of a model in training may deliberately be in eval mode.
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
