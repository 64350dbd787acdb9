"""Parquet files, folders of save_to_disk and data sets of the hub, as tables of undecoded rows."""

import difflib
import glob
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets
import datasets.config
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

from ssl_vit.core.paths import as_path
from ssl_vit.core.reading import read_json
from ssl_vit.data.config import KINDS, DataConfig, near_match, setting_error
from ssl_vit.data.decode.formats import IMAGE_SUFFIXES
from ssl_vit.data.sources.columns import type_name
from ssl_vit.data.sources.parquet_builder import ParquetFiles, read_batches
from ssl_vit.data.sources.stored import Roots, is_of_hub

_READ_ROWS = 32  # rows taken from a streamed file at once
_ARCHIVE = "unpack it and name the folder"
_TABLE = (
    "write a parquet file with the bytes of the images in one column and the classes in another, as "
    "pandas.DataFrame.to_parquet does; or name the images' folder"
)
_VIDEO = "write its frames into a folder, as `ffmpeg -i VIDEO FOLDER/%06d.png` does, and name that"
_ARRAYS = "save each image as a .npy file, all in one folder, and name that"
# What to do with a file that is no source, by the end of its name; a missing file so named is no id of the hub.
_ADVICE = {
    **dict.fromkeys(("zip", "tar.gz", "tgz", "tar.bz2", "tar.xz", "tar.zst", "7z", "rar", "gz"), _ARCHIVE),
    **dict.fromkeys(("csv", "tsv", "txt", "json", "jsonl", "xlsx"), _TABLE),
    **dict.fromkeys(("mp4", "avi", "mov", "mkv", "webm"), _VIDEO),
    **dict.fromkeys(("npz", "h5", "hdf5", "mat", "pt", "pkl"), _ARRAYS),
    **dict.fromkeys(IMAGE_SUFFIXES, "is one image: name its folder, or a folder of links"),
    "arrow": "name the folder that save_to_disk wrote it into",
    "tar": "WebDataset tars are streamed; give --data.streaming true",
    "tfrecord": _ARCHIVE.replace("unpack it", "write its images out as files"),
    "lmdb": _ARCHIVE.replace("unpack it", "write its images out as files"),
}


def find_files(config: DataConfig) -> list[str]:
    """The files that a path or pattern names; a path that exists is not taken for a pattern.

    Raises:
        ValueError: there are none.
    """
    path = as_path(cast(str, config.source))
    # Path.glob refuses absolute patterns.
    files = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
    if not files:
        raise setting_error(config, "source", "no file matches this pattern")
    for file in files:
        if not os.path.isfile(file):  # noqa: PTH113  # reading others may never end
            raise setting_error(config, "source", f"{file} is not a regular file")
    return [os.path.abspath(file) for file in files]  # noqa: PTH100  # keeps links


def folder_of(files: list[str], config: DataConfig) -> tuple[str, ...]:
    """The folder where paths in the rows begin and must stay: the deepest one that holds all files."""
    folder = os.path.commonpath([str(Path(file).parent) for file in files])
    return allowed(os.path.realpath(folder), config)


def allowed(folder: str, config: DataConfig, *more: str) -> tuple[str, ...]:
    """The folders whose files a source's rows may open; see `Roots`."""
    return (folder, *more, *((Path(folder).anchor or os.sep,) if config.allow_outside_paths else ()))


def read_footers(files: list[str], config: DataConfig) -> tuple[datasets.Features, list[int]]:
    """The columns that all files share, and the number of rows in each file.

    Raises:
        ValueError: a file is not parquet, no file has rows, or columns or class names differ.
    """
    features, counts = datasets.Features(), []
    for file in files:
        if not file.lower().endswith(".parquet"):
            suffix = next((end for end in _ADVICE if file.lower().endswith(f".{end}")), None)
            advice = f"; {_ADVICE[suffix]}" if suffix else f"; data.source may be {KINDS}"
            raise setting_error(config, "source", f"{file} is not a parquet file{advice}")
        try:
            footer = pq.read_metadata(file)
            found = datasets.Features.from_arrow_schema(footer.schema.to_arrow_schema())
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            what = f"{file} is not a readable parquet file: {type(error).__name__}: {error}"
            raise setting_error(config, "source", " ".join(what.split())) from error
        counts.append(footer.num_rows)
        features = features or found
        _check_same_columns(files[0], features, file, found, config)
        empty = [name for name, kind in features.items() if isinstance(kind, datasets.Value) and kind.dtype == "null"]
        features = datasets.Features({**features, **{name: found[name] for name in empty}})
    if sum(counts) == 0:
        raise setting_error(config, "source", "holds no rows")
    return features, counts


def _check_same_columns(
    first: str, features: datasets.Features, file: str, found: datasets.Features, config: DataConfig
) -> None:
    """Refuse files of one source that have other columns, or other classes under the same numbers."""
    both = f"{first} and {file}"
    differing = sorted(set(features) ^ set(found))
    if differing:
        listed = ", ".join(differing)
        what = f"{both} have other columns (only one has {listed}); name files of one kind, or mix them: {{A: 1, B: 1}}"
        raise setting_error(config, "source", what)
    for name, kind in features.items():
        other = found[name]
        if datasets.ClassLabel in (type(kind), type(other)) and kind != other:
            classes = " and ".join(_classes(item) for item in (kind, other))
            what = f"{both} differ in the classes of column {name!r}: {classes}; a mixture unites them: {{A: 1, B: 1}}"
            raise setting_error(config, "source", what)


def _classes(kind: Any) -> str:
    if not isinstance(kind, datasets.ClassLabel):
        return type_name(kind)
    return f"{len(kind.names)} ({', '.join(kind.names[:3])}{', ...' if len(kind.names) > 3 else ''})"


def load_parquet(config: DataConfig) -> tuple[datasets.Dataset, Roots]:
    """The rows of parquet files, copied to the cache of `datasets`, and the files that they may open."""
    files = find_files(config)
    features, _ = read_footers(files, config)
    check_cache()
    stamps = [(str(status.st_size), str(status.st_mtime_ns)) for status in map(os.stat, files)]
    try:
        builder = ParquetFiles(
            dataset_name="parquet",
            features=features,
            data_files=DataFilesDict({"train": DataFilesList(files, cast(Any, stamps))}),
        )
        builder.download_and_prepare()
        rows = builder.as_dataset(split=cast(Any, config.split))
    except ValueError as error:  # of `datasets`: an unknown split, or a slice that it cannot parse
        raise setting_error(config, "split", f"{error} Parquet files are the split 'train'") from error
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())  # the outer error only says that there was one
        raise setting_error(config, "source", f"reading the parquet files failed: {reason}") from error
    return cast(datasets.Dataset, rows), folder_of(files, config)


def read_parquet(
    files: tuple[str, ...], column: str, max_image_bytes: int, shard: int, start: int
) -> Iterator[dict[str, Any] | None]:
    """Undecoded images of a parquet file from its row `start` on."""
    # With a buffer, or each open file would hold a whole row group.
    with pq.ParquetFile(files[shard], buffer_size=2**20) as file:
        for batch in read_batches(file, _READ_ROWS, max_image_bytes, start, [column]):
            for value in batch.column(column).to_pylist():
                yield {"bytes": value, "path": None} if isinstance(value, bytes) else value


def is_saved_dataset(folder: Path) -> bool:
    is_dict = (folder / "dataset_dict.json").is_file()
    return is_dict or ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file())


def load_saved(folder: Path, config: DataConfig) -> tuple[datasets.Dataset, Roots]:
    """The rows of a folder that `save_to_disk` wrote, and the files that they may open."""
    roots = allowed(os.path.realpath(folder), config)
    try:
        if (folder / "dataset_dict.json").is_file():
            names = list(map(str, read_json(folder / "dataset_dict.json", links=True)["splits"]))
            if config.split in names:
                return _read_saved(folder / config.split)[0], roots
            near = near_match(config.split, names)
            problem = f"no such split; {near}there are: {', '.join(names)}"
        else:
            rows, split = _read_saved(folder)
            if config.split in ("train", split):
                return rows, roots
            problem = "data.source is one data set without splits; leave data.split out"
    except Exception as error:  # a half-written folder raises anything
        raise setting_error(config, "source", f"this save_to_disk folder is empty or incomplete: {error}") from error
    raise setting_error(config, "split", problem)


def _read_saved(folder: Path) -> tuple[datasets.Dataset, str | None]:
    """A saved table and the name of its split. `load_from_disk` would take '::' in a path for an address."""
    state = read_json(folder / "state.json", links=True)
    info, tables = datasets.DatasetInfo.from_dict(read_json(folder / "dataset_info.json", links=True)), []
    for name in [item["filename"] for item in state["_data_files"]]:
        file = folder / name
        if file.name != name or not file.is_file():
            raise ValueError(f"state.json names {name!r}, which is no file of this folder")
        rows = datasets.Dataset.from_file(str(file), info=info.copy())
        rows.data.table.validate(full=True)  # or damaged offsets would read outside the file
        tables.append(rows)
    return datasets.concatenate_datasets(tables), state.get("_split")


def hub_id(config: DataConfig) -> str:
    """The source as the id of a data set on the hub.

    Raises:
        ValueError: it is plainly a path, or a mistyped one.
    """
    source = cast(str, config.source)
    path = as_path(source)
    suffix = next((end for end in ("parquet", *_ADVICE) if source.lower().endswith(f".{end}")), None)
    is_path = source.startswith(("/", ".", "~")) or "\\" in source or source.count("/") > 1 or suffix is not None
    near = _near_path(path)
    first = source.partition("/")[0]
    if is_path:
        raise setting_error(config, "source", f"no such file or folder{near}")
    if "/" in source and Path(first).is_dir():
        what = f"no such file or folder{near}; {first!r} is a folder here, so this is taken for no data set of the hub"
        raise setting_error(config, "source", what)
    if "/" not in source and (near or source in _PACKAGED_DATASETS_MODULES):
        raise setting_error(config, "source", f"no such file or folder{near}; a data set of the hub is OWNER/NAME")
    return source


def _near_path(path: Path) -> str:
    """The end of an error that names a file of nearly the same name, if there is one."""
    try:
        names = {entry.name.lower(): entry.name for entry in islice(os.scandir(path.parent), 10_000)}
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name.lower(), names, n=1, cutoff=0.8)
    return f"; did you mean {str(path.with_name(names[near[0]]))!r}?" if near else ""


def check_hub(config: DataConfig) -> str:
    """Ask the hub for a data set once (`datasets` would ask six times where nothing answers); returns its id.

    Raises:
        ValueError: there is no such data set, or neither a hub nor a local copy.
    """
    name = hub_id(config)
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except (OfflineModeIsEnabled, HfHubHTTPError) as error:
        if isinstance(error, RepositoryNotFoundError):
            raise hub_error(config, "the Hugging Face hub has no data set of this name, or not for you") from error
    except Exception as error:  # no network, no answer, a name that none can have
        *owner, last = name.split("/")
        copy = Path(datasets.config.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(last)])
        if isinstance(error, HFValidationError) or config.streaming or not copy.is_dir():
            raise hub_error(config, f"the Hugging Face hub cannot be asked for it: {error}") from error
    return name


def check_own_files(name: str, files: Mapping[Any, Sequence[str]] | None) -> None:
    """Refuse a data set whose description names files outside its repository: addresses, or paths of this machine.

    Raises:
        ValueError: it names such a file.
    """
    for file in (file for split in (files or {}).values() for file in split):
        if not is_of_hub(file, f"hf://datasets/{name}"):
            raise ValueError(f"it names {file}, which is no file of its repository, and no others are opened")


def hub_error(config: DataConfig, what: str) -> ValueError:
    text = f"no such file or folder here, and {what}. data.source may be {KINDS}"
    return setting_error(config, "source", " ".join(text.split()))


def load_from_hub(config: DataConfig) -> tuple[datasets.Dataset, Roots]:
    """The rows of a data set on the hub, and the files that they may open: those that were downloaded."""
    name = check_hub(config)
    check_cache()
    try:
        rows = load_split(name, split=config.split)
    except Exception as error:  # no access, offline, unknown split, a format that needs code ...
        what = f"loading split {config.split!r} of the data set of this name from the Hugging Face hub failed: {error}"
        raise hub_error(config, what) from error
    repository = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    downloads = os.path.realpath(datasets.config.DOWNLOADED_DATASETS_PATH)
    return rows, allowed(os.path.realpath(repository), config, downloads)


def load_split(name: str, split: str) -> datasets.Dataset:
    """What `datasets.load_dataset` gives, from files of the repository alone."""
    builder = datasets.load_dataset_builder(name)
    check_own_files(name, builder.config.data_files)
    builder.download_and_prepare()
    return cast(datasets.Dataset, builder.as_dataset(split=cast(Any, split)))


def check_cache() -> None:
    """Refuse a cache folder in which `datasets` cannot write its copies.

    Raises:
        ValueError: names the environment variable that sets the folder.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        name = next((name for name in ("HF_DATASETS_CACHE", "HF_HOME") if name in os.environ), "HF_HOME")
        given = os.environ.get(name, str(folder.parent))
        raise ValueError(
            f"{name}={given!r}: {folder} cannot be written ({error.strerror}), and parquet files, data sets of the hub "
            f"and the built-in images are copied there; set {name} to a folder that can be written"
        ) from error
