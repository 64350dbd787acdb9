"""A cache of features: read again while the weights, the images and how they are encoded are the same."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor

from ssl_vit.core.distributed import process_index
from ssl_vit.core.manifest import hash_of, read_sealed, save_sealed
from ssl_vit.core.text import plain
from ssl_vit.core.writing import UNFINISHED, own_folder
from ssl_vit.data.augment.evaluation import EvalTransform
from ssl_vit.data.sources.fingerprint import fingerprint
from ssl_vit.data.sources.source import Source

_FORMAT = 2  # raised when features are computed otherwise


def cached_features(
    folder: Path | None,
    key: str,
    num_layers: int,
    extract: Callable[[], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Read features from `folder`/`key`.safetensors if it has at least `num_layers` blocks, else call `extract`.

    Every process calls this, and either all read or all extract. Only the main process is given the features. A folder
    that cannot be written is no error: the features are then extracted each time.

    Args:
        folder: where features are kept; None = nowhere.
        key: see `feature_key`.
    """
    file = None if folder is None else folder / f"{key}.safetensors"
    found = [False]
    features: dict[str, Tensor] = {}
    if folder is not None and file is not None and process_index() == 0:
        own_folder(folder)
        features = read_sealed(file, key) or {}  # what is damaged, or of something else, is written anew
        found = ["cls" in features and features["cls"].shape[1] >= num_layers]
    if broadcast_object_list(found)[0]:
        return features
    features = extract()
    if file is not None and process_index() == 0:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Two scripts may write the same features at once.
            with tempfile.TemporaryDirectory(dir=file.parent, prefix=UNFINISHED) as unfinished:
                save_sealed(features, Path(unfinished) / file.name, key)
                (Path(unfinished) / file.name).replace(file)
        except (SafetensorError, OSError) as error:
            print(f"Features are not kept for the next time: {plain(error)}")
    return features


def feature_key(
    backbone: str,
    encoder: Mapping[str, Any],
    source: Source,
    rows: Int[np.ndarray, " n"],
    transform: EvalTransform,
    dtype: torch.dtype | None,
) -> str:
    """Hash everything that features depend on.

    Args:
        backbone: hash of the weights, see `hash_file`.
        encoder: settings that the encoder is built with; not all of them show in the weights.
        dtype: number format the encoder ran in; None = its own.
    """
    described = {
        "format": _FORMAT,
        "backbone": backbone,
        "encoder": dict(encoder),
        "source": fingerprint(source, rows),
        "transform": transform.as_plain(),
        "dtype": str(dtype),
    }
    return hash_of(described)
