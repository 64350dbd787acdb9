"""Features of any source into one file, written part by part: memory stays flat, and a killed extraction goes on."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

import ssl_vit
from ssl_vit.core.distributed import process_index
from ssl_vit.core.manifest import hash_file, read_sealed, save_sealed
from ssl_vit.core.paths import path_to_text
from ssl_vit.core.reading import read_json
from ssl_vit.core.writing import own_folder, remove, replace_json, replacing
from ssl_vit.data.bad_images import describe_bad
from ssl_vit.data.config import near_match
from ssl_vit.data.sources.source import Source, open_source
from ssl_vit.evaluation.cache import feature_key
from ssl_vit.evaluation.command import Backbone, PicturesConfig, data_config, naming_own, tell_notes
from ssl_vit.evaluation.feature_files import read_description, write_parquet, write_safetensors
from ssl_vit.evaluation.features import FEATURES, check_finite, num_layers_for, select_feature, stream_features
from ssl_vit.evaluation.left_out import check_bad_share, write_bad

_SETTINGS_FILE = "settings.json"
# Where features come from in words; what they follow from is told by the hash of the weights and by the key.
_PROVENANCE = ("ssl_vit_version", "backbone", "source", "num_bad")
_OWN_COLUMNS = ("row", "path", "label", "embedding", "patches")


@dataclass(frozen=True)
class ExtractConfig(PicturesConfig):
    """What is written, and where."""

    output: str = ""
    """File to write: NAME.parquet or NAME.safetensors."""
    feature: str | None = None
    """What stands for a picture: cls, mean, cls+mean, cls4 or cls4+mean; `null` = mean for MAE, else cls."""
    patches: bool = False
    """Also write the patch tokens, as a grid of rows and columns."""
    dtype: Literal["float32", "float16"] = "float32"
    """Number format of what is written."""
    ids: str | None = None
    """Column of the source that is carried along; parquet takes text and integers, safetensors integers."""
    rows_per_part: int | None = None
    """Pictures after which what is done is put on disk; `null` = about 64 MiB of features."""
    fresh: bool = False
    """Overwrite what is there already. Killed, the same command goes on here too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.output).suffix not in (".parquet", ".safetensors"):
            raise ValueError(f"output={self.output!r}: name a file that ends in .parquet or .safetensors")
        if path_to_text(self.output) != self.output:
            raise ValueError(f"output={self.output!r}: safetensors reads UTF-8 names alone; name another file")
        if self.feature is not None and self.feature not in FEATURES:
            raise ValueError(f"feature={self.feature!r}: no such feature; choose one of {', '.join(FEATURES)}")
        if self.rows_per_part is not None and self.rows_per_part < 1:
            raise ValueError(f"rows_per_part={self.rows_per_part!r}: must be at least 1")


def extract(path: Path, config: ExtractConfig) -> None:
    """Write one row a picture, in the order of the source; the same command goes on where it was killed.

    Images that cannot be decoded have no row; NAME.bad_images.jsonl beside the output lists them with the reason.

    Parquet has the columns `row`, `path` (where pictures have one), the named id column, `label` (where there are
    labels), `embedding` [d] and `patches` [rows x columns x d], lists of fixed length. safetensors has the tensors
    `embeddings` [n, d], `patches` [n, rows, columns, d], `rows` [n] of the source, `labels` [n] and `ids` [n]. Class
    names and provenance are in the file's metadata, as JSON under "ssl_vit".

    Raises:
        ValueError: an output that holds something else, an unknown column, or more images that cannot be decoded than
            may be; the parts that were finished before it stay.
    """
    backbone = Backbone.load(path, config)
    with naming_own(config):
        source = open_source(data_config(backbone, config))
    tell_notes(source)
    ids = _check_ids(source, config)
    output = Path(config.output)
    parts = output.with_name(f"{output.name}.parts")
    described = _describe(backbone, source, config)
    start = [0]
    if process_index() == 0:
        start = [_prepare(output, parts, described, config)]
    first = cast(int, broadcast_object_list(start)[0])
    if first < 0:
        if process_index() == 0:
            print(f"{output} is finished; --fresh true writes it anew")
        return
    if first and process_index() == 0:
        print(f"Going on from row {first:,} of {len(source):,}")
    _encode(backbone, source, config, parts, first, described)
    if process_index() == 0:
        write = write_parquet if output.suffix == ".parquet" else write_safetensors
        files = sorted(parts.glob("part-*.safetensors"))
        bad = [row for file in files for row in _bad_rows(file)]
        described["num_bad"] = len(bad)
        with replacing(output) as unfinished:
            write(unfinished, files, source, ids, described)
            write_bad(output, [describe_bad(source, row, backbone.encoder.in_chans) for row in bad])
        remove(parts)
        print(f"Wrote {len(source) - len(bad):,} rows to {output}")


def _describe(backbone: Backbone, source: Source, config: ExtractConfig) -> dict[str, Any]:
    """Where features come from; two extractions with the same description but for provenance give the same features."""
    digest, rows, settings = hash_file(backbone.file, links=True), np.arange(len(source)), backbone.encoder_settings
    grid = tuple(
        (size + padding) // patch
        for size, padding, patch in zip(
            backbone.transform.size, backbone.transform.padding, backbone.encoder.patch_size, strict=True
        )
    )
    feature, width = config.feature or backbone.feature, backbone.encoder.embed_dim
    # Numbers of a row: tokens that stand for the picture, and those of its patches.
    tokens = sum(num_layers_for([kind], backbone.encoder) for kind in feature.split("+"))
    numbers = width * (tokens + (grid[0] * grid[1] if config.patches else 0))
    return {
        "ssl_vit_version": ssl_vit.__version__,
        "backbone": str(backbone.file),
        "backbone_sha256": digest,
        "encoder": json.loads(json.dumps(settings)),
        "source": source.name,
        "num_rows": len(source),
        "key": feature_key(digest, settings, source, rows, backbone.transform, backbone.settings.autocast_dtype),
        "transform": json.loads(json.dumps(backbone.transform.as_plain())),
        "precision": str(backbone.settings.autocast_dtype),
        "feature": feature,
        "patch_grid": list(grid) if config.patches else None,
        "dtype": config.dtype,
        "rows_per_part": config.rows_per_part or max(1, 2**26 // (numbers * getattr(torch, config.dtype).itemsize)),
        "ids": config.ids,
        "class_names": list(source.class_names),
    }


def _prepare(output: Path, parts: Path, described: dict[str, Any], config: ExtractConfig) -> int:
    """The row to go on at; -1 where all is done."""
    if output.exists() and not config.fresh:
        found = read_description(output)
        if found is not None and _identity(found) == _identity(described):
            remove(parts)  # which a kill may have left
            return -1
        what = "holds something else" if found is None else f"has other settings: {_differences(found, described)}"
        raise ValueError(f"output={str(output)!r}: {what}; choose another name, or --fresh true to overwrite it")
    own_folder(parts).mkdir(parents=True, exist_ok=True)
    settings = parts / _SETTINGS_FILE
    found = read_json(settings) if settings.exists() else None
    if found is None or _identity(found) != _identity(described):
        if found is not None and not config.fresh:
            raise ValueError(
                f"output={str(output)!r}: an unfinished extraction has other settings: "
                f"{_differences(found, described)}; go on with those, or choose another name, or --fresh true"
            )
        for part in parts.glob("part-*"):
            remove(part)
        replace_json(settings, described)
    done, size = 0, described["rows_per_part"]
    while done * size < described["num_rows"]:
        rows = min(size, described["num_rows"] - done * size)
        if _rows_of(_part(parts, done), described["key"]) != rows:
            break
        done += 1
    # What follows a gap, as a damaged part is one, is done again.
    for later in parts.glob("part-*"):
        if later.suffix != ".safetensors" or later >= _part(parts, done):
            remove(later)
    return min(done * size, described["num_rows"])


def _identity(described: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in described.items() if name not in _PROVENANCE}


def _differences(found: dict[str, Any], described: dict[str, Any]) -> str:
    names = [name for name in described if name not in ("ssl_vit_version", "backbone", "key")]
    shown = [
        f"{name} {found.get(name)!r} -> {described[name]!r}" for name in names if found.get(name) != described[name]
    ]
    return ", ".join(shown) or "the pictures have changed"


def _part(parts: Path, number: int) -> Path:
    return parts / f"part-{number:08d}.safetensors"


def _rows_of(part: Path, key: str) -> int:
    """Rows of a part, 0 where it is missing, damaged or of another extraction."""
    tensors = read_sealed(part, f"{key} {part.name}") or {}
    return len(tensors["embeddings"]) if "embeddings" in tensors else 0


def _encode(
    backbone: Backbone, source: Source, config: ExtractConfig, parts: Path, first: int, described: dict[str, Any]
) -> None:
    """Encode the rows from `first` on, and put them on disk in parts that appear whole or not at all."""
    if first >= len(source):
        return
    feature, size = described["feature"], described["rows_per_part"]
    batches = stream_features(
        backbone.encoder,
        source,
        np.arange(first, len(source)),
        backbone.transform,
        backbone.settings,
        num_layers=num_layers_for([feature], backbone.encoder),
        with_patches=config.patches,
        skip_bad=config.on_bad_image == "skip",
    )
    waiting: list[dict[str, Tensor]] = []
    dtype = getattr(torch, config.dtype)
    report = _Report(first, len(source))
    written = first
    bad = [row for part in sorted(parts.glob("part-*.safetensors")) for row in _bad_rows(part)]
    for batch in batches:
        bad += (report.done + (~batch["good"]).nonzero()[:, 0]).tolist()
        check_bad_share(source, bad, len(source), config.max_bad_share, backbone.encoder.in_chans)
        # Bad ones keep their row until all is done, so that a part is of the same rows of the source whatever is bad.
        tensors = {"rows": torch.arange(report.done, report.done + len(batch["good"])), "good": batch["good"]}
        tensors["embeddings"] = select_feature(batch, feature)
        check_finite(tensors["embeddings"])
        if config.patches:
            tensors["patches"] = batch["patches"]
        waiting.append({name: v.to(dtype) if v.is_floating_point() else v for name, v in tensors.items()})
        report.add(len(batch["mean"]))
        while (count := sum(len(item["embeddings"]) for item in waiting)) and (
            count >= size or written + count == len(source)
        ):
            joined = {name: torch.cat([item[name] for item in waiting]) for name in waiting[0]}
            cut = min(size, count)
            part = {name: values[:cut] for name, values in joined.items()}
            _save_part(_part(parts, written // size), part, described["key"])
            waiting = [{name: values[cut:].clone() for name, values in joined.items()}] if cut < count else []
            written += cut


def _bad_rows(part: Path) -> list[int]:
    """Rows of the source that a part found no image in; parts of before that was allowed have none."""
    with safe_open(part, framework="pt") as file:
        if "good" not in file.keys():  # noqa: SIM118  # no mapping
            return []
        return file.get_tensor("rows")[~file.get_tensor("good")].tolist()


def _save_part(part: Path, tensors: dict[str, Tensor], key: str) -> None:
    with replacing(part) as unfinished:
        save_sealed(tensors, unfinished, f"{key} {part.name}")


class _Report:
    """A line each half minute where there is no terminal for a progress bar."""

    def __init__(self, first: int, total: int) -> None:
        self.done, self.first, self.total = first, first, total
        self.started = self.said = time.monotonic()
        self.silent = sys.stderr.isatty() or process_index() != 0

    def add(self, rows: int) -> None:
        self.done += rows
        now = time.monotonic()
        if self.silent or now - self.said < 30:
            return
        self.said = now
        rate = (self.done - self.first) / (now - self.started)
        left = tqdm.format_interval((self.total - self.done) / rate)
        print(f"{self.done:,}/{self.total:,} images  {rate:.0f} images/s  {left} left", flush=True)


def _check_ids(source: Source, config: ExtractConfig) -> pa.DataType | None:
    """The type of the column to carry along."""
    if config.ids is None:
        return None
    names = [] if source.columns is None else source.columns.column_names
    if source.columns is None or config.ids not in names:
        listed = f"there are: {', '.join(names)}" if names else "the source has none"
        raise ValueError(f"ids={config.ids!r}: no such column; {near_match(config.ids, names)}{listed}")
    kind = source.columns.features.arrow_schema.field(config.ids).type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not pa.types.is_integer(kind) and not (text and config.output.endswith(".parquet")):
        raise ValueError(f"ids={config.ids!r}: holds {kind}; parquet takes text and integers, safetensors integers")
    if config.output.endswith(".parquet"):
        if config.ids in _OWN_COLUMNS:
            raise ValueError(
                f"ids={config.ids!r}: a column of this name is written anyway; rename yours, or write safetensors"
            )
    else:
        _check_numbers(source.columns.select_columns([config.ids]).with_format("arrow"), config.ids)
    return kind


def _check_numbers(column: Any, name: str, rows_at_once: int = 100_000) -> None:
    """Refuse what the 64 bits of a tensor of ids have no room for."""
    for start in range(0, len(column), rows_at_once):
        values = column[start : start + rows_at_once].column(0)
        if values.null_count:
            row = start + values.is_null().index(True).as_py()
            raise ValueError(f"ids={name!r}: row {row} holds none, which safetensors cannot say; write parquet")
        try:
            values.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise ValueError(f"ids={name!r}: does not fit int64 of safetensors ({error}); write parquet") from error
