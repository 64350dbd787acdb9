"""Images that a program holds, written once to disk, so that a run can go on with them and reports can open them."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import numpy as np
from PIL import Image

from ssl_vit.data.sources.source import Source
from ssl_vit.data.sources.tables import check_cache, is_saved_dataset

LABEL = "label"


def is_on_disk(source: Any) -> bool:
    """Whether `source` is what `data.source` takes: a path, a name, or several with weights."""
    return isinstance(source, str | Path | dict)


def as_rows(source: Any) -> datasets.Dataset:
    """Images in memory as a table with a column `image` and, if they have classes, `label`.

    Args:
        source: a `datasets.Dataset`; a list, a pandas Series or a torch dataset of paths, PIL images or arrays [h w] or
            [h w c] of uint8; each may stand in a pair with a class, a number or a name. Paths are kept as they are,
            pixels as PNG.

    Raises:
        ValueError: it holds nothing, or something else than images.
    """
    if isinstance(source, datasets.Dataset):
        return source
    found = [_row(item, number) for number, item in enumerate(_items(source))]
    if not found:
        raise ValueError("source=[]: holds no images")
    if len({LABEL in row for row in found}) > 1:
        raise ValueError("source: some images have a class and others none; give all of them one, or none")
    return _table(found)


def store(source: Any) -> str:
    """Write images in memory as a folder of `save_to_disk` in datasets' cache; the same images have the same folder.

    Raises:
        ValueError: see `as_rows`.
    """
    check_cache()
    rows = as_rows(source)
    if isinstance(source, datasets.Dataset):
        name = rows._fingerprint
    else:
        digest = hashlib.sha256()
        for row in rows:
            digest.update(repr(row).encode())
        name = digest.hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "ssl_vit" / name
    if not is_saved_dataset(folder):
        rows.save_to_disk(str(folder))
    return str(folder)


def open_memory(source: Any) -> Source:
    """Images in memory as a source without labels; their paths may lie anywhere.

    Raises:
        ValueError: see `as_rows`.
    """
    rows = as_rows(source).select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    return Source("images", rows, "image", roots=(("/",),))


def _items(source: Any) -> Iterable[Any]:
    """The items of a list, Series or torch dataset; the last may have no iterator, and no end but its length."""
    if isinstance(source, Sequence) or not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        if not isinstance(source, Iterable):
            raise ValueError(f"source={type(source).__name__}: give a path, a data set, or a list of paths or images")
        return source
    if hasattr(source, "tolist"):  # a Series, whose index need not count
        return source.tolist()
    return (source[number] for number in range(len(source)))


def _row(item: Any, number: int) -> dict[str, Any]:
    image, label = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
    row = {"image": {"path": str(Path(image).absolute()), "bytes": None}} if isinstance(image, str | Path) else None
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        row = {"image": {"path": None, "bytes": buffer.getvalue()}}
    if row is None:
        raise ValueError(
            f"source: item {number} is {type(image).__name__}; give paths, PIL images or arrays [h w c] of uint8"
        )
    return row if label is None else {**row, LABEL: label}


def _table(rows: list[dict[str, Any]]) -> datasets.Dataset:
    kinds: dict[str, Any] = {"image": datasets.Image(decode=False)}
    if LABEL in rows[0]:
        names = sorted({str(row[LABEL]) for row in rows}, key=lambda name: (len(name), name))
        kinds[LABEL] = datasets.ClassLabel(names=names)
        rows = [{**row, LABEL: names.index(str(row[LABEL]))} for row in rows]
    return datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
