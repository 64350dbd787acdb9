"""Extract features of any source into one file, part by part: memory stays flat, and a killed extraction resumes."""

import json
import sys
import time
from collections.abc import Iterator
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
from ssl_vit.core.settings import check_ranges
from ssl_vit.core.writing import own_folder, remove, replace_json, replacing
from ssl_vit.data.bad_images import describe_bad
from ssl_vit.data.config import near_match
from ssl_vit.data.sources.source import Source, open_source
from ssl_vit.evaluation.cache import feature_key
from ssl_vit.evaluation.command import Backbone, PicturesConfig, data_config, naming_own, tell_notes
from ssl_vit.evaluation.feature_files import read_description, write_parquet, write_safetensors
from ssl_vit.evaluation.features import (
    check_feature,
    check_finite,
    num_layers_for,
    select_feature,
    stream_features,
)
from ssl_vit.evaluation.left_out import check_bad_share, write_bad

_SETTINGS_FILE = "settings.json"
_REPORT_SECONDS = 30
# Only words: the hash of the weights and the key decide whether features are the same.
_PROVENANCE = ("ssl_vit_version", "backbone", "source", "num_bad")
_OWN_COLUMNS = ("row", "path", "label", "embedding", "patches")


@dataclass(frozen=True)
class ExtractConfig(PicturesConfig):
    """What is written, and where."""

    output: str = ""
    """File to write: NAME.parquet or NAME.safetensors."""
    feature: str | None = None
    """Feature of an image: cls, mean, cls+mean, cls4 or cls4+mean; `null` = mean for MAE, else cls."""
    patches: bool = False
    """Also write the patch tokens, as a grid of rows and columns."""
    dtype: Literal["float32", "float16"] = "float32"
    """Number format of the written features."""
    ids: str | None = None
    """Column of the source to copy; parquet takes text and integers, safetensors integers."""
    rows_per_part: int | None = None
    """Images after which finished features are put on disk; `null` = about 64 MiB of features."""
    fresh: bool = False
    """Overwrite an existing output. If this is killed, the same command resumes too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.output).suffix not in (".parquet", ".safetensors"):
            raise ValueError(f"output={self.output!r}: name a file that ends in .parquet or .safetensors")
        if path_to_text(self.output) != self.output:
            raise ValueError(f"output={self.output!r}: safetensors reads UTF-8 names alone; name another file")
        check_feature(self.feature)
        check_ranges(self, rows_per_part="[1, inf)")


def extract(path: Path, config: ExtractConfig) -> None:
    """Write one row for each image, in the order of the source; a killed extraction resumes with the same command.

    Images that cannot be decoded have no row; NAME.bad_images.jsonl beside the output lists them with the reason.

    Parquet has the columns `row`, `path` (where images have one), the named id column, `label` (where there are
    labels), `embedding` [d] and `patches` [rows x columns x d], lists of fixed length. safetensors has the tensors
    `embeddings` [n, d], `patches` [n, rows, columns, d], `rows` [n] of the source, `labels` [n] and `ids` [n]. Class
    names and provenance are in the file's metadata, as JSON under "ssl_vit".

    Raises:
        ValueError: an output that holds something else, an unknown column, or too many images that cannot be decoded;
            the finished parts stay.
    """
    backbone = Backbone.load(path, config)
    with naming_own(config):
        source = open_source(data_config(backbone, config))
    tell_notes(source)
    _check_ids(source, config)
    output = Path(config.output)
    parts = output.with_name(f"{output.name}.parts")
    described = _describe(backbone, source, config)
    start = [_prepare(output, parts, described, config) if process_index() == 0 else 0]
    first = cast(int, broadcast_object_list(start)[0])
    if first < 0:
        if process_index() == 0:
            print(f"{output} is finished; --fresh writes it anew")
        return
    if first and process_index() == 0:
        print(f"Going on from row {first:,} of {len(source):,}")
    if first < len(source):
        size = described["rows_per_part"]
        for number, part in enumerate(_cut(_encode(backbone, source, config, parts, first, described), size)):
            _save_part(_part(parts, first // size + number), part, described["key"])
    if process_index() == 0:
        write = write_parquet if output.suffix == ".parquet" else write_safetensors
        bad = _bad_rows(parts)
        described["num_bad"] = len(bad)
        with replacing(output) as unfinished:
            write(unfinished, _files(parts), source, described)
            write_bad(output, [describe_bad(source, row, backbone.encoder.in_chans) for row in bad])
        remove(parts)
        print(f"Wrote {len(source) - len(bad):,} rows to {output}")


def _describe(backbone: Backbone, source: Source, config: ExtractConfig) -> dict[str, Any]:
    """Describe an extraction; where two descriptions agree but for provenance, the features are the same."""
    digest, rows, settings = hash_file(backbone.file, links=True), np.arange(len(source)), backbone.encoder_settings
    transform, dtype = backbone.transform, backbone.settings.autocast_dtype
    grid = list(backbone.encoder.grid_of(*transform.padded_size))
    feature = config.feature or backbone.feature
    # Tokens that make the feature of an image, and its patch tokens.
    num_tokens = sum(num_layers_for([kind], backbone.encoder) for kind in feature.split("+"))
    num_tokens += grid[0] * grid[1] if config.patches else 0
    row_bytes = backbone.encoder.embed_dim * num_tokens * getattr(torch, config.dtype).itemsize
    return {
        "ssl_vit_version": ssl_vit.__version__,
        "backbone": str(backbone.file),
        "backbone_sha256": digest,
        "encoder": json.loads(json.dumps(settings)),
        "source": source.name,
        "num_rows": len(source),
        "key": feature_key(digest, settings, source, rows, transform, dtype),
        "transform": json.loads(json.dumps(transform.as_plain())),
        "precision": str(dtype),
        "feature": feature,
        "patch_grid": grid if config.patches else None,
        "dtype": config.dtype,
        "rows_per_part": config.rows_per_part or max(1, 2**26 // row_bytes),
        "ids": config.ids,
        "class_names": list(source.class_names),
    }


def _prepare(output: Path, parts: Path, described: dict[str, Any], config: ExtractConfig) -> int:
    """Return the row to resume at, -1 if everything is done; remove parts that cannot be used."""
    if output.exists() and not config.fresh:
        found = read_description(output)
        # What is written does not depend on how it was cut into parts.
        if found is not None and _identity(found, "rows_per_part") == _identity(described, "rows_per_part"):
            remove(parts)  # a kill may have left them
            return -1
        what = "holds something else" if found is None else f"has other settings: {_differences(found, described)}"
        raise ValueError(f"output={str(output)!r}: {what}; choose another name, or --fresh to overwrite it")
    own_folder(parts).mkdir(parents=True, exist_ok=True)
    settings = parts / _SETTINGS_FILE
    found = read_json(settings) if settings.exists() else None
    if found is None or _identity(found) != _identity(described):
        if found is not None and not config.fresh:
            raise ValueError(
                f"output={str(output)!r}: an unfinished extraction has other settings: "
                f"{_differences(found, described)}; go on with those, or choose another name, or --fresh"
            )
        for part in parts.glob("part-*"):
            remove(part)
        replace_json(settings, described)
    done, size = 0, described["rows_per_part"]
    while done * size < described["num_rows"]:
        part = _part(parts, done)
        tensors = read_sealed(part, f"{described['key']} {part.name}") or {}
        if len(tensors.get("embeddings", ())) != min(size, described["num_rows"] - done * size):
            break
        done += 1
    # Parts behind a missing or damaged one are encoded again.
    for later in parts.glob("part-*"):
        if later.suffix != ".safetensors" or later >= _part(parts, done):
            remove(later)
    return min(done * size, described["num_rows"])


def _identity(described: dict[str, Any], *but: str) -> dict[str, Any]:
    return {name: value for name, value in described.items() if name not in (*_PROVENANCE, *but)}


def _differences(found: dict[str, Any], described: dict[str, Any]) -> str:
    names = [name for name in described if name not in ("ssl_vit_version", "backbone", "key")]
    shown = [
        f"{name} {found.get(name)!r} -> {described[name]!r}" for name in names if found.get(name) != described[name]
    ]
    return ", ".join(shown) or "the images have changed"


def _part(parts: Path, number: int) -> Path:
    return parts / f"part-{number:08d}.safetensors"


def _files(parts: Path) -> list[Path]:
    return sorted(parts.glob("part-*.safetensors"))


def _save_part(part: Path, tensors: dict[str, Tensor], key: str) -> None:
    with replacing(part) as unfinished:
        save_sealed(tensors, unfinished, f"{key} {part.name}")


def _bad_rows(parts: Path) -> list[int]:
    """Rows of the source whose images could not be decoded; parts of earlier versions have no such flag."""
    found: list[int] = []
    for part in _files(parts):
        with safe_open(part, framework="pt") as file:
            if "good" in file.keys():  # noqa: SIM118  # no mapping
                found += file.get_tensor("rows")[~file.get_tensor("good")].tolist()
    return found


def _encode(
    backbone: Backbone, source: Source, config: ExtractConfig, parts: Path, first: int, described: dict[str, Any]
) -> Iterator[dict[str, Tensor]]:
    """Encode the rows from `first` on, batch by batch, and print the progress.

    Undecodable images keep their row here, so that a part always holds the same rows of the source.
    """
    feature, dtype, row = described["feature"], getattr(torch, config.dtype), first
    bad = _bad_rows(parts) if process_index() == 0 else []
    started = reported = time.monotonic()
    for batch in stream_features(
        backbone.encoder,
        source,
        np.arange(first, len(source)),
        backbone.transform,
        backbone.settings,
        num_layers=num_layers_for([feature], backbone.encoder),
        with_patches=config.patches,
        skip_bad=config.on_bad_image == "skip",
    ):
        rows = torch.arange(row, row + len(batch["good"]))
        bad += rows[~batch["good"]].tolist()
        check_bad_share(source, bad, len(source), config.max_bad_share, backbone.encoder.in_chans)
        embeddings = select_feature(batch, feature)
        check_finite(embeddings)
        patches = {"patches": batch["patches"].to(dtype)} if config.patches else {}
        yield {"rows": rows, "good": batch["good"], "embeddings": embeddings.to(dtype), **patches}
        row, now = row + len(rows), time.monotonic()
        if now - reported > _REPORT_SECONDS and not sys.stderr.isatty():  # a terminal has a progress bar
            reported, rate = now, (row - first) / (now - started)
            left = tqdm.format_interval((len(source) - row) / rate)
            print(f"{row:,}/{len(source):,} images  {rate:.0f} images/s  {left} left", flush=True)


def _cut(batches: Iterator[dict[str, Tensor]], size: int) -> Iterator[dict[str, Tensor]]:
    """Join and cut batches into parts of `size` rows each; the last one may have fewer."""
    waiting: list[dict[str, Tensor]] = []
    count = 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch["rows"])
        if count >= size:
            joined = {name: torch.cat([item[name] for item in waiting]) for name in batch}
            cut = count - count % size
            for start in range(0, cut, size):
                yield {name: values[start : start + size] for name, values in joined.items()}
            count -= cut
            waiting = [{name: values[cut:].clone() for name, values in joined.items()}] if count else []
    if waiting:
        yield {name: torch.cat([item[name] for item in waiting]) for name in waiting[0]}


def _check_ids(source: Source, config: ExtractConfig) -> None:
    """Refuse an id column that does not exist or that the output cannot hold."""
    name = config.ids
    if name is None:
        return
    names = [] if source.columns is None else source.columns.column_names
    if source.columns is None or name not in names:
        listed = f"there are: {', '.join(names)}" if names else "the source has none"
        raise ValueError(f"ids={name!r}: no such column; {near_match(name, names)}{listed}")
    kind, is_parquet = source.columns.features.arrow_schema.field(name).type, config.output.endswith(".parquet")
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not pa.types.is_integer(kind) and not (text and is_parquet):
        raise ValueError(f"ids={name!r}: holds {kind}; parquet takes text and integers, safetensors integers")
    if is_parquet and name in _OWN_COLUMNS:
        raise ValueError(f"ids={name!r}: a column of this name is written anyway; rename yours, or write safetensors")
    if not is_parquet:
        _check_int64(source.columns.select_columns([name]).with_format("arrow"), name)


def _check_int64(column: Any, name: str, rows_at_once: int = 100_000) -> None:
    """Refuse ids that a tensor of 64-bit integers cannot hold."""
    for start in range(0, len(column), rows_at_once):
        values = column[start : start + rows_at_once].column(0)
        if values.null_count:
            row = start + values.is_null().index(True).as_py()
            raise ValueError(f"ids={name!r}: row {row} holds none, which safetensors cannot say; write parquet")
        try:
            values.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise ValueError(f"ids={name!r}: does not fit int64 of safetensors ({error}); write parquet") from error
