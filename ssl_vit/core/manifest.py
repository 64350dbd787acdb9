"""Sizes and SHA-256 of a folder's files: written with them, compared later."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssl_vit.core.reading import check_header, open_regular, read_json

MANIFEST_FILE = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write the size and SHA-256 of each file in a folder to its manifest."""
    files = {path.name: {"size": path.stat().st_size, "sha256": hash_file(path)} for path in sorted(folder.iterdir())}
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": files}, indent=1) + "\n")


def find_difference(folder: Path, *, contents: bool) -> str | None:
    """Describe the first file that differs from the folder's manifest; None if none does.

    Args:
        contents: whether to compare hashes, for which all files are read; sizes are always compared.
    """
    try:
        files: dict[str, dict[str, Any]] = read_json(folder / MANIFEST_FILE)["files"]
        expected = {name: (noted["size"], noted["sha256"]) for name, noted in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} cannot be read: {error!r}"
    for name in expected:
        # A stranger's manifest must not make us read files outside of its folder.
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            return f"{MANIFEST_FILE} names {name!r}, which is no file of this folder"
    try:
        for name, (size, _) in expected.items():
            descriptor = open_regular(folder / name)
            found = os.fstat(descriptor).st_size
            os.close(descriptor)
            if found != size:
                return f"{name} has {found:,} bytes, and {size:,} were written"
        for name, (_, sha256) in expected.items():
            if contents and hash_file(folder / name) != sha256:
                return f"{name} has another content than was written (its SHA-256 differs)"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read: {error.strerror}"
    return None


def hash_of(content: Any) -> str:
    """A short name for plain content: the first half of the SHA-256 of its JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def hash_file(path: Path, *, links: bool = False) -> str:
    """SHA-256 of a regular file."""
    digest = hashlib.sha256()
    with os.fdopen(open_regular(path, links=links), "rb", buffering=0) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def save_sealed(tensors: dict[str, Tensor], file: Path, key: str) -> None:
    """Write a safetensors file with a SHA-256 of its tensors and of `key`, which says what they are.

    The seal reveals damaged and mixed-up files. It does not prevent forgery.
    """
    tensors = {name: values.contiguous() for name, values in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt", "key": key, "sha256": hash_tensors(tensors, key)})


def read_sealed(file: Path, key: str) -> dict[str, Tensor] | None:
    """Read what `save_sealed` wrote; None if the file is missing, damaged, unsealed or has another key."""
    try:
        check_header(file)
        with safe_open(file, framework="pt") as opened:
            noted = (opened.metadata() or {}).get("sha256")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return None
    return tensors if noted == hash_tensors(tensors, key) else None


def hash_tensors(tensors: dict[str, Tensor], key: str = "") -> str:
    """SHA-256 of tensors on the CPU, with their names, types and shapes, and of `key`."""
    digest = hashlib.sha256(key.encode())
    for name, values in sorted(tensors.items()):
        digest.update(f"\0{name} {values.dtype} {tuple(values.shape)}\0".encode())
        digest.update(values.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
