"""Images that a program holds, written once to disk, so that a run can go on with them and reports can open them."""

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageOps

from ssl_vit.data.sources.source import DataConfig, Source, open_rows
from ssl_vit.data.sources.tables import check_cache, is_saved_dataset

LABEL = "label"
_STRUCT = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


def is_on_disk(source: Any) -> bool:
    """Whether `source` is what `data.source` takes: a path, a name, or several with weights."""
    return isinstance(source, str | Path | dict) and not isinstance(source, datasets.DatasetDict)


def as_rows(source: Any) -> datasets.Dataset:
    """Images in memory as a table with a column `image` and, if they have classes, `label`.

    Args:
        source: a `datasets.Dataset`; a list, array, pandas Series or torch dataset of paths, PIL images or arrays [h w]
            or [h w c]; each may stand in a pair with a class, a number or a name (-1 or None: no label). Paths are
            kept as they are, PIL images as PNG (turned as their EXIF data says), arrays as .npy, of any number of
            channels.

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
    for column in [column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)]:
        rows, name = _with_paths(rows, column, name)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "ssl_vit" / name
    if not is_saved_dataset(folder):
        rows.save_to_disk(str(folder))
    return str(folder)


def _with_paths(rows: datasets.Dataset, column: str, name: str) -> tuple[datasets.Dataset, str]:
    """The rows with a column that names files as structs of bytes and full paths, and a name that follows from these.

    Of an `Image` column `save_to_disk` would copy the files, and later changes of them would go unseen. A column with
    addresses is copied, since rows may not open any.
    """
    table = rows.data.table
    data, paths = (pc.call_function("struct_field", [table[column]], pc.StructFieldOptions(at)) for at in _STRUCT)
    in_files = (np.asarray(data.is_null()) & np.asarray(paths.is_valid())).tolist()
    if not any(in_files):
        return rows, name
    digest, full = hashlib.sha256(name.encode()), paths.to_pylist()
    for row in np.flatnonzero(in_files).tolist():
        if "://" in full[row] or "::" in full[row]:
            return rows, name
        full[row] = os.path.abspath(full[row])  # noqa: PTH100  # keeps links
        digest.update(full[row].encode() + b"\0")
    images = pc.call_function("make_struct", [data, pa.array(full, pa.string())], pc.MakeStructOptions(list(_STRUCT)))
    features = datasets.Features({**rows.features, column: _STRUCT})
    table = table.set_column(table.column_names.index(column), column, images).replace_schema_metadata(None)
    name = digest.hexdigest()[:32]
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(table, info, indices_table=rows._indices, fingerprint=name), name


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
    is_pair = isinstance(item, tuple | list) and len(item) == 2
    image, label = item if is_pair else (item, None)
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
    return {**row, LABEL: -1 if label is None else label} if is_pair else row


def _table(rows: list[dict[str, Any]]) -> datasets.Dataset:
    kinds: dict[str, Any] = {"image": datasets.Image(decode=False)}
    found = {str(row[LABEL]) for row in rows if row.get(LABEL, -1) != -1}
    if found:
        names = sorted(found, key=lambda name: (len(name), name))
        numbers = {name: number for number, name in enumerate(names)}
        kinds[LABEL] = datasets.ClassLabel(names=names)
        rows = [{**row, LABEL: -1 if row[LABEL] == -1 else numbers[str(row[LABEL])]} for row in rows]
    elif LABEL in rows[0]:
        rows = [{"image": row["image"]} for row in rows]
    return datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
