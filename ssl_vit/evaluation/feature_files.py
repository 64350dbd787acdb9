"""Features as parquet or safetensors, out of the parts that an extraction has put on disk."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int64, Num
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssl_vit.core.reading import open_regular, read_tensors
from ssl_vit.data.sources.source import Source


def _columns(source: Source, ids: str | None) -> Callable[[Int64[Tensor, " r"]], dict[str, pa.Array]]:
    """What goes with the features of some rows: number, path, id and label; never the pictures themselves."""
    flat = source.rows.flatten().select_columns([f"{source.image_column}.path"]).with_format("arrow")
    others = (
        None if ids is None or source.columns is None else source.columns.select_columns([ids]).with_format("arrow")
    )

    def read(chosen: Int64[Tensor, " r"]) -> dict[str, pa.Array]:
        numbers = chosen.numpy()
        rows: dict[str, pa.Array] = {"row": pa.array(numbers)}
        if len(numbers) == 0:  # of a part all of whose images are bad
            numbers = slice(0)
        table: Any = flat[numbers]
        rows["path"] = pa.array(table.column(0).to_pylist(), pa.string())
        if others is not None:
            table = others[numbers]
            rows["id"] = table.column(0).combine_chunks()
        if source.labels is not None:
            rows["label"] = pa.array(source.labels[numbers])
        return rows

    return read


def write_parquet(
    file: Path, parts: list[Path], source: Source, ids: pa.DataType | None, described: dict[str, Any]
) -> None:
    columns = _columns(source, described["ids"])
    metadata = {"ssl_vit": json.dumps(described)}
    writer: pq.ParquetWriter | None = None
    for tensors in _read(parts, described):
        rows = columns(tensors.pop("rows"))
        if ids is not None:
            rows[described["ids"]] = rows.pop("id")
        for name, values in tensors.items():
            flat = values.reshape(len(values), -1).numpy()
            cells = pa.array(flat.reshape(-1))
            rows["embedding" if name == "embeddings" else name] = pa.FixedSizeListArray.from_arrays(
                cells, flat.shape[1]
            )
        table = pa.table(rows).replace_schema_metadata(metadata)
        writer = writer or pq.ParquetWriter(file.absolute(), table.schema, compression="zstd")
        writer.write_table(table)
    assert writer is not None
    writer.close()


def write_safetensors(
    file: Path, parts: list[Path], source: Source, ids: pa.DataType | None, described: dict[str, Any]
) -> None:
    """The layout is a length, a JSON header and the bytes of each tensor, so it can be written without holding them."""
    count, columns = described["num_rows"] - described["num_bad"], _columns(source, described["ids"])
    shapes = {name: [count, *values.shape[1:]] for name, values in next(_read(parts, described)).items()}
    kinds = dict.fromkeys(shapes, "F32" if described["dtype"] == "float32" else "F16") | {"rows": "I64"}
    for name, wanted in {"labels": source.labels is not None, "ids": ids is not None}.items():
        if wanted:
            shapes[name], kinds[name] = [count], "I64"
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "ssl_vit": json.dumps(described)}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + int(np.prod(shape)) * {"F32": 4, "F16": 2, "I64": 8}[kinds[name]]
        header[name] = {"dtype": kinds[name], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            for tensors in _read(parts, described):
                if name in tensors:
                    out.write(tensors[name].contiguous().numpy().tobytes())
                else:
                    values = columns(tensors["rows"])[name.removesuffix("s")]
                    out.write(values.cast(pa.int64()).to_numpy(zero_copy_only=False).astype("<i8").tobytes())


def _read(parts: list[Path], described: dict[str, Any]) -> Iterator[dict[str, Num[Tensor, "r ..."]]]:
    """The parts in their order without bad images, each with its `rows` of the source; patches as a grid."""
    start = 0
    for part in parts:
        tensors = read_tensors(part)
        if "patches" in tensors:
            tensors["patches"] = tensors["patches"].unflatten(1, described["patch_grid"])
        stop = start + len(tensors["embeddings"])
        good = tensors.pop("good", torch.ones(stop - start, dtype=torch.bool))
        yield {name: values[good] for name, values in ({"rows": torch.arange(start, stop)} | tensors).items()}
        start = stop


def read_description(file: Path) -> dict[str, Any] | None:
    """What an extraction wrote about itself into a file; None for any other file."""
    try:
        os.close(open_regular(file, links=True))
        if file.suffix == ".parquet":
            metadata = pq.read_schema(file).metadata or {}
            return json.loads(metadata[b"ssl_vit"])
        with safe_open(file, framework="pt") as opened:
            return json.loads((opened.metadata() or {})["ssl_vit"])
    except (OSError, pa.ArrowException, SafetensorError, KeyError, ValueError):
        return None
