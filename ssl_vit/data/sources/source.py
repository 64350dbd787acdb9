"""Every kind of source as an indexable set of undecoded images."""

import glob
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import cast
from unicodedata import normalize

import datasets
import numpy as np
from jaxtyping import Int64
from tqdm import tqdm

from ssl_vit.core.paths import as_path, path_to_text
from ssl_vit.data.config import KINDS, DataConfig, setting_error
from ssl_vit.data.decode.formats import page_numbers
from ssl_vit.data.sampler import Mixture, as_text
from ssl_vit.data.sources import openmoji
from ssl_vit.data.sources.columns import (
    find_image_column,
    find_label_column,
    integers,
    notes_on_other_columns,
    read_labels,
)
from ssl_vit.data.sources.folders import UNASKED, find_images
from ssl_vit.data.sources.images import Source
from ssl_vit.data.sources.stored import Roots
from ssl_vit.data.sources.tables import check_cache, is_saved_dataset, load_from_hub, load_parquet, load_saved


def open_source(config: DataConfig, *, may_lack: Collection[str] = ()) -> Source:
    """Open the images that `config` names, without decoding any.

    Args:
        may_lack: "split", "columns": what `config` says of these was said of another source, and holds where this one
            has them.

    Raises:
        ValueError: there are no usable images. The text begins with the setting at fault: `data.source='...': ...`.
    """
    if config.streaming:
        raise setting_error(config, "streaming", "images are needed here in any order; leave this setting out")
    opened = _open_mixture(config) if isinstance(config.source, dict) else _open(config, may_lack)
    opened = replace(opened, max_image_bytes=config.max_image_bytes)
    if config.pages == "images":
        opened = _with_row_for_each_page(opened)
    elif config.pages == "channels":
        opened = replace(opened, pages="channels")
    return opened


def _with_row_for_each_page(source: Source) -> Source:
    """The source with each page or frame of its files as an image; pages of one file are one group."""
    numbers = []
    for row in tqdm(range(len(source)), desc="counting pages", unit="file", leave=False, disable=None):
        numbers.append(page_numbers(source._file_or_none(row) or b"", source.max_image_bytes))
    rows = np.repeat(np.arange(len(source)), [len(pages) for pages in numbers])
    note = f"{len(source):,} files hold {len(rows):,} pages or frames, each of which is an image"
    notes = (*source.notes, note) if len(rows) > len(source) else source.notes
    pages = np.concatenate(numbers).astype(np.int64)
    return replace(replace(source, groups=np.arange(len(source))).subset(rows), pages=pages, notes=notes)


def _open_mixture(config: DataConfig) -> Source:
    """The sources of a mixture as one, their rows one after another."""
    weights = cast("dict[str, float]", config.source)
    parts = [_open(_own_settings(config, name), may_lack=("split",)) for name in weights]
    mixture = Mixture(tuple(weights), tuple(weights.values()), np.repeat(np.arange(len(parts)), list(map(len, parts))))
    for name, count in zip(weights, mixture.draws(), strict=True):
        if count == 0:
            raise ValueError(f"data.source={as_text(weights)}: {name!r} would never be drawn; give it more weight")
    images = [
        part.rows if part.image_column == "image" else part.rows.rename_column(part.image_column, "image")
        for part in parts
    ]
    class_names = tuple(dict.fromkeys(normalize("NFC", name) for part in parts for name in part.class_names))
    labels = np.concatenate([_labels_among(class_names, part) for part in parts])
    attributions = dict.fromkeys(part.attribution for part in parts if part.attribution)
    return Source(
        name=path_to_text(as_text(weights)),
        rows=datasets.concatenate_datasets(images),
        image_column="image",
        labels=labels if class_names else None,
        class_names=class_names,
        attribution=" ".join(attributions) or None,
        mixture=mixture,
        unlabelled="" if class_names else "none of the sources that are mixed has any; name a labelled one",
        roots=tuple(part.roots[0] for part in parts),
        notes=tuple(f"{name}: {note}" for name, part in zip(weights, parts, strict=True) for note in part.notes),
    )


def _own_settings(config: DataConfig, name: str) -> DataConfig:
    """The settings of one source of a mixture: settings of splits and columns skip sources without them."""
    path = as_path(name)
    if name == "openmoji" or (path.is_dir() and not is_saved_dataset(path)):
        label_column = "none" if config.label_column == "none" else None
        split = "train" if name == "openmoji" else config.split
        return replace(config, source=name, split=split, image_column=None, label_column=label_column)
    return replace(config, source=name)


def _labels_among(class_names: tuple[str, ...], part: Source) -> Int64[np.ndarray, " n"]:
    """A source's labels in the mixture's numbers: classes of the same name are one class."""
    if part.labels is None:
        return np.full(len(part), -1, dtype=np.int64)
    index = {name: number for number, name in enumerate(class_names)}
    # -1 stays -1: it points to the last entry.
    numbers = [*(index[normalize("NFC", name)] for name in part.class_names), -1]
    return np.array(numbers, dtype=np.int64)[part.labels]


def _open(config: DataConfig, may_lack: Collection[str] = ()) -> Source:
    name = config.source
    assert isinstance(name, str)
    if not name:
        raise setting_error(config, "source", f"name the images: {KINDS}")
    if "columns" in may_lack:
        own = _own_settings(config, name)
        split = own.split.partition("[")[0] if as_path(name).is_dir() else own.split  # rows are not sliced there
        config = replace(own, split=split if "split" in may_lack else config.split)
    if name == "openmoji":
        return _open_openmoji(config)
    try:
        path = as_path(name)
        if path.is_dir():
            if not is_saved_dataset(path):
                return _open_folder(path, config, split_may_be_missing="split" in may_lack)
            rows, roots = load_saved(path, config)
        elif path.exists() or glob.has_magic(name):
            rows, roots = load_parquet(config)
        else:
            rows, roots = load_from_hub(config)
    except (OSError, RuntimeError) as error:
        raise setting_error(config, "source", f"cannot be read: {error}") from error
    if "columns" in may_lack:
        known = {None, "none", *rows.features}
        lacking = {name: None for name in ("image_column", "label_column") if getattr(config, name) not in known}
        config = replace(config, **lacking)
    return open_rows(rows, config, roots)


def _refuse_columns(config: DataConfig, what: str) -> None:
    """Refuse settings that have no effect on a source without columns."""
    for field, values in {"image_column": (None,), "label_column": (None, "none")}.items():
        if getattr(config, field) not in values:
            raise setting_error(config, field, f"{what} has no columns; leave this setting out")


def _open_openmoji(config: DataConfig) -> Source:
    _refuse_columns(config, "the built-in source")
    if config.split != "train":
        raise setting_error(config, "split", "the built-in source has no splits; leave this setting out")
    check_cache()
    rows = openmoji.load()
    keep_labels = config.label_column != "none"
    return Source(
        name=cast(str, config.source),
        rows=rows.select_columns(["image"]),
        image_column="image",
        labels=integers(rows, "label") if keep_labels else None,
        class_names=openmoji.GROUP_NAMES if keep_labels else (),
        unlabelled="" if keep_labels else UNASKED,
        attribution=openmoji.ATTRIBUTION,
        notes=("these are the built-in images; the folder of this name here is ./openmoji",)
        if Path("openmoji").exists()
        else (),
    )


def _open_folder(root: Path, config: DataConfig, split_may_be_missing: bool) -> Source:
    _refuse_columns(config, "a folder of images")
    found = find_images(root, config, split_may_be_missing=split_may_be_missing)
    labels, class_names = found.labels
    # Arrow holds the paths in one block: millions of them cost little memory and are shared with the workers.
    rows = datasets.Dataset.from_dict({"image": found.paths})
    return Source(
        name=path_to_text(cast(str, config.source)),
        rows=rows.cast_column("image", datasets.Image(decode=False)),
        image_column="image",
        labels=labels,
        class_names=class_names,
        unlabelled=found.unlabelled,
        root=found.root,
        notes=found.notes,
    )


def open_rows(rows: datasets.Dataset, config: DataConfig, roots: Roots) -> Source:
    """A table as a source: its column of images, and of classes where there is one.

    Args:
        roots: the folders whose files rows may open.

    Raises:
        ValueError: it holds no rows, or no column is known to hold images.
    """
    if len(rows) == 0:
        raise setting_error(config, "source", f"split {config.split!r} holds no rows")
    image_column = find_image_column(rows.features, config)
    label_column = find_label_column(rows.features, config)
    labels, class_names, notes = None, (), ()
    if label_column is not None:
        (labels, class_names), notes = read_labels(rows, label_column, is_named=config.label_column is not None)
    elif config.label_column is None:
        notes = notes_on_other_columns(rows.features)
    images = rows.with_format(None).select_columns([image_column])
    others = [name for name in rows.column_names if name != image_column]
    known = f"there are {', '.join(others)}: name one in data.label_column" if others else "name a labelled source"
    unlabelled = UNASKED if config.label_column == "none" else f"no column is known to hold classes; {known}"
    return Source(
        name=path_to_text(cast(str, config.source)),
        rows=images.cast_column(image_column, datasets.Image(decode=False)),
        image_column=image_column,
        labels=labels,
        class_names=class_names,
        columns=rows.with_format(None).select_columns(others) if others else None,
        unlabelled=unlabelled if labels is None else "",
        roots=(roots,),
        notes=notes,
    )
