"""Features as one parquet or safetensors file, written from an extraction's parts by the libraries' own writers."""

import json
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Num
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssl_vit.core.reading import open_regular, read_tensors
from ssl_vit.core.writing import fresh_folder
from ssl_vit.data.sources.source import Source


def write_parquet(file: Path, parts: list[Path], source: Source, described: dict[str, Any]) -> None:
    """Write a table with a row group for each part."""
    metadata = {"ssl_vit": json.dumps(described)}

    def table(columns: dict[str, pa.Array], tensors: dict[str, Tensor]) -> pa.Table:
        if "id" in columns:
            columns[described["ids"]] = columns.pop("id")
        for name, values in tensors.items():
            flat = values.flatten(1).numpy()
            lists = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
            columns["embedding" if name == "embeddings" else name] = lists
        return pa.table(columns).replace_schema_metadata(metadata)

    tables = (table(*rows) for rows in _read(parts, source, described))
    first = next(tables)
    with pq.ParquetWriter(file.absolute(), first.schema, compression="zstd") as writer:
        for rows in chain([first], tables):
            writer.write_table(rows)


def write_safetensors(file: Path, parts: list[Path], source: Source, described: dict[str, Any]) -> None:
    """Write all tensors in one call, which the format needs, from files that are mapped into memory.

    Memory stays flat; meanwhile the features are on disk three times: as parts, as plain arrays and in the result.
    """
    arrays: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    with fresh_folder(parts[0].parent / "arrays") as folder:
        for columns, tensors in _read(parts, source, described):
            found = {name: values.contiguous().numpy() for name, values in tensors.items()}
            for name in columns.keys() - {"path"}:
                found[f"{name}s"] = columns[name].cast(pa.int64()).to_numpy(zero_copy_only=False)
            for name, values in found.items():
                arrays[name] = values.dtype, values.shape[1:]
                with (folder / name).open("ab") as out:
                    out.write(values.tobytes())
        count = described["num_rows"] - described["num_bad"]
        mapped = {
            name: torch.from_numpy(np.memmap(folder / name, dtype, "c", shape=(count, *shape)))
            for name, (dtype, shape) in arrays.items()
        }
        save_file(mapped, file, {"ssl_vit": json.dumps(described)})  # one key: several would come in any order


def _read(
    parts: list[Path], source: Source, described: dict[str, Any]
) -> Iterator[tuple[dict[str, pa.Array], dict[str, Num[Tensor, "r ..."]]]]:
    """Read the parts in order, without undecodable images.

    Returns:
        for each part the columns "row", "path", and "label" and "id" where there are any; and its tensors, with patches
        as a grid.
    """
    paths = source.rows.flatten().select_columns([f"{source.image_column}.path"]).with_format("arrow")
    ids = None
    if described["ids"] is not None and source.columns is not None:
        ids = source.columns.select_columns([described["ids"]]).with_format("arrow")
    start = 0
    for part in parts:
        tensors = read_tensors(part)
        num_rows = len(tensors["embeddings"])
        good = tensors.pop("good", torch.ones(num_rows, dtype=torch.bool))
        tensors.pop("rows", None)
        rows = start + good.nonzero()[:, 0].numpy()
        start += num_rows
        if "patches" in tensors:
            tensors["patches"] = tensors["patches"].unflatten(1, described["patch_grid"])
        chosen: Any = rows if len(rows) else slice(0)  # an empty array of rows is no index
        found: dict[str, Any] = {"row": pa.array(rows)}
        found["path"] = pa.array(cast(pa.Table, paths[chosen]).column(0).to_pylist(), pa.string())
        if source.labels is not None:
            found["label"] = pa.array(source.labels[rows])
        if ids is not None:
            found["id"] = cast(pa.Table, ids[chosen]).column(0).combine_chunks()
        yield found, {name: values[good] for name, values in tensors.items()}


def read_description(file: Path) -> dict[str, Any] | None:
    """Read what an extraction wrote about itself into a file; None for any other file."""
    try:
        os.close(open_regular(file, links=True))
        if file.suffix == ".parquet":
            metadata = pq.read_schema(file).metadata or {}
            return json.loads(metadata[b"ssl_vit"])
        with safe_open(file, framework="pt") as opened:
            return json.loads((opened.metadata() or {})["ssl_vit"])
    except (OSError, pa.ArrowException, SafetensorError, KeyError, ValueError):
        return None
