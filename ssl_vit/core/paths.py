"""Paths in settings, made absolute, and file names as text that can be stored and printed."""

import glob
import os
import re
from pathlib import Path
from typing import Any

_ESCAPED = re.compile(r"\\x[89a-f][0-9a-f]")


def as_path(text: str) -> Path:
    """The path that a setting names: as written if that exists, else with `~` expanded to the home folder."""
    for name in (text, path_from_text(text)):
        if name and os.path.lexists(name):
            return Path(name)
    return Path(os.path.expanduser(text))  # noqa: PTH111  # Path.expanduser raises for an unknown user


def path_to_text(path: str) -> str:
    r"""A path as text for Arrow, YAML and a terminal: bytes that are not UTF-8 become `\xNN`."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "/".join(map(_escape, path.split("/")))
    return path


def path_from_text(text: str) -> str:
    """The inverse of `path_to_text`."""
    if "\\x" not in text or os.path.lexists(text):
        return text
    return "/".join(_unescape(part) if _ESCAPED.search(part) else part for part in text.split("/"))


def _escape(part: str) -> str:
    raw = os.fsencode(part)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.replace(b"\\", rb"\x5c").decode(errors="backslashreplace")


def _unescape(part: str) -> str:
    raw = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), os.fsencode(part))
    return os.fsdecode(raw)


PATHS = (
    ("data", "source"),
    ("data", "cache_dir"),
    ("encoder", "pretrained"),
    ("objective", "teacher"),
    ("evaluation", "source"),
    ("evaluation", "test_source"),
)
"""Settings, as section.name, whose value may be a path; some objectives have no teacher."""


def absolute(value: Any) -> Any:
    """Make the path in a setting's value absolute; in a mixture, the path of each source.

    Values that name no file, folder or pattern below a folder stay: hub ids, timm's names, `openmoji`.
    """
    if isinstance(value, dict):
        return {absolute(name): weight for name, weight in value.items()}
    if not isinstance(value, str) or not value or value == "openmoji":
        return value
    path = as_path(value)
    if path.exists():
        return os.path.abspath(path)  # noqa: PTH100  (resolves no links: the user knows their names)
    if glob.has_magic(value) and "://" not in value:
        begins = next(folder for folder in path.parents if not glob.has_magic(str(folder)))
        return os.path.abspath(path) if begins.exists() else value  # noqa: PTH100
    return value


def is_same(before: Any, after: Any) -> bool:
    """Whether two values of such a setting mean the same place, however they are written.

    A path that no longer exists counts as moved if the other has the same name.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = zip(before.items(), after.items(), strict=False)
        return len(before) == len(after) and all(
            is_same(old, new) and old_weight == new_weight for (old, old_weight), (new, new_weight) in pairs
        )
    before, after = absolute(before), absolute(after)
    if not (isinstance(before, str) and isinstance(after, str)):
        return before == after
    if not (os.path.isabs(before) and os.path.isabs(after)):  # noqa: PTH117
        return before == after
    if os.path.realpath(before) == os.path.realpath(after):
        return True
    is_gone = not glob.has_magic(before) and not Path(before).exists()
    return is_gone and Path(before).name == Path(after).name
