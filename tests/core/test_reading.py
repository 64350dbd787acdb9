import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file

from ssl_vit.core.reading import (
    MAX_HEADER,
    read_json,
    read_metrics,
    read_records,
    read_tensors,
    read_yaml,
    settings_of,
)
from ssl_vit.export import load_backbone
from ssl_vit.models.weights.papers import read_reference
from ssl_vit.models.weights.pretrained import open_pretrained
from ssl_vit.runs.checkpoint import find_damage
from tests.hostile import guarded

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
    monkeypatch.setattr("ssl_vit.core.reading.load_file", lambda path: pytest.fail("was opened"))
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
    with pytest.raises(ValueError, match=r"holds more than 16,777,216 bytes"):
        read_json(tmp_path / "config.json")


JSON = {
    "deep": ('{"a": ' + "[" * 40 + "]" * 40 + "}", "is nested more than 32 deep"),
    "many": ("[" + "{}," * 100_001 + "0]", "more than 100,000 lists and objects"),
    "NaN": ('{"a": {"b": [1, NaN]}}', r"a.b.1 is nan; give a finite number"),
    "Infinity": ('{"a": -Infinity}', "a is -inf"),
    "overflow": ('{"a": 1e999}', "a is inf"),
    "large integer": ('{"a": 18446744073709551616}', "a is an integer of more than 64 bits"),
    "millions of digits": ('{"a": ' + "9" * 2_000_000 + "}", "is no valid JSON"),
    "half": ('{"a": 1', "is no valid JSON"),
    "surrogates and NUL": ("\x00", "is no valid JSON"),
}
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "anchors that multiply": (LAUGHS, "more than 100,000 values"),
    "merges that multiply": (LAUGHS.replace("[", "{<<: [").replace("]", "]}"), "is no valid YAML"),
    "an alias of itself": ("a: &a [*a]", "refers to no anchor that ends before it"),
    "deep": ("a: " + "[" * 40 + "]" * 40, "more than 32 deep"),
    "deep, by indentation": ("".join(" " * n + "a:\n" for n in range(40)), "more than 32 deep"),
    "code": ("a: !!python/object/apply:os.system [touch /tmp/x]", "the tag .* is not allowed"),
    "binary": ("a: !!binary aGk=", "the tag .* is not allowed"),
    "a tag that means nothing": ("a: ! b", "the tag ! is not allowed"),
    "a date": ("a: 2001-01-01", "a is a date; put it into quotes"),
    "no date": ("a: 2001-13-45", "is no valid YAML"),
    "nan": ("a: {b: .nan}", "a.b is nan"),
    "a number as a key": ("a: {1: x}", "a has the key 1, which is not text"),
    "a list as a key": ("? [1]\n: x", "is no valid YAML"),
    "digits": ("a: " + "7" * 100_000, "is no valid YAML"),
    "sixties": ("a: 1" + ":59" * 1000, "a is an integer of more than 64 bits"),
    "two documents": ("a: 1\n---\nb: 2", "is no valid YAML"),
    "nothing": ("", "must hold `key: value` lines, holds NoneType"),
    "too long": ("a: " + "x" * 300_000, "holds more than 262,144 bytes"),
}


@pytest.mark.parametrize(
    ("read", "content", "problem"),
    [(read_json, *JSON[name]) for name in JSON] + [(read_yaml, *YAML[name]) for name in YAML],
    ids=[*JSON, *YAML],
)
def test_what_no_run_writes_is_refused_in_one_line_and_at_once(
    tmp_path: Path, read: Callable[[Path], object], content: str, problem: str
) -> None:
    (tmp_path / "file").write_text(content)
    start = time.process_time()
    with pytest.raises(ValueError, match=problem) as refused:
        read(tmp_path / "file")
    assert time.process_time() - start < 5
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_anchors_within_bounds_are_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]")
    assert read_yaml(tmp_path / "file") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}] * 2}


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "/proc/self/environ", "/", "a FIFO", "a socket"])
@pytest.mark.parametrize(
    "read", [read_json, read_yaml, read_tensors, read_records, read_reference, lambda file: open_pretrained(str(file))]
)
def test_no_file_that_is_not_regular_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, read: Callable[[Path], object]
) -> None:
    file = Path(place)
    if place == "a FIFO":
        os.mkfifo(file := tmp_path / "fifo")
    elif place == "a socket":
        monkeypatch.chdir(tmp_path)  # the path of a socket is short
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind("socket")
        file = tmp_path / "socket"
    with guarded(tmp_path / "outside"):
        try:
            assert not read(file)  # /proc has regular files, which are no logs
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_a_log_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    os.truncate(tmp_path / "log", 2**36)  # zeros that take no space
    with pytest.raises(ValueError, match="line 1 or the file is too long"):
        read_records(tmp_path / "log")


def test_a_log_is_its_whole_lines(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": null, "x": "text"}', "null", '{"step": "2"}', '{"step": true}', '{"step": -1}']
    (tmp_path / "log").write_text(
        "\n".join([*lines, '{"step": 3, "loss": NaN}', '{"step": 4, "progress": null}', '{"st'])
    )
    assert read_metrics(tmp_path / "log") == [{"step": 1, "loss": None}, {"step": 4}]
    assert read_metrics(tmp_path / "none") == []


@dataclass(frozen=True)
class Settings:
    number: int = 1
    share: float | None = None
    size: int | tuple[int, int] = 3
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    weights: str | dict[str, float] = ""
    on: bool = False


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"number": 1.5}, "number=1.5: expected int"),
        ({"number": True}, "number=True: expected int"),
        ({"share": "x"}, "share='x': expected float or null"),
        ({"size": [1, 2, 3]}, r"size=\[1, 2, 3\]: expected int or tuple"),
        ({"kind": "c"}, "kind='c': expected"),
        ({"names": "abc"}, "names='abc': expected"),
        ({"names": [1]}, r"names=\[1\]: expected"),
        ({"weights": {"a": "b"}}, "weights=.*: expected str or dict"),
        ({"on": 1}, "on=1: expected bool"),
        ({"other": 1}, "other: no such setting"),
    ],
)
def test_settings_of_another_type_are_named(values: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        settings_of(Settings, values)


def test_settings_are_what_was_written() -> None:
    values = {"number": 2, "share": 1, "size": [4, 5], "kind": "b", "names": ["x"], "weights": {"a": 1.0}, "on": True}
    assert settings_of(Settings, values) == Settings(2, 1, (4, 5), "b", ("x",), {"a": 1.0}, True)
