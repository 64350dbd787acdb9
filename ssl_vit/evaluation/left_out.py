"""Images that cannot be decoded: how many of them an evaluation or an extraction leaves out, and their list."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ssl_vit.core.text import plain
from ssl_vit.core.writing import replace_text
from ssl_vit.data.bad_images import BAD_IMAGES_FILE, describe_bad
from ssl_vit.data.sources.source import Source


def check_bad_share(
    source: Source, bad: Sequence[int], num_images: int, max_bad_share: float, num_channels: int
) -> None:
    """Refuse a source of which more images cannot be decoded than may be left out.

    Args:
        bad: rows of the source that could not be decoded.
        num_images: how many there are, good and bad.

    Raises:
        ValueError: more than `max_bad_share` of them are bad, or all. Says why of the first.
    """
    if _too_many(len(bad), num_images, max_bad_share):  # asked for each batch: the reason is found where it is needed
        found = describe_bad(source, int(bad[0]), num_channels)
        refuse(len(bad), num_images, max_bad_share, f"{source.where(int(bad[0]))}: {found['reason']}")


def refuse(num_bad: int, num_images: int, max_bad_share: float, first: str) -> None:
    """Refuse as `check_bad_share` does, with the given reason of the first bad image."""
    if _too_many(num_bad, num_images, max_bad_share):
        raise ValueError(
            f"max_bad_share={max_bad_share}: {num_bad:,} or more of the {num_images:,} images cannot be used; the "
            f"first: {first}; repair or remove them, or allow more of them"
        )


def _too_many(num_bad: int, num_images: int, max_bad_share: float) -> bool:
    return num_bad > max_bad_share * num_images or 0 < num_bad == num_images


def without_bad(
    batches: Iterator[dict[str, Tensor]],
    source: Source,
    indices: Int[np.ndarray, " n"],
    num_channels: int,
    max_bad_share: float | None,
) -> dict[str, Tensor]:
    """Join the good images of batches; "places", their positions, replaces the flag "good"; {} without batches."""
    parts, bad, start = [], [], 0
    for batch in batches:
        good = batch.pop("good")
        parts.append({name: values[good] for name, values in batch.items()} | {"places": start + good.nonzero()[:, 0]})
        bad += (start + (~good).nonzero()[:, 0]).tolist()
        start += len(good)
        check_bad_share(source, indices[bad].tolist(), len(indices), max_bad_share or 0.0, num_channels)
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def write_bad(output: Path, bad: Sequence[Mapping[str, Any]]) -> None:
    """List images that were left out in NAME.bad_images.jsonl beside an output NAME.*; none leave no such file."""
    file = output.with_name(f"{output.stem}.{BAD_IMAGES_FILE}")
    if not bad:
        file.unlink(missing_ok=True)  # of an earlier result
        return
    replace_text(file, "".join(json.dumps(item) + "\n" for item in bad))
    number = "1 image" if len(bad) == 1 else f"{len(bad):,} images"
    print(f"note: left out, since it cannot be decoded: {number}; {plain(file)} says which and why")
