"""Paths that settings name, and names of files as text that can be stored and printed."""

import os
import re
from pathlib import Path

_ESCAPED = re.compile(r"\\x[89a-f][0-9a-f]")


def as_path(text: str) -> Path:
    """The path that a setting names: what exists as it is written, else with `~` as the home folder."""
    for name in (text, path_from_text(text)):
        if name and os.path.lexists(name):
            return Path(name)
    return Path(os.path.expanduser(text))  # noqa: PTH111  # Path's own raises for a user that is not there


def path_to_text(path: str) -> str:
    r"""A path as text that Arrow, YAML and a terminal take: in names that are no UTF-8 other bytes become `\xNN`."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "/".join(map(_escape, path.split("/")))
    return path


def path_from_text(text: str) -> str:
    """The path that `path_to_text` made text of."""
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
