"""What the package brings beside its modules: the fronts in scripts/ and the settings in configs/."""

import importlib.util
from pathlib import Path
from types import ModuleType

from ssl_vit.core.front import nearest

PACKAGE = Path(__file__).parents[1]


def folder(name: str) -> Path:
    """The folder `scripts` or `configs`: inside an installed package, beside the package in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def find_config(name: str) -> Path:
    """The file of settings that `name` means: a path, or a name from configs/ without its ending.

    Raises:
        ValueError: there is no such file; names the nearest.
    """
    path, known = Path(name), folder("configs") / f"{name}.yaml"
    if path.suffix or path.name != name or path.exists():
        return path
    if known.exists():
        return known
    names = [file.stem for file in folder("configs").glob("*.yaml")]
    raise ValueError(f"--config={name}: no such file, and no config of this name{nearest(name, names)}")


def load_front(name: str) -> ModuleType:
    """The module of a front in scripts/, which holds its `DEFAULTS`; it is not run."""
    spec = importlib.util.spec_from_file_location(f"ssl_vit_front_{name}", folder("scripts") / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
