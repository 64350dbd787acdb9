"""Extract all kinds of frozen features in one pass over the images."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ssl_vit.core.distributed import gather_with_gradient, process_index, world_size
from ssl_vit.data.augment.evaluation import EvalTransform
from ssl_vit.data.loader import reading
from ssl_vit.data.sources.source import Source
from ssl_vit.data.transform import Normalization
from ssl_vit.data.workers import CurrentRows, leave_signals_to_the_main_process
from ssl_vit.evaluation.left_out import without_bad
from ssl_vit.models.encoder import Encoder, eval_mode

FEATURES = ("cls", "mean", "cls+mean", "cls4", "cls4+mean")
"""Kinds of features: class token, mean of the patch tokens, class tokens of the last four blocks, and combinations.

Where there is no class token, the architecture's own pooled feature stands for it. Where fewer than four blocks share
width and grid at the end, as in Swin and ConvNeXt, `cls4` is of those."""


class EncodeSettings(NamedTuple):
    """Where and how images are encoded; none of it changes the features but for rounding."""

    batch_size: int
    """Images that a process encodes at once."""
    device: torch.device
    """Device that the encoder is on."""
    num_workers: int = 0
    """Processes that decode images; 0 = this one."""
    autocast_dtype: torch.dtype | None = None
    """Run the encoder under autocast in this type; None = without autocast."""


def select_feature(pieces: Mapping[str, Tensor], kind: str) -> Float[Tensor, "n d"]:
    """Select one kind of feature from what `extract_features` returns.

    Args:
        pieces: "cls" [n, layers, d], class tokens of the last blocks, the last one last; "mean" [n, d].
        kind: one of `FEATURES`. "cls4" takes all blocks where there are fewer than four.
    """
    layers = {"cls": 1, "cls4": 4}
    parts = [
        pieces["mean"] if name == "mean" else pieces["cls"][:, -layers[name] :].flatten(1) for name in kind.split("+")
    ]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def take(pieces: Mapping[str, Tensor], rows: Tensor | slice) -> dict[str, Tensor]:
    """Take rows of all pieces that `extract_features` returns."""
    return {name: values[rows] for name, values in pieces.items()}


def check_feature(kind: str | None) -> None:
    """Refuse an unknown kind of feature; None leaves the choice to the backbone.

    Raises:
        ValueError: in the form `feature=value: ...`.
    """
    if kind is not None and kind not in FEATURES:
        raise ValueError(f"feature={kind!r}: no such feature; choose one of {', '.join(FEATURES)}")


def check_finite(features: Tensor) -> None:
    """Refuse features that are NaN or infinite.

    Raises:
        ValueError: a number is not finite.
    """
    if not features.isfinite().all():
        raise ValueError("some features are NaN or infinite: the encoder's weights or the images are broken")


def num_layers_for(kinds: Sequence[str], encoder: Encoder) -> int:
    """Number of last blocks that these kinds of features need."""
    return min(4, encoder.num_last_layers) if any("cls4" in kind for kind in kinds) else 1


def extract_features(
    encoder: Encoder,
    source: Source,
    indices: Int[np.ndarray, " n"],
    transform: EvalTransform,
    settings: EncodeSettings,
    *,
    num_layers: int = 1,
    max_bad_share: float | None = None,
) -> dict[str, Tensor]:
    """Encode images of a source and keep all features in memory; see `stream_features`.

    Args:
        max_bad_share: leave out images that cannot be decoded, up to this share of all; None = the first one raises.

    Returns:
        fp32 tensors on the CPU: "cls" [n, num_layers, d] of the last blocks; "mean" [n, d] of the patch tokens; and
        int64 "places" [n] of these images in `indices`. Empty on other processes than the main one.

    Raises:
        ValueError: see `stream_features` and `left_out.check_bad_share`.
    """
    skip_bad = max_bad_share is not None
    batches = stream_features(encoder, source, indices, transform, settings, num_layers=num_layers, skip_bad=skip_bad)
    found = without_bad(batches, source, indices, encoder.in_chans, max_bad_share)
    return found or {name: torch.empty(0) for name in ("cls", "mean", "places")}


def stream_features(
    encoder: Encoder,
    source: Source,
    indices: Int[np.ndarray, " n"],
    transform: EvalTransform,
    settings: EncodeSettings,
    *,
    num_layers: int = 1,
    with_patches: bool = False,
    skip_bad: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Encode images of a source batch by batch in constant memory, shared among the processes.

    Every process calls this; only the main one yields features. The encoder runs in eval mode (afterwards every module
    gets its own mode back) and the global random state is neither read nor changed, so that evaluating in the middle
    of a training run does not alter the run.

    Args:
        encoder: the backbone, already on the device.
        indices: rows of the source, in the order in which the features come back.
        num_layers: number of last blocks whose class tokens are returned.
        with_patches: also return the patch tokens.
        skip_bad: encode a blank image where one cannot be decoded, and flag it; otherwise it raises.

    Returns:
        batches of fp32 tensors on the CPU: "cls" [b, num_layers, d], "mean" [b, d] and, with `with_patches`, "patches"
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

    return stream(encode, encoder, source, indices, transform, settings, encoder.in_chans, skip_bad)


def stream(
    compute: Callable[[Float[Tensor, "b c h w"]], dict[str, Tensor]],
    module: nn.Module,
    source: Source,
    indices: Int[np.ndarray, " n"],
    transform: EvalTransform,
    settings: EncodeSettings,
    num_channels: int,
    skip_bad: bool,
) -> Iterator[dict[str, Tensor]]:
    """Apply `compute` to images of a source; see `stream_features`.

    Args:
        compute: turns normalised images on the device into tensors with a row for each image.
        module: what `compute` uses; it is in eval mode meanwhile.
    """
    images = _Images(source, indices, num_channels, transform, skip_bad, settings.num_workers)
    loader = _loader(images, settings.batch_size, settings.num_workers, world_size())
    loader.pin_memory = settings.device.type == "cuda"
    left, device, dtype = len(indices), settings.device, settings.autocast_dtype
    hidden = process_index() != 0 or not sys.stderr.isatty()
    with (
        eval_mode(module),
        reading(loader, images.current, source.where) as batches,
        tqdm(total=left, desc="features", unit="image", leave=False, disable=hidden) as bar,
    ):
        for pixels, good in batches:
            with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                found = compute(transform.on_device(pixels, device))
                found["good"] = good.to(device, torch.uint8)
                found = {name: v.float() if v.is_floating_point() else v for name, v in found.items()}
                batch = {name: gather_with_gradient(values) for name, values in found.items()}
            count = min(left, settings.batch_size * world_size())
            left -= count
            bar.update(count)
            if process_index() == 0:
                # Clone outside inference mode, or the features could not be used where gradients are needed.
                batch = {name: values[:count].cpu().clone() for name, values in batch.items()}
                yield batch | {"good": batch["good"].bool()}


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
        "mean" [n, d] and "places" [n]; see `extract_features`.

    Raises:
        ValueError: no rows, or images that cannot be decoded; see `extract_features`.
    """
    transform = EvalTransform((size, size), Normalization((0.0,) * num_channels, (1.0,) * num_channels), crop_pct)
    chosen = _Images(source, indices, num_channels, transform, max_bad_share is not None, num_workers)
    with reading(_loader(chosen, 256, num_workers, 1), chosen.current, source.where) as read:
        batches = ({"mean": images.flatten(1).float() / 255, "good": good} for images, good in read)
        return without_bad(batches, source, indices, num_channels, max_bad_share)


class _Images(Dataset):
    """Chosen rows of a source at the encoder's size, each with a flag: False for a blank, undecodable image."""

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        num_channels: int,
        transform: EvalTransform,
        skip_bad: bool,
        num_workers: int,
    ) -> None:
        if len(indices) == 0:
            raise ValueError(f"source={source.name!r}: no rows were chosen, so there is nothing to encode")
        self.source, self.indices, self.num_channels, self.transform = source, indices, num_channels, transform
        self.skip_bad, self.current = skip_bad, CurrentRows(num_workers)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[UInt8[Tensor, "c h w"], bool]:
        row = int(self.indices[position])
        self.current.note(row)
        try:
            image = self.source.image(row, self.num_channels)
        except ValueError:
            if not self.skip_bad:
                raise
            return torch.zeros(self.num_channels, *self.transform.size, dtype=torch.uint8), False
        return self.transform(image, row), True


def _loader(images: _Images, batch_size: int, num_workers: int, num_processes: int) -> DataLoader:
    """Load batches in order; of several processes each loads its share, filled up with the last row."""
    if num_processes > 1:
        num_rows = len(images)
        step = batch_size * num_processes
        rounds = np.arange(-(-num_rows // step) * step).reshape(-1, num_processes, batch_size)
        images.indices = images.indices[np.minimum(rounds[:, process_index()].ravel(), num_rows - 1)]
    return DataLoader(
        images,
        batch_size=batch_size,
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),  # without its own generator a loader draws from the global one
    )
