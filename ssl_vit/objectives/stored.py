"""What checkpoints and exports say of their objective."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ssl_vit.core.reading import entry
from ssl_vit.objectives.objective import Leaves, Pooled

_USUAL = {"pooled": "cls", "leaves": "backbone", "reconstructs": False}
# Objectives of versions that stored no more than a name.
_BEFORE: dict[str, dict[str, Any]] = {
    "MAE": {"pooled": "mean", "reconstructs": True},
    "FineTune": {"leaves": "classifier"},
    "AttentiveProbe": {"leaves": "nothing"},
}


def with_traits(known: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The facts in a file, completed by `pooled`, `leaves` and `reconstructs` of the objective that it names.

    Raises:
        ValueError: a value that these cannot have.
    """
    found = {**_USUAL, **_BEFORE.get(str(known.get("objective")), {}), **known}
    for name, kind in {"pooled": Pooled, "leaves": Leaves, "reconstructs": bool}.items():
        entry(found, name, kind, file)
    return found


def config_class(name: str) -> type[Any] | None:
    """The settings of the objective called `name`, from the module of that name; None where there is none."""
    if not name.isidentifier():
        return None
    try:
        return getattr(import_module(f"ssl_vit.objectives.{name.lower()}"), f"{name}Config")
    except (ImportError, AttributeError):
        return None
