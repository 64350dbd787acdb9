"""Checks flags and YAML files of settings before they are parsed; turns parser errors into one line."""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssl_vit.core.front import nearest, spell_out
from ssl_vit.core.paths import path_to_text
from ssl_vit.core.reading import read_yaml
from ssl_vit.core.shipped import find_config

HELP_FLAGS = ("help", "help-all")


def read_words(args: Sequence[str], keys: Mapping[str, Any], others: Collection[str] = HELP_FLAGS) -> list[str]:
    """Spell out switches in a command line (see `spell_out`) and refuse unknown flags.

    Args:
        keys: settings and their defaults; a setting whose default is True or False is a switch, and one whose default
            is a mapping also takes its entries as flags of their own, `--NAME.ENTRY`.
        others: further known flags.

    Raises:
        ValueError: a flag does not exist; names the nearest one.
    """
    words = spell_out(args, {name for name, default in keys.items() if isinstance(default, bool)})
    known = {*keys, *others, *(key.split(".")[0] for key in keys if "." in key)}
    mappings = {name for name, default in keys.items() if isinstance(default, dict)}
    for word in words:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and name not in known and name.rpartition(".")[0] not in mappings:
            raise ValueError(f"--{name}: no such flag{nearest(name, keys, '--')}")
    return words


def split_config_files(args: Sequence[str], keys: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Separate `--config` files from other flags; see `read_words`."""
    files: list[str] = []
    flags: list[str] = []
    words = iter(read_words(args, keys, (*HELP_FLAGS, "print_config", "config")))
    for word in words:
        if word.partition("=")[0] != "--config":
            flags.append(word)
            continue
        path = word.partition("=")[2] if "=" in word else next(words, None)
        if path is None:
            raise ValueError("--config: needs the path of a YAML file, or the name of one in configs/")
        files.append(str(find_config(path)))
    return files, flags


def check_file(path: str, keys: dict[str, Any]) -> None:
    """Refuse a file that cannot be read, is no YAML mapping or has unknown keys."""
    try:
        values = read_yaml(Path(path), links=True)
    except OSError as error:
        raise ValueError(f"--config={path}: cannot be read: {error.strerror}") from error
    for name in ("fresh", "extend"):
        if values.get(name):
            raise ValueError(f"{path}: {name}={values[name]!r}: changes an existing run; give it as a flag, --{name}")
    sections = {key.rsplit(".", 1)[0] for key in keys if "." in key}
    for name, value in values.items():
        if name in sections:
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {name}={value!r}: must hold the settings of that section")
            for key in value:
                if f"{name}.{key}" not in keys:
                    raise ValueError(f"{path}: {name}.{key}: no such setting{nearest(f'{name}.{key}', keys)}")
        elif name not in keys:
            raise ValueError(f"{path}: {name}: no such setting{nearest(str(name), keys)}")


def in_one_line(message: str, keys: dict[str, Any]) -> str:
    """Turn jsonargparse's message about a wrong type into one line: key, value and expected type."""
    key = re.search(r'[Kk]ey "([\w.]+)"', message)
    value = re.search(r"(?:Got value|Given value): (.*)", message)
    if key and value:
        expected = re.findall(r"Expected an? (.*?)(?:\.? Got value.*)?$", message, flags=re.MULTILINE)
        words = [re.sub(r"<class '(\w+)'>", r"\1", kind).replace("typing.", "").rstrip(".") for kind in expected]
        said = {"NoneType": "null", "dict": "a mapping, with a space after each colon: '{name: value}'"}
        words = [said.get(word, word) for word in words]
        given = value.group(1).strip()
        return f"{key.group(1)}={given}: expected {' or '.join(dict.fromkeys(words)) or 'another type'}"
    return " ".join(message.split())


def check_ranges(settings: object, **allowed: str) -> None:
    """Refuse numbers of a settings object outside their range.

    None and "auto" pass. In tuples, lists and dicts each number is checked. A number within 1e-6 of a bound of [0, 1],
    as rounding leaves it, is moved to that bound.

    Args:
        allowed: range of each setting: "[0, 1]", "(0, 1]", "[1, inf)"; a unit may follow, "(0, 240] minutes", and
            after "; " further advice, "[1, inf); null sets no number".

    Raises:
        ValueError: the first number outside, in the form `name=value: must ...`.
    """
    for name, text in allowed.items():
        given, _, advice = text.partition("; ")
        bounds, _, unit = given.replace(", ", ",").partition(" ")
        low, high = (float(bound) for bound in bounds[1:-1].split(","))
        value = getattr(settings, name)
        if high == 1:
            value = _moved(value)
            object.__setattr__(settings, name, value)
        for number in _numbers(value):
            above = number > low or (bounds[0] == "[" and number == low)
            below = number < high or (bounds[-1] == "]" and number == high)
            if not (above and below):
                least = f"{'at least' if bounds[0] == '[' else 'above'} {low:g}"
                must = f"be {least}" if high == math.inf else f"lie in {bounds.replace(',', ', ')}"
                raise ValueError(f"{name}={value!r}: must {must}{unit and ' ' + unit}{advice and '; ' + advice}")


def check_given(settings: object, *names: str) -> None:
    """Refuse settings that list nothing or the same value twice.

    Raises:
        ValueError: in the form `name=value: ...`.
    """
    for name in names:
        values = getattr(settings, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}={values!r}: give at least one value, and none twice")


def check_interval(settings: object, *names: str) -> None:
    """Refuse a setting that is not a pair (smallest, largest) within (0, 1]; rounding errors are corrected first.

    Raises:
        ValueError: in the form `name=value: needs ...`.
    """
    for name in names:
        low, high = value = _moved(getattr(settings, name))
        object.__setattr__(settings, name, value)
        if not 0 < low <= high <= 1:
            raise ValueError(f"{name}={value!r}: needs 0 < smallest <= largest <= 1")


def _moved(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_moved, value))
    near = isinstance(value, int | float) and -1e-6 <= value <= 1 + 1e-6
    return min(max(value, 0), 1) if near and not 0 <= value <= 1 else value


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, tuple | list):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, dict):
        yield from _numbers(list(value.values()))
    elif isinstance(value, int | float):
        yield value


@contextmanager
def section(name: str) -> Iterator[None]:
    """Prefix the key at the start of a component's ValueError with the section's name, unless it names its own."""
    try:
        yield
    except ValueError as error:
        if re.match(r"\w+\.\w+=", str(error)):
            raise
        raise ValueError(f"{name}.{error}") from error


@contextmanager
def renamed_settings(names: Mapping[str, str]) -> Iterator[None]:
    """Rename settings in a ValueError of shared code to the names that the user gave.

    Args:
        names: from shared code's name to the user's.
    """
    try:
        yield
    except ValueError as error:
        known = "|".join(map(re.escape, names)) or "(?!)"
        pattern = rf"(?<![\w.])({known})(?!\w)"
        raise ValueError(re.sub(pattern, lambda found: names[found[1]], str(error))) from error


def as_flags(text: str, keys: Mapping[str, Any]) -> str:
    """An error of shared code in one line, with the flags of a script without sections: `--source`.

    Args:
        keys: settings of the script.
    """

    def flag(found: re.Match[str]) -> str:
        return f"--{found[1]}" if found[1] in keys else found[0]

    text = re.sub(r"(?:--|(?<![\w./-]))(?:data|evaluation)\.(\w+)", flag, " ".join(text.split()))
    text = re.sub(r"^([\w.]+)(?==)", flag, text)
    return f"{text} (not here: streams are for training)" if "data.streaming" in text else text


def as_plain(config: Any) -> dict[str, Any]:
    """A config as dicts, lists and scalars; file names that are not UTF-8 become text that `as_path` reads."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {plain(key): plain(entry) for key, entry in value.items()}
        if isinstance(value, str):
            return path_to_text(value)
        return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ between two plain configs, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found[f"{prefix}{key}"] = (old, new)
    return found
