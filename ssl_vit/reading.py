"""Reading files that may come from anywhere: refused before they cost memory, and never more than data."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

MAX_HEADER = 16 * 2**20
"""Bytes. Names and shapes of a ViT-g with its optimizer's moments take about 0.4 MB."""
MAX_JSON = 16 * 2**20
"""Bytes of a file that describes weights or a checkpoint."""


def check_header(file: Path) -> None:
    """Refuse a safetensors file by the length of its header, before anything of it is parsed.

    safetensors itself takes headers of up to 100 MB, for which its parser takes many times as much.

    Raises:
        ValueError: the header is longer than the file, or than names and shapes of any model.
        OSError: the file cannot be read.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    size = file.stat().st_size
    if 8 + length > size:
        raise ValueError(f"{file}: is no whole safetensors file: {size:,} bytes, with a header of {length:,}")
    if length > MAX_HEADER:
        raise ValueError(f"{file}: has a header of {length:,} bytes, and {MAX_HEADER:,} are the most that is read")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ValueError: it is missing, damaged, or has a header of a size that no model needs.
    """
    try:
        check_header(file)
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: is no whole safetensors file: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it holds no JSON object, or is larger than any description.
        OSError: it cannot be read.
    """
    size = file.stat().st_size
    if size > MAX_JSON:
        raise ValueError(f"{file}: has {size:,} bytes, and {MAX_JSON:,} are the most that is read")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds no JSON object")
    return content
