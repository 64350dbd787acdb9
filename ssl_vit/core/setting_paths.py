"""Paths among a run's settings: written absolute, so that they mean the same from whatever folder."""

import glob
import os
from pathlib import Path
from typing import Any

from ssl_vit.core.paths import as_path

PATHS = (
    ("data", "source"),
    ("data", "cache_dir"),
    ("encoder", "pretrained"),
    ("evaluation", "source"),
    ("evaluation", "test_source"),
)
"""Section and name of the settings that may hold one."""


def absolute(value: Any) -> Any:
    """A setting's value with its path absolute; of a mixture, those of its sources.

    What names no file, folder or pattern below a folder stays as it is: ids of the hub, timm's names, `openmoji`.
    """
    if isinstance(value, dict):
        return {absolute(name): weight for name, weight in value.items()}
    if not isinstance(value, str) or not value or value == "openmoji":
        return value
    path = as_path(value)
    if path.exists():
        return os.path.abspath(path)  # noqa: PTH100  (not through links, whose names the user knows)
    if glob.has_magic(value) and "://" not in value:
        begins = next(folder for folder in path.parents if not glob.has_magic(str(folder)))
        return os.path.abspath(path) if begins.exists() else value  # noqa: PTH100
    return value


def is_same(before: Any, after: Any) -> bool:
    """Whether two values of such a setting mean the same place, however they are written.

    What is no longer where it was counts as moved to a place of the same name.
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
