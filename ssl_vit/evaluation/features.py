"""Frozen features of labelled pictures: what the k-NN and the linear probe are given."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

from ssl_vit.data.device_transforms import normalize
from ssl_vit.data.sources import Source
from ssl_vit.models.encoder import Encoder


def eval_transform(
    image: UInt8[Tensor, "c h w"], image_size: tuple[int, int], crop_pct: float
) -> UInt8[Tensor, "c height width"]:
    """Resize and centre-crop a picture for evaluation, without any randomness.

    The picture is resized (bicubic, antialiased, aspect ratio kept) until it just covers
    `image_size / crop_pct`, and the centre of size `image_size` is cut out. 224 pixels at .875 is the usual
    "resize 256, centre crop 224".

    Args:
        image: pixels, 0 to 255.
        image_size: (height, width) of the result in pixels.
        crop_pct: share of the covered height and width that is kept, in (0, 1].
    """
    height, width = image.shape[-2:]
    box_height, box_width = (int(size / crop_pct) for size in image_size)
    # In whole numbers: rounding must never leave the picture a pixel smaller than what is cut out of it.
    if box_height * width >= box_width * height:
        resized = [box_height, width * box_height // height]
    else:
        resized = [height * box_width // width, box_width]
    image = TF.resize_image(image, resized, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop_image(image, list(image_size))


def extract_features(
    encoder: Encoder,
    source: Source,
    indices: Int[np.ndarray, " n"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    crop_pct: float,
    batch_size: int,
    device: torch.device,
    num_workers: int = 0,
    autocast_dtype: torch.dtype | None = None,
    show_progress: bool = True,
) -> dict[str, Float[Tensor, "n d"]]:
    """Encode pictures of a source at the size the encoder was built for.

    The encoder runs in eval mode (every module gets its own mode back afterwards) and no global random state
    is read or changed, so that evaluating in the middle of a training run does not alter the run.

    Args:
        encoder: the backbone, already on `device`.
        indices: rows of the source, in the order in which the features come back.
        mean, std: of the channels, for pixel values in [0, 1].
        crop_pct: see `eval_transform`.
        batch_size: pictures encoded at once.
        num_workers: processes that decode; 0 decodes in this one.
        autocast_dtype: run the encoder under autocast in this type; None = as it is.
        show_progress: a progress bar on stderr, where that is a terminal.

    Returns:
        fp32 tensors on the CPU: "cls", the class token, and "mean", the mean of the patch tokens.

    Raises:
        ValueError: no rows to encode.
    """
    loader = _loader(source, indices, encoder.in_chans, encoder.image_size, crop_pct, batch_size, num_workers)
    loader.pin_memory = device.type == "cuda"
    cls, patch_mean = [], []
    with _eval_mode(encoder), torch.inference_mode():
        for images in tqdm(loader, desc="features", leave=False, disable=None if show_progress else True):
            images = normalize(images.to(device, non_blocking=True), tuple(mean), tuple(std))
            with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
                features = encoder(images)
            cls.append(features.cls.float().cpu())
            patch_mean.append(features.patches.float().mean(dim=1).cpu())
    # Concatenated out here: a tensor made under inference mode is of no use where gradients are needed.
    return {"cls": torch.cat(cls), "mean": torch.cat(patch_mean)}


def pixel_features(
    source: Source,
    indices: Int[np.ndarray, " n"],
    num_channels: int,
    size: int = 16,
    crop_pct: float = 1.0,
    num_workers: int = 0,
) -> Float[Tensor, "n d"]:
    """Raw pixels at `size` x `size` in [0, 1], flattened: the baseline that any learned feature has to beat.

    Raises:
        ValueError: no rows.
    """
    loader = _loader(source, indices, num_channels, (size, size), crop_pct, 256, num_workers)
    return torch.cat([images.flatten(1).float() / 255 for images in loader])


class _Images(Dataset):
    """Chosen rows of a source after `eval_transform`."""

    def __init__(
        self, source: Source, indices: np.ndarray, num_channels: int, size: tuple[int, int], crop_pct: float
    ) -> None:
        self.source = source
        self.indices = indices
        self.num_channels = num_channels
        self.size = size
        self.crop_pct = crop_pct

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> UInt8[Tensor, "c h w"]:
        image = self.source.image(int(self.indices[position]), self.num_channels)
        return eval_transform(image, self.size, self.crop_pct)


def _loader(
    source: Source,
    indices: np.ndarray,
    num_channels: int,
    size: tuple[int, int],
    crop_pct: float,
    batch_size: int,
    num_workers: int,
) -> DataLoader:
    if len(indices) == 0:
        raise ValueError(f"source={source.name!r}: no rows were chosen, so there is nothing to encode")
    return DataLoader(
        _Images(source, indices, num_channels, size, crop_pct),
        batch_size=batch_size,
        num_workers=num_workers,
        generator=torch.Generator(),  # without one of its own a loader draws from the global generator
    )


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
