"""Images that a program holds, written once to disk, so that a run can go on with them and reports can open them."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import numpy as np
from PIL import Image, ImageOps

from ssl_vit.data.sources.source import DataConfig, Source, open_rows
from ssl_vit.data.sources.tables import check_cache, is_saved_dataset

LABEL = "label"


def is_on_disk(source: Any) -> bool:
    """Whether `source` is what `data.source` takes: a path, a name, or several with weights."""
    return isinstance(source, str | Path | dict) and not isinstance(source, datasets.DatasetDict)


def as_rows(source: Any) -> datasets.Dataset:
    """Images in memory as a table with a column `image` and, if they have classes, `label`.

    Args:
        source: a `datasets.Dataset`; a list, array, pandas Series or torch dataset of paths, PIL images or arrays [h w]
            or [h w c]; each may stand in a pair with a class, a number or a name. Paths are kept as they are, PIL
            images as PNG (turned as their EXIF data says), arrays as .npy, of any number of channels.

    Raises:
        ValueError: it holds nothing, or something else than images.
    """
    if isinstance(source, datasets.Dataset):
        return source
    if isinstance(source, datasets.DatasetDict):
        raise ValueError(f"source=DatasetDict: give one of its splits, as source[{next(iter(source), '')!r}]")
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
    return open_rows(as_rows(source), DataConfig("images", label_column="none"), ("/",))


def _items(source: Any) -> Iterable[Any]:
    """The items of a list, array, Series or torch dataset; the last may have no iterator, and no end but its length."""
    if hasattr(source, "columns"):
        raise ValueError(f"source={type(source).__name__}: give one column, the one that holds paths or images")
    if hasattr(source, "tolist") and not isinstance(source, np.ndarray):  # a Series, whose index need not count
        return source.tolist()
    if isinstance(source, Sequence | np.ndarray) or not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        if not isinstance(source, Iterable):
            raise ValueError(f"source={type(source).__name__}: give a path, a data set, or a list of paths or images")
        return source
    return (source[number] for number in range(len(source)))


def _row(item: Any, number: int) -> dict[str, Any]:
    image, label = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
    if label is not None and not isinstance(label, str | int | np.integer):
        raise ValueError(f"source: the class of item {number} is {type(label).__name__}; give a number or a name")
    buffer = io.BytesIO()
    if isinstance(image, str | Path):
        row: dict[str, Any] = {"image": {"path": str(Path(image).absolute()), "bytes": None}}
    elif isinstance(image, np.ndarray):
        np.save(buffer, image, allow_pickle=False)
        row = {"image": {"path": None, "bytes": buffer.getvalue()}}
    elif isinstance(image, Image.Image):
        try:
            ImageOps.exif_transpose(image).save(buffer, format="PNG")
        except (OSError, ValueError) as error:
            raise ValueError(f"source: item {number} cannot be kept as PNG: {error}; convert it to RGB") from error
        row = {"image": {"path": None, "bytes": buffer.getvalue()}}
    else:
        raise ValueError(f"source: item {number} is {type(image).__name__}; give paths, PIL images or arrays [h w c]")
    return row if label is None else {**row, LABEL: label}


def _table(rows: list[dict[str, Any]]) -> datasets.Dataset:
    kinds: dict[str, Any] = {"image": datasets.Image(decode=False)}
    if LABEL in rows[0]:
        names = sorted({str(row[LABEL]) for row in rows}, key=lambda name: (len(name), name))
        kinds[LABEL] = datasets.ClassLabel(names=names)
        rows = [{**row, LABEL: names.index(str(row[LABEL]))} for row in rows]
    return datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
