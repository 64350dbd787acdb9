"""Bytes of strangers: whatever a file holds, it is read within its bounds or refused in one line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from ssl_vit.core.reading import read_json, read_records, read_tensors, read_yaml
from ssl_vit.models.config import EncoderConfig

fuzzed = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
PIECES = st.sampled_from(
    [
        *'{}[],:"&*!|>-?#%@`~y',
        *(
            "&a ",
            "*a",
            "<<: ",
            "!!python/object/apply:os.system",
            "!!timestamp x",
            "!!int ''",
            "---",
            "a: ",
            "\n",
            "  ",
        ),
        *("1:99", "0x", "2001-13-45", ".nan", "1e999", "NaN", "\\u", "\x00", "\ud800"),
    ]
)
BYTES = st.binary(max_size=200) | st.lists(PIECES, max_size=40).map(
    lambda pieces: "".join(pieces).encode(errors="surrogatepass")
)


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(entry) for key, entry in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | bool) or (isinstance(value, int) and abs(value) <= 2**63)


def check(read: Any, file: Path) -> None:
    try:
        assert is_plain(read(file))
    except ValueError as error:
        assert str(error).startswith(str(file))  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


@fuzzed
@given(content=BYTES)
@pytest.mark.parametrize("read", [read_json, read_yaml, read_records])
def test_any_bytes_are_plain_values_or_refused(tmp_path: Path, read: Any, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    check(read, tmp_path / "file")


@fuzzed
@given(value=VALUES)
def test_any_values_are_plain_or_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "file").write_text(json.dumps({"a": value}))
    check(read_json, tmp_path / "file")
    (tmp_path / "file").write_text(yaml.safe_dump({"a": value}))
    check(read_yaml, tmp_path / "file")


@fuzzed
@given(values=st.dictionaries(st.sampled_from([*EncoderConfig.__dataclass_fields__, "other"]), VALUES, max_size=4))
def test_any_settings_of_an_encoder_are_a_config_or_refused(values: dict[str, Any]) -> None:
    try:
        EncoderConfig.from_plain(values)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017


@fuzzed
@given(
    header=VALUES.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BOOL", "I64", "F8_E4M3", "X"]) | SCALARS,
            "shape": st.lists(st.integers(-1, 2**63), max_size=4) | SCALARS,
            "data_offsets": st.lists(st.integers(-1, 2**40), max_size=3),
        }
    ).map(lambda entry: json.dumps({"a": entry}).encode()),
    length=st.none() | st.integers(0, 2**64 - 1),
    rest=st.binary(max_size=32),
)
def test_any_header_of_weights_is_read_or_refused(
    tmp_path: Path, header: bytes, length: int | None, rest: bytes
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + rest)
    try:
        found = read_tensors(file)
        assert sum(value.numel() * value.element_size() for value in found.values()) <= len(rest)
    except ValueError as error:
        assert str(error).startswith(str(file))  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


@fuzzed
@given(place=st.integers(0, 400), bit=st.integers(0, 7))
def test_a_flipped_bit_of_weights_gives_tensors_or_one_line(tmp_path: Path, place: int, bit: int) -> None:
    content = bytearray(save({"a": torch.ones(3, 4), "b": torch.zeros(5)}))
    content[place % len(content)] ^= 1 << bit
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    try:
        read_tensors(file)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
