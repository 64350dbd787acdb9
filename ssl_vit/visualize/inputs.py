"""Opens the images that are shown: files, a source, or what a run was trained on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ssl_vit.core.settings import renamed_settings
from ssl_vit.data.augment.device import normalize
from ssl_vit.data.augment.evaluation import centre_crop
from ssl_vit.data.decode.decode import decode
from ssl_vit.data.sources.source import Source, open_source
from ssl_vit.runs.trained import Trained, data_settings


class ShownImages(NamedTuple):
    """Images at the size of an encoder."""

    images: Float[Tensor, "b c h w"]  # normalised
    names: tuple[str, ...]  # of the file where it has one, or number of the row in its source
    source: Source | None  # None where files were named one by one
    rows: tuple[int, ...]  # of that source


def open_shown_images(
    trained: Trained,
    given: Sequence[str],
    *,
    number: int,
    seed: int,
    image_size: tuple[int, int] | None = None,
    asked: bool = False,
) -> ShownImages:
    """Decode, resize and crop images as the evaluation does.

    Args:
        given: image files; or one source, of which `number` rows are drawn by `seed`; nothing = what `trained` was
            trained on.
        image_size: height and width; None = the encoder's own.
        asked: see `check_asked`.

    Raises:
        ValueError: nothing there, or an image that cannot be decoded.
    """
    channels, size = trained.encoder.in_chans, image_size or trained.encoder.image_size
    files = [Path(item) for item in given]
    if len(files) > 1 or (files and files[0].is_file() and files[0].suffix != ".parquet"):
        decoded = []
        pages = "channels" if data_settings(trained, given[0]).pages == "channels" else "first"
        for path in files:
            try:
                decoded.append(decode(path, channels, pages=pages))
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: cannot be shown: {error}") from error
        source, rows, names = None, (), tuple(path.name for path in files)
    else:
        with naming("IMAGES", given):
            source = open_source(data_settings(trained, given[0] if given else None, asked=asked))
            rng = np.random.default_rng(seed)
            rows = tuple(rng.choice(len(source), min(number, len(source)), replace=False).tolist())
            # The next good one in place of a bad one may be there already.
            found = {at: image for image, at in (source.next_image(row, channels) for row in rows)}
        decoded, rows = list(found.values()), tuple(found)
        names = tuple(_name(source, row) for row in rows)
    images = torch.stack([centre_crop(image, size, trained.crop_pct) for image in decoded])
    return ShownImages(normalize(images, trained.normalization), names, source, rows)


@contextmanager
def naming(flag: str, given: object) -> Iterator[None]:
    """Say of an error about a source that it is what a flag names, or the run's own where none is given."""
    with renamed_settings({"data.source": flag} if given else {}):
        try:
            yield
        except ValueError as error:
            if given:
                raise
            raise ValueError(f"{error}; these are the images that the run learned from; {flag} names others") from error


def _name(source: Source, row: int) -> str:
    path = (source.rows[row][source.image_column] or {}).get("path")
    return Path(path).name if path else f"row {row}"
