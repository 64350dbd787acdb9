"""What the files of a folder were when they were written, and whether they still are."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ssl_vit.reading import read_json

MANIFEST_FILE = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Note size and SHA-256 of each file in a folder."""
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": files}, indent=1) + "\n")


def find_difference(folder: Path, *, contents: bool) -> str | None:
    """The first file that is not what the folder's manifest says, and how; None where all are.

    Args:
        contents: whether to compare hashes, for which all files are read; sizes are always compared.
    """
    try:
        files: dict[str, dict[str, Any]] = read_json(folder / MANIFEST_FILE)["files"]
        expected = {name: (noted["size"], noted["sha256"]) for name, noted in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} cannot be read: {error!r}"
    for name in expected:
        # A manifest that came with somebody's files must not make us read others.
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            return f"{MANIFEST_FILE} names {name!r}, which is no file of this folder"
    try:
        for name, (size, _) in expected.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes, and {size:,} were written"
        for name, (_, sha256) in expected.items():
            if contents and _sha256(folder / name) != sha256:
                return f"{name} has another content than was written (its SHA-256 differs)"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read: {error.strerror}"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
