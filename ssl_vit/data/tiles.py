"""Large images as grids of tiles, each of which is an image to learn from."""

from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
from jaxtyping import Int32, Int64

from ssl_vit.core.manifest import hash_of
from ssl_vit.core.writing import replacing
from ssl_vit.data.config import DataConfig
from ssl_vit.data.decode.formats import upright_size
from ssl_vit.data.decoded import cache_folder
from ssl_vit.data.sources.fingerprint import fingerprint
from ssl_vit.data.sources.images import Source
from ssl_vit.data.transform import pair
from ssl_vit.data.workers import in_workers

_FORMAT = 1  # raised when sizes are found by other rules
_SLOW = 4  # tiles an image, on average, from which decoding it for each of them is worth a note


def cut_into_tiles(source: Source, config: DataConfig) -> Source:
    """The source with each tile of its images as an image, as `data.tile_size` says; tiles of one image are one group.

    Reads the header of each image, with all CPUs, and keeps the sizes in `data.cache_dir` for the next start. An image
    whose header cannot be read is one tile, to be reported when it is decoded.
    """
    if config.tile_size is None:
        return source
    size = pair(config.tile_size)
    boxes_of = lru_cache(None)(partial(tile_boxes, size=size, overlap=config.tile_overlap))
    sizes = _read_sizes(source, config)
    boxes = [boxes_of(height, width) for height, width in sizes.tolist()]
    images = np.repeat(np.arange(len(source)), list(map(len, boxes)))
    tiles = np.concatenate([images[:, None].astype(np.int32), np.concatenate(boxes)], axis=1)
    num_small = int(((sizes > 0) & (sizes < size)).all(axis=1).sum())
    note = (
        f"{len(source):,} images are cut into {len(tiles):,} tiles of {size[1]} x {size[0]} pixels, each of which "
        f"counts as an image" + (f" ({num_small:,} smaller than a tile, used whole)" if num_small else "")
    )
    notes = [*source.notes, note]
    if config.cache == "none" and len(tiles) >= _SLOW * len(source):
        notes.append("each tile that is drawn decodes its whole image; --data.cache disk decodes each image once")
    groups = source.groups if source.groups is not None else np.arange(len(source))
    return replace(replace(source, groups=groups).subset(images), tiles=tiles, notes=tuple(notes))


def tile_boxes(height: int, width: int, size: tuple[int, int], overlap: int) -> Int32[np.ndarray, "t 4"]:
    """Top, left, height and width of the tiles of an image, line by line.

    Tiles of `size` follow one another, each sharing `overlap` pixels with the one before. The last one of a row or
    column is moved back so that it ends with the image, so all pixels are covered and all tiles are whole. Where the
    image is not larger than a tile, the tile is as long as the image.
    """
    tops, lefts = (_starts(*lengths, overlap) for lengths in ((height, size[0]), (width, size[1])))
    places = [(top, left, min(height, size[0]), min(width, size[1])) for top in tops for left in lefts]
    return np.array(places, dtype=np.int32)


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    count = 1 if length <= tile else -(-(length - overlap) // (tile - overlap))
    return [min(number * (tile - overlap), max(length - tile, 0)) for number in range(count)]


def _read_sizes(source: Source, config: DataConfig) -> Int64[np.ndarray, "n 2"]:
    """Height and width of each image, upright; zeros where the header cannot be read."""
    about = [fingerprint(source, np.arange(len(source))), len(config.mean), source.max_image_bytes, _FORMAT]
    file = cache_folder(config) / f"sizes-{hash_of(about)}.npy"
    sizes = np.zeros((len(source), 2), dtype=np.int64)
    with suppress(OSError, ValueError, EOFError):
        kept = np.load(file, allow_pickle=False)
        sizes = kept if (kept.shape, kept.dtype) == (sizes.shape, sizes.dtype) else sizes
    missing = np.flatnonzero(~sizes.all(axis=1))  # also those that could not be read before
    work = partial(_size_of, source, len(config.mean))
    with in_workers(work, missing.tolist(), source.where, doing="reading sizes") as found:
        sizes[missing] = np.array(list(found), dtype=np.int64).reshape(-1, 2)
    if not sizes[missing].any():
        return sizes
    with suppress(OSError):  # then the next start reads them again
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as unfinished, unfinished.open("wb") as stream:
            np.save(stream, sizes)
    return sizes


def _size_of(source: Source, num_channels: int, row: int) -> tuple[int, int]:
    page = source.page(row)
    number = page if isinstance(page, int) else 0
    try:
        return upright_size(source.encoded(row), num_channels, number, source.max_image_bytes)
    except (ValueError, OSError):
        return 0, 0
