"""Frozen features of pictures: what every evaluation is given. One pass gives all kinds of them."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

from ssl_vit.data.device_transforms import normalize
from ssl_vit.data.loader import read_batches
from ssl_vit.data.sources import Source
from ssl_vit.data.transforms import random_resized_crop
from ssl_vit.data.workers import leave_signals_to_the_main_process
from ssl_vit.distributed import gather_with_gradient, process_index, world_size
from ssl_vit.evaluation.left_out import without_bad
from ssl_vit.models.encoder import Encoder

FEATURES = ("cls", "mean", "cls+mean", "cls4", "cls4+mean")
"""Kinds of features: class token, mean of the patch tokens, class tokens of the last four blocks, and both together."""


_ELONGATED = 8  # how much longer than its crop an image is resized


@dataclass(frozen=True)
class EvalTransform:
    """How a picture is brought to an encoder's size, without any randomness.

    The picture is resized (bicubic, antialiased, aspect ratio kept) until it just covers `size / crop_pct`, and the
    centre of that size is cut out. 224 pixels at .875 is the usual "resize 256, centre crop 224".
    """

    size: tuple[int, int]
    """Height and width of what is cut out, in pixels."""
    mean: tuple[float, ...]
    """Of each channel, for pixel values in [0, 1]."""
    std: tuple[float, ...]
    """Of each channel, for pixel values in [0, 1]."""
    crop_pct: float = 0.875
    """Share of the covered height and width that is kept, in (0, 1]."""
    padding: tuple[int, int] = (0, 0)
    """Rows put below and columns put to the right, in pixels, of the channels' mean."""
    view: int | None = None
    """None = the centre; a number = that one of a series of random crops and flips (area .08-1), as the papers'
    linear probes are trained on; the crops of a row follow from `view` and the row alone."""

    def __call__(self, image: UInt8[Tensor, "c h w"], row: int) -> UInt8[Tensor, "c height width"]:
        """One picture, from row `row` of its source."""
        if self.view is None:
            return centre_crop(image, self.size, self.crop_pct)
        rng = np.random.default_rng((self.view, row))
        image = random_resized_crop(image, self.size, rng, (0.08, 1.0))
        return image.flip(-1) if rng.random() < 0.5 else image

    def on_device(self, images: UInt8[Tensor, "b c h w"], device: torch.device) -> Float[Tensor, "b c height width"]:
        """A batch, normalised and padded, on the device."""
        images = normalize(images.to(device, non_blocking=True), self.mean, self.std)
        return F.pad(images, (0, self.padding[1], 0, self.padding[0])) if any(self.padding) else images


def centre_crop(
    image: UInt8[Tensor, "c h w"], size: tuple[int, int], crop_pct: float
) -> UInt8[Tensor, "c height width"]:
    """Resize and centre-crop a picture, see `EvalTransform`."""
    image = TF.center_crop_image(image, middle((image.shape[1], image.shape[2]), size))
    resized = cover((image.shape[1], image.shape[2]), size, crop_pct)
    image = TF.resize_image(image, resized, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop_image(image, list(size))


def middle(shape: tuple[int, int], size: tuple[int, int]) -> list[int]:
    """Height and width of the middle of an image that is all that its centre crop of `size` is cut from.

    All of it but where its longer side is more than `_ELONGATED` times what the crop takes of it: 1 x 100,000 pixels
    would else be resized to 224 x 22,400,000.
    """
    height, width = shape
    # An even number of pixels is left out, so that the middle stays where it was.
    longest_height = _ELONGATED * -(-width * size[0] // size[1])
    longest_width = _ELONGATED * -(-height * size[1] // size[0])
    return [
        side - 2 * max(0, (side - longest) // 2) for side, longest in ((height, longest_height), (width, longest_width))
    ]


def cover(shape: tuple[int, int], size: tuple[int, int], crop_pct: float) -> list[int]:
    """Height and width to which a picture is resized so that it just covers `size / crop_pct`."""
    height, width = shape
    box_height, box_width = (int(side / crop_pct) for side in size)
    # In whole numbers: rounding must never leave the picture a pixel smaller than what is cut out of it.
    if box_height * width >= box_width * height:
        return [box_height, width * box_height // height]
    return [height * box_width // width, box_width]


def fit_size(
    size: tuple[int, int], patch_size: tuple[int, int], indivisible: Literal["refuse", "resize", "pad"] = "refuse"
) -> tuple[tuple[int, int], tuple[int, int]]:
    """What to do with an image size that the patch size does not divide.

    Args:
        size, patch_size: height and width in pixels.
        indivisible: refuse it; resize pictures to the nearest size that is divisible; or pad them up to the next.

    Returns:
        the size that pictures are cut to, and the rows and columns to pad: see `EvalTransform`.

    Raises:
        ValueError: it is to be refused; names the nearest sizes.
    """
    padding = tuple(-side % patch for side, patch in zip(size, patch_size, strict=True))
    if not any(padding):
        return size, (0, 0)
    if indivisible == "pad":
        return size, (padding[0], padding[1])
    below = [max(side // patch, 1) * patch for side, patch in zip(size, patch_size, strict=True)]
    above = [-(-side // patch) * patch for side, patch in zip(size, patch_size, strict=True)]
    if indivisible == "resize":
        nearest = [
            low if side - low < high - side else high for side, low, high in zip(size, below, above, strict=True)
        ]
        return (nearest[0], nearest[1]), (0, 0)
    shown = [" x ".join(map(str, sides)) for sides in (below, above)]
    raise ValueError(
        f"image_size={size!r}: not divisible by the patch size {patch_size[0]} x {patch_size[1]}; the nearest are: "
        f"{' and '.join(dict.fromkeys(shown))}. indivisible='resize' takes the nearer one, 'pad' fills up to the next"
    )


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
