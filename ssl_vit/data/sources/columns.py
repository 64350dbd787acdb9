"""Which column of a data set holds the images, and which one the classes."""

from typing import Any

import datasets

from ssl_vit.data.config import DataConfig, near_match, setting_error
from ssl_vit.data.sources.labels import is_integer, is_text_or_bool, type_name

# Columns taken for labels if they hold integers, and preferred if there are several columns of classes.
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


def check_column(features: datasets.Features, config: DataConfig, field: str) -> str:
    """The column named by a setting, if there is one of this name."""
    name = getattr(config, field)
    if name not in list(features):
        near = near_match(name, list(features))
        raise setting_error(config, field, f"no such column; {near}there are: {columns_with_types(features)}")
    return name


def columns_with_types(features: datasets.Features) -> str:
    return ", ".join(f"{name} ({type_name(feature)})" for name, feature in features.items())


def find_image_column(features: datasets.Features, config: DataConfig) -> str:
    ranks = {name: rank for name, feature in features.items() if (rank := _image_rank(feature))}
    if config.image_column is not None:
        name = check_column(features, config, "image_column")
        if name not in ranks:
            raise setting_error(config, "image_column", f"not a column of images: {columns_with_types(features)}")
        return name
    candidates = [name for name, rank in ranks.items() if rank == min(ranks.values())]
    if not candidates:
        raise setting_error(config, "source", f"no column holds images; there are: {columns_with_types(features)}")
    if len(candidates) > 1:
        listed = ", ".join(candidates)
        raise setting_error(config, "image_column", f"several columns hold images, name one of them: {listed}")
    return candidates[0]


def _image_rank(feature: Any) -> int:
    """1 for surely images to 3 for possibly, 0 for surely not.

    A parquet file written without Hugging Face's metadata has structs or plain bytes only.
    """
    if isinstance(feature, datasets.Image):
        return 1
    if isinstance(feature, dict) and "bytes" in feature and set(feature) <= {"bytes", "path"}:
        return 2
    return 3 if isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary") else 0


def find_label_column(features: datasets.Features, config: DataConfig) -> str | None:
    if config.label_column == "none":
        return None
    if config.label_column is not None:
        return check_column(features, config, "label_column")
    candidates = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in _LABEL_COLUMNS if name in candidates]
    if len(candidates) > 1 and not usual:
        listed = ", ".join(candidates)
        raise setting_error(config, "label_column", f"several columns hold classes, name one or 'none': {listed}")
    numbered = [name for name in _LABEL_COLUMNS if is_integer(features.get(name))]
    return next(iter(usual + candidates + numbered), None)


def notes_on_other_columns(features: datasets.Features) -> tuple[str, ...]:
    """Why columns that look like labels by their names are none, where nothing was said of labels."""
    return tuple(
        f"no labels: column {name!r} holds {type_name(features[name])}"
        + (f"; give --data.label_column {name} if these are classes" if is_text_or_bool(features[name]) else "")
        for name in _LABEL_COLUMNS
        if name in features
    )
