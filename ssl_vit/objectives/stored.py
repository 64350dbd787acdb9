"""Facts about the objective that checkpoints and exports store."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ssl_vit.core.reading import entry
from ssl_vit.objectives.objective import Leaves, Pooled

_USUAL = {"pooled": "cls", "leaves": "backbone", "reconstructs": False}
# Objectives of early versions, which stored only the name.
_BEFORE: dict[str, dict[str, Any]] = {
    "MAE": {"pooled": "mean", "reconstructs": True},
    "FineTune": {"leaves": "classifier"},
    "AttentiveProbe": {"leaves": "nothing"},
}


def with_traits(known: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Complete a file's facts with `pooled`, `leaves` and `reconstructs` of the objective that it names.

    Raises:
        ValueError: one of these has an impossible value.
    """
    found = {**_USUAL, **_BEFORE.get(str(known.get("objective")), {}), **known}
    for name, kind in {"pooled": Pooled, "leaves": Leaves, "reconstructs": bool}.items():
        entry(found, name, kind, file)
    return found


def config_class(name: str) -> type[Any] | None:
    """The settings class of the objective `name`, from the module of that name; None if there is none."""
    if not name.isidentifier():
        return None
    try:
        return getattr(import_module(f"ssl_vit.objectives.{name.lower()}"), f"{name}Config")
    except (ImportError, AttributeError):
        return None
