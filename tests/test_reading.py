import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ssl_vit.checkpoint import find_damage
from ssl_vit.export import load_backbone
from ssl_vit.export.interop import read_reference
from ssl_vit.export.pretrained import open_pretrained
from ssl_vit.reading import MAX_HEADER, read_json, read_tensors

GIANT = {
    "longer than the file": ((2**62).to_bytes(8, "little") + b"{}", "with a header of 4,611,686,018,427,387,904"),
    "longer than any model's": (None, "has a header of .* are the most that is read"),
    "no header": (b"\x00", "with a header of"),
    "nothing": (b"", "is no whole safetensors file"),
}


def write(path: Path, content: bytes | None) -> None:
    """None: a valid file of 20 MB that is nothing but names, sparse on the disk."""
    if content is not None:
        path.write_bytes(content)
        return
    path.write_bytes((MAX_HEADER + 8).to_bytes(8, "little") + b"{}")
    os.truncate(path, MAX_HEADER + 16)


@pytest.mark.parametrize("kind", GIANT)
@pytest.mark.parametrize("reader", [read_tensors, read_reference, lambda path: open_pretrained(str(path)).tensors()])
def test_a_giant_header_is_refused_wherever_weights_are_read(tmp_path: Path, kind: str, reader) -> None:
    content, problem = GIANT[kind]
    write(tmp_path / "x.safetensors", content)
    with pytest.raises(ValueError, match=problem) as refused:
        reader(tmp_path / "x.safetensors")
    assert "\n" not in str(refused.value)


def test_a_giant_header_in_a_folder_is_refused(tmp_path: Path) -> None:
    described = {"encoder": {"arch": "vit_tiny_patch16_224", "depth": 1}}
    (tmp_path / "config.json").write_text(json.dumps({"ssl_vit": described}))
    write(tmp_path / "backbone.safetensors", None)
    with pytest.raises(ValueError, match="are the most that is read"):
        load_backbone(tmp_path)
    for name in ("model", "optimizer"):
        write(tmp_path / f"{name}.safetensors", None)
    assert "are the most that is read" in (find_damage(tmp_path) or "")


def test_headers_are_refused_before_safetensors_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.safetensors", None)
    monkeypatch.setattr("ssl_vit.reading.load_file", lambda path: pytest.fail("was opened"))
    with pytest.raises(ValueError, match="are the most"):
        read_tensors(tmp_path / "x.safetensors")


def test_whole_tensors_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "x.safetensors")
    assert read_tensors(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "problem"),
    [("{", "is no valid JSON"), ("[" * 100_000, "is no valid JSON"), ("[]", "no JSON object"), ("\xff", "no valid")],
)
def test_json_that_is_none_is_refused_in_one_line(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=problem) as refused:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(refused.value)


def test_giant_json_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", 2**40)
    with pytest.raises(ValueError, match=r"has 1,099,511,627,776 bytes, and 16,777,216 are the most"):
        read_json(tmp_path / "config.json")
