"""Shards made on the fly: parquet files and WebDataset tars of images that say which one they are."""

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor


def numbered_png(number: int) -> bytes:
    """A noisy image whose corner holds its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    pixels[:8, :8] = (number // 256, number % 256, 7)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def number_of(image: UInt8[Tensor, "c h w"]) -> int:
    return int(image[0, 0, 0]) * 256 + int(image[1, 0, 0])


def write_parquet(folder: Path, sizes: list[int], bad: tuple[int, ...] = ()) -> str:
    """Shards of these many numbered images, in row groups of three; returns their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    for shard, size in enumerate(sizes):
        numbers = range(first, first + size)
        images = [{"bytes": numbered_png(n) if n not in bad else b"no image", "path": f"{n}.png"} for n in numbers]
        table = pa.Table.from_pydict({"image": images, "label": [n % 2 for n in numbers]}, kinds.arrow_schema)
        pq.write_table(table, folder / f"part-{shard:02d}.parquet", row_group_size=3)
        first += size
    return f"{folder}/*.parquet"


def write_tars(folder: Path, sizes: list[int], members: tuple[str, ...] = ("png", "cls")) -> str:
    """Shards of these many numbered images with a class each; returns their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"part-{shard:02d}.tar", "w") as tar:
            for number in range(first, first + size):
                for suffix in members:
                    data = numbered_png(number) if suffix == "png" else str(number % 2).encode()
                    info = tarfile.TarInfo(f"deep/{number:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        first += size
    return f"{folder}/*.tar"
