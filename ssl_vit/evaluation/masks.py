"""Images with a class for every pixel."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from unicodedata import normalize

import datasets
import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from jaxtyping import Int64, UInt8
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode

from ssl_vit.core.settings import renamed_settings
from ssl_vit.data.augment.crops import draw_crop
from ssl_vit.data.augment.evaluation import cover, middle
from ssl_vit.data.config import DataConfig, near_match
from ssl_vit.data.decode.bounds import MAX_IMAGE_BYTES, check_size
from ssl_vit.data.decode.formats import open_image
from ssl_vit.data.sources.source import Source, open_source

_MAX_CLASSES = 10_000  # more are no classes: a mask of instances, or an image


@dataclass(frozen=True)
class MaskedSource:
    """Images and the masks that belong to them, row by row."""

    images: Source
    masks: Source
    ignore_index: int
    """Value of pixels that belong to no class."""

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, rows: Int64[np.ndarray, " r"]) -> "MaskedSource":
        """Return the given rows, in this order."""
        return MaskedSource(self.images.subset(rows), self.masks.subset(rows), self.ignore_index)

    def pair(self, index: int, num_channels: int) -> tuple[UInt8[Tensor, "c h w"], Int64[Tensor, "h w"]]:
        """Return an image and its mask; -1 where a pixel belongs to no class.

        Raises:
            ValueError: one of them cannot be read, they differ in size, or the mask holds no classes.
        """
        image = self.images.image(index, num_channels)
        mask = self.mask(index)
        if image.shape[1:] != mask.shape:
            sizes = " x ".join(map(str, mask.shape)), " x ".join(map(str, image.shape[1:]))
            raise ValueError(f"{self._name(index)}: the mask is {sizes[0]} pixels and its image {sizes[1]}")
        return image, mask

    def mask(self, index: int) -> Int64[Tensor, "h w"]:
        """Return the mask of a row, -1 where a pixel belongs to no class."""
        try:
            values = read_mask(self.masks.encoded(index), self.masks.max_image_bytes)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self._name(index)}: {error}") from error
        mask = values.long()
        mask[values == self.ignore_index] = -1
        if int(mask.max()) >= _MAX_CLASSES:
            raise ValueError(f"{self._name(index)}: holds class {int(mask.max())}; classes are below {_MAX_CLASSES}")
        if (lowest := int(mask.min())) < -1:
            hint = f"where it means no data, give --ignore_index {lowest}"
            raise ValueError(f"{self._name(index)}: holds {lowest}, and classes are numbered from 0; {hint}")
        return mask

    def classes(self, index: int) -> set[int]:
        """Return the classes in the mask of a row."""
        return set(self.mask(index).unique().tolist()) - {-1}

    def _name(self, index: int) -> str:
        path = (self.masks.rows[index][self.masks.image_column] or {}).get("path")
        return f"mask of row {index} of {self.masks.name!r}" + (f" ({path})" if path else "")


def read_mask(data: bytes, max_image_bytes: int = MAX_IMAGE_BYTES) -> Int64[Tensor, "h w"]:
    """Read the numbers that a mask's file stores for its pixels: palette indices as they are, 16 bits undivided.

    Raises:
        ValueError: no image, or an image of several channels.
    """
    try:
        with open_image(data, max_image_bytes) as opened:
            check_size(opened.height, opened.width, 8, max_image_bytes)
            if opened.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
                raise ValueError(f"is a {opened.mode} image; a mask has one channel, whose values are classes")
            return torch.from_numpy(np.array(ImageOps.exif_transpose(opened)).astype(np.int64))
    except ValueError:
        raise
    except Exception as error:  # a damaged file raises anything: OSError, SyntaxError, struct.error ...
        raise ValueError(f"cannot be read: {error}") from error


class Problems(Dataset):
    """For each pair of an image and its mask why it cannot be used; None where it can."""

    def __init__(self, source: MaskedSource, num_channels: int) -> None:
        self.source, self.num_channels = source, num_channels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> str | None:
        try:
            self.source.pair(row, self.num_channels)
        except ValueError as error:
            return str(error)
        return None


def open_masked(
    data: DataConfig, *, mask_source: str | None, mask_column: str | None, ignore_index: int
) -> MaskedSource:
    """Open images with masks: two columns of one source, or two folders whose files have the same names.

    Args:
        data: the images. Where they are in a column, `mask_column` is another one of the same source.
        mask_source: a folder of masks, matched to a folder of images by path below the folder, without suffix.
        mask_column: found where there is exactly one further column of images.
        ignore_index: value of pixels that belong to no class.

    Raises:
        ValueError: no masks, or images and masks that do not match.
    """
    if mask_source is not None:
        images = open_source(data)
        with renamed_settings({"data.source": "data.mask_source"}):
            masks = open_source(
                replace(data, source=mask_source, image_column=None, label_column="none", pages="first")
            )
        return MaskedSource(*_match(images, masks), ignore_index)
    if data.image_column is None:
        # Where both images and masks are columns of images, prefer the column "image".
        data = _with_column(data, "image")
    images = open_source(data)
    columns = images.columns
    kinds = {} if columns is None else columns.features
    candidates = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    if columns is None or (mask_column is None and len(candidates) != 1):
        listed = f"one of {', '.join(candidates)}" if candidates else "a folder with --mask_source, or a column"
        raise ValueError(f"mask_column={mask_column!r}: where are the masks of {images.name!r}? Name {listed}")
    chosen = candidates[0] if mask_column is None else mask_column
    if chosen not in columns.column_names:
        near = near_match(chosen, columns.column_names)
        raise ValueError(f"mask_column={chosen!r}: no such column; {near}there are: {', '.join(columns.column_names)}")
    rows = columns.select_columns([chosen]).cast_column(chosen, datasets.Image(decode=False))
    return MaskedSource(images, Source(images.name, rows, chosen, roots=images.roots), ignore_index)


def _with_column(data: DataConfig, column: str) -> DataConfig:
    named = replace(data, image_column=column)
    try:
        open_source(named)
    except ValueError:
        return data
    return named


def _match(images: Source, masks: Source) -> tuple[Source, Source]:
    """Return the images, and the masks in the order of their images."""

    def names(source: Source) -> list[str]:
        if source.root is None:
            raise ValueError(
                f"mask_source={masks.name!r}: masks are found by name, and {source.name!r} is no folder of images; "
                "give two folders whose files have the same names, or one source with a column of images and one of "
                "masks (mask_column)"
            )
        paths = [row["path"].removeprefix(source.root) for row in source.rows[source.image_column]]
        # The same name may be composed in one folder and decomposed in the other.
        return [normalize("NFC", str(Path(path).with_suffix(""))) for path in paths]

    image_names, mask_names = names(images), names(masks)
    for kind, lacking in {
        "images without a mask": sorted(set(image_names) - set(mask_names)),
        "masks without an image": sorted(set(mask_names) - set(image_names)),
        "names that several masks have": sorted(name for name, n in Counter(mask_names).items() if n > 1),
    }.items():
        if lacking:
            shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
            raise ValueError(f"mask_source={masks.name!r}: {len(lacking)} {kind}: {shown}; names must be the same")
    row_of = {name: row for row, name in enumerate(mask_names)}
    return images, masks.subset(np.array([row_of[name] for name in image_names], dtype=np.int64))


def hold_out(source: MaskedSource, folds: int, seed: int) -> tuple[MaskedSource, MaskedSource]:
    """Split off one image in so many at random.

    If possible, images without a class and the only images of a class stay in the part to learn from.
    """
    if len(source) < 2:
        raise ValueError(f"source={source.images.name!r}: {len(source)} images are too few to hold some out")
    order = np.random.default_rng(seed).permutation(len(source))
    cut = max(1, len(source) // folds)
    # Where none of the first can be spared, the next are tried.
    turns = (np.roll(order, -start).tolist() for start in range(0, len(order), cut))
    rows = next(filter(None, (_spared(source, turn, cut) for turn in turns)), order[:cut])
    return source.subset(np.setdiff1d(order, rows)), source.subset(np.sort(rows))


def _spared(source: MaskedSource, order: list[int], cut: int) -> list[int]:
    """Those of the first rows that hold classes, all of which are in rows behind them too."""
    classes = {row: source.classes(row) for row in order[:cut]}
    lacking = set[int]().union(*classes.values())
    for row in order[cut:]:
        if not lacking:  # as a rule after a few masks
            break
        lacking -= source.classes(row)
    return [row for row, found in classes.items() if found and not found & lacking]


def centre_pair(
    image: UInt8[Tensor, "c h w"], mask: Int64[Tensor, "h w"], size: tuple[int, int], crop_pct: float
) -> tuple[UInt8[Tensor, "c height width"], Int64[Tensor, "height width"]]:
    """Resize and centre-crop both alike, as `centre_crop` does; masks take the nearest pixel."""
    kept = middle((image.shape[1], image.shape[2]), size)
    image, mask = TF.center_crop_image(image, kept), TF.center_crop_image(mask[None], kept)[0]
    resized = cover((image.shape[1], image.shape[2]), size, crop_pct)
    image = TF.resize_image(image, resized, interpolation=InterpolationMode.BICUBIC, antialias=True)
    mask = TF.resize_image(mask[None], resized, interpolation=InterpolationMode.NEAREST_EXACT)[0]
    return TF.center_crop_image(image, list(size)), TF.center_crop_image(mask[None], list(size))[0]


def random_pair(
    image: UInt8[Tensor, "c h w"], mask: Int64[Tensor, "h w"], size: tuple[int, int], rng: np.random.Generator
) -> tuple[UInt8[Tensor, "c height width"], Int64[Tensor, "height width"]]:
    """Crop (half of the area or more) and flip both alike, at random; masks take the nearest pixel."""
    stretch = size[1] / size[0]
    box = draw_crop(image.shape[1], image.shape[2], rng, (0.5, 1.0), (3 / 4 * stretch, 4 / 3 * stretch))
    image = TF.resized_crop_image(image, *box, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    mask = TF.resized_crop_image(mask[None], *box, list(size), interpolation=InterpolationMode.NEAREST_EXACT)[0]
    return (image.flip(-1), mask.flip(-1)) if rng.random() < 0.5 else (image, mask)
