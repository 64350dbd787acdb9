"""Reads untrusted files: only regular ones, within size bounds, and only as data."""

import errno
import json
import math
import os
import stat
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

MAX_HEADER = 16 * 2**20
"""Bytes of a safetensors header. A ViT-g with its optimizer's moments needs about 0.4 MB."""
MAX_JSON = 16 * 2**20
"""Bytes of a file that describes weights, a checkpoint or scores."""
MAX_YAML = 256 * 2**10
"""Bytes of a settings file; a run's takes about 3 kB."""
MAX_NODES, MAX_DEPTH = 100_000, 32
"""Lists and objects of a file, with YAML aliases expanded, and their nesting depth."""
MAX_LINE, MAX_LINES, MAX_LOG = 2**20, 10_000_000, 2**30
"""Limits of a log: bytes of a line, number of lines, bytes of the file."""
MAX_FIGURE = 64 * 2**20
"""Bytes of a figure that a run drew."""

_Settings = TypeVar("_Settings")


def open_regular(path: Path, flags: int = os.O_RDONLY, *, links: bool = False) -> int:
    """Open a regular file; returns its descriptor.

    A link could lead out of a stranger's folder; opening a FIFO could block, and a device may have no end.

    Args:
        links: follow links. The files of the hub's cache are links.

    Raises:
        OSError: it is not a regular file, or cannot be opened.
    """
    problem = None
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW), 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            problem = "is a link, which is not followed here"
        elif error.errno in (errno.ENXIO, errno.EISDIR, errno.EOPNOTSUPP):
            problem = "is no regular file"
        if problem is None:
            raise
        raise OSError(error.errno, problem, str(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return descriptor


def read_bytes(file: Path, most: int, *, links: bool = False) -> bytes:
    """The content of a regular file of at most `most` bytes, whatever size the file system reports.

    Raises:
        ValueError: the file has more than `most` bytes.
        OSError: it cannot be read; see `open_regular`.
    """
    with os.fdopen(open_regular(file, links=links), "rb", buffering=0) as opened:
        # Read in parts: a read of `most` bytes would allocate them all, even for a short file.
        parts, room, size = [], most + 1, os.fstat(opened.fileno()).st_size
        while room and (part := opened.read(min(room, max(size, 2**16)))):
            parts.append(part)
            room -= len(part)
    if not room:
        raise ValueError(f"{file}: holds more than {most:,} bytes, the most that is read")
    return b"".join(parts)


def check_header(file: Path, *, links: bool = False) -> None:
    """Refuse a safetensors file with too long a header, before anything is parsed.

    safetensors accepts headers of up to 100 MB, and its parser needs many times that memory.

    Raises:
        ValueError: the header is longer than the file or than `MAX_HEADER`.
        OSError: the file cannot be read; see `open_regular`.
    """
    with os.fdopen(open_regular(file, links=links), "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        size = os.fstat(opened.fileno()).st_size
    if 8 + length > size:
        raise ValueError(f"{file}: is no whole safetensors file: {size:,} bytes, with a header of {length:,}")
    if length > MAX_HEADER:
        raise ValueError(f"{file}: has a header of {length:,} bytes, and {MAX_HEADER:,} are the most that is read")


def read_tensors(file: Path, *, links: bool = False) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ValueError: it is missing, damaged or not a regular file, or its header is too long.
    """
    try:
        check_header(file, links=links)
        return load_file(file)
    except (SafetensorError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{file}: is no whole safetensors file: {reason}") from error


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn the OSError of a file that cannot be read into a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error


def read_json(file: Path, *, links: bool = False) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it holds no JSON object, or one outside the bounds of `parse_json`.
        OSError: it cannot be read; see `open_regular`.
    """
    content = parse_json(read_bytes(file, MAX_JSON, links=links), file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds no JSON object")
    return content


def parse_json(text: bytes | str, where: str | Path) -> Any:
    """Parse JSON whose numbers are finite and fit 64 bits, with bounds on the number and depth of lists and objects.

    Raises:
        ValueError: it is not such JSON; names `where` and, if known, the key.
    """
    opening = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if sum(text.count(sign) for sign in opening) > MAX_NODES:  # pyright: ignore[reportArgumentType]
        raise ValueError(f"{where}: holds more than {MAX_NODES:,} lists and objects, the most that is read")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is no valid JSON: {error}") from error
    _check_values(content, where)
    return content


def read_yaml(file: Path, *, links: bool = False) -> dict[str, Any]:
    """The mapping of plain values in a YAML file: tags are refused, aliases count as often as they are used.

    Raises:
        ValueError: it holds no mapping, or is outside the bounds.
        OSError: it cannot be read; see `open_regular`.
    """
    text = read_bytes(file, MAX_YAML, links=links)
    try:
        _check_nodes(text)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise ValueError(f"{file}: is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold `key: value` lines, holds {type(content).__name__}")
    _check_values(content, file)
    return content


def _check_nodes(text: bytes) -> None:
    """Refuse YAML that grows: aliases of aliases of aliases can expand to any number of values."""
    count, sizes = 0, {}
    opened: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"*{event.anchor} refers to no anchor that ends before it")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.NodeEvent):
            if getattr(event, "tag", None) is not None:
                raise ValueError(f"the tag {event.tag} is not allowed")  # pyright: ignore[reportAttributeAccessIssue]
            count += 1
            if isinstance(event, yaml.CollectionStartEvent):
                opened.append((event.anchor, count - 1))
            else:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            sizes[anchor] = count - before
        if count > MAX_NODES or len(opened) > MAX_DEPTH:
            raise ValueError(f"holds more than {MAX_NODES:,} values, or is nested more than {MAX_DEPTH} deep")


def _check_values(content: Any, where: str | Path) -> None:
    waiting = [("", content, 0)]
    while waiting:
        key, value, depth = waiting.pop()
        problem = None
        if isinstance(value, dict | list):
            problem = f"is nested more than {MAX_DEPTH} deep" if depth > MAX_DEPTH else None
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            if isinstance(value, dict) and not all(isinstance(name, str) for name in value):
                name = next(name for name in value if not isinstance(name, str))
                problem = f"has the key {str(name)[:80]}, which is not text; put it into quotes"
            if problem is None:
                waiting += [(f"{key}.{name}" if key else str(name), entry, depth + 1) for name, entry in entries]
        elif isinstance(value, float):
            problem = None if math.isfinite(value) else f"is {value}; give a finite number"
        elif isinstance(value, int):
            problem = None if -(2**63) <= value < 2**63 else "is an integer of more than 64 bits"
        elif value is not None and not isinstance(value, str):
            problem = f"is a {type(value).__name__}; put it into quotes"
        if problem is not None:
            raise ValueError(f"{where}: {f'{key[:80]} ' if key else ''}{problem}")


def read_lines(file: Path) -> Iterator[bytes]:
    """The lines of a log, each with its line end; none if there is no file.

    Raises:
        ValueError: a line or the file is longer than any that a run writes.
        OSError: it cannot be read; see `open_regular`.
    """
    try:
        descriptor = open_regular(file)
    except FileNotFoundError:
        return
    size = 0
    with os.fdopen(descriptor, "rb") as opened:
        for number in range(MAX_LINES + 1):
            line = opened.readline(MAX_LINE + 1)
            size += len(line)
            if len(line) > MAX_LINE or size > MAX_LOG or number == MAX_LINES:
                raise ValueError(f"{file}: line {number + 1} or the file is too long for a log")
            if not line:
                return
            yield line


def read_records(file: Path) -> list[dict[str, Any]]:
    """The JSON objects with a step in a log, one per line; a line that a kill cut short is left out.

    Raises:
        ValueError, OSError: see `read_lines`.
    """
    found = []
    for line in read_lines(file):
        try:
            record = parse_json(line, file)
        except ValueError:
            continue
        step = record.get("step") if isinstance(record, dict) else None
        if isinstance(step, int) and not isinstance(step, bool) and step >= 0:
            found.append(record)
    return found


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """`read_records` of a metrics.jsonl, whose values are numbers; None stands for NaN and infinity."""

    def is_measured(name: str, value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number or (value is None and name != "progress")

    records = read_records(file)
    return [{name: value for name, value in record.items() if is_measured(name, value)} for record in records]


def entry(content: Mapping[str, Any], key: str, kind: Any, file: Path) -> Any:
    """The value under a dotted key.

    Raises:
        ValueError: the key is missing or its value has another type; names file and key.
    """
    value: Any = content
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if not _fits(value, kind):
        raise ValueError(f"{file}: {key}={_shown(value)}: expected {_name(kind)}")
    return value


def settings_of(kind: type[_Settings], values: Mapping[str, Any]) -> _Settings:
    """Build a settings dataclass from plain YAML or JSON values, with lists for tuples.

    Raises:
        ValueError: the dataclass lacks a setting, or a value has another type.
    """
    types_of = get_type_hints(kind)
    for name, value in values.items():
        if name not in types_of:
            raise ValueError(f"{name}: no such setting; was it written by a newer ssl_vit?")
        if not _fits(value, types_of[name]):
            raise ValueError(f"{name}={_shown(value)}: expected {_name(types_of[name])}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            return False
        wanted = [inner[0]] * len(value) if origin is list or inner[-1] is ... else inner
        return len(wanted) == len(value) and all(map(_fits, value, wanted))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, inner[1]) for one in value.values())
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return kind is Any or isinstance(value, kind)


def _name(kind: Any) -> str:
    words = " or ".join(map(_name, get_args(kind))) if get_origin(kind) in (Union, types.UnionType) else str(kind)
    return {"NoneType": "null"}.get(name := getattr(kind, "__name__", words), words if get_origin(kind) else name)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
