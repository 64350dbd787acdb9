"""Removes users' paths, passwords and keys from results that leave a machine."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SECRET_WORD = re.compile(
    "(?:api)?key|token|secrets?|pass(?:w(?:or)?d|phrase)?|pwd|cred(?:ential)?s?|auth(?:orization)?|bearer|cookies?"
    "|sig(?:nature)?|pat|.+(?:token|secret|password|passwd|(?:api|access|secret)key|credentials)",
    re.IGNORECASE,
)
_PAIR = re.compile(r"""(?<![\w.-])([\w.-]+)(["']?\s*(?:=|:(?!/))\s*["']?)([^\s"',;&}]+)""")
_VALUES = (
    (re.compile(r"\b(Bearer|Basic)(\s+)[\w.~+/=-]{6,}", re.IGNORECASE), r"\1\2***"),
    # Keys with a known prefix.
    (re.compile(r"(?<![^\W_])(?:hf_|gh[oprsu]_|github_pat_|glpat-|xox[a-z]-|[rs]k[-_]|npm_|pypi-)[\w.-]{8,}"), "***"),
    (re.compile(r"\b(?:A[KS]IA[0-9A-Z]{12,}|AIza[\w-]{20,}|ya29\.[\w-]{8,}|eyJ[\w-]+\.eyJ[\w.-]+)"), "***"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*", re.DOTALL), "***"),
    # User and password of an address; a password may contain an @ or a slash.
    (re.compile(r"(?<=://)(?:[^\s/@:]*:\S*|[^/\s]+)@"), "***@"),
)  # fmt: skip


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command line in which keys, access tokens and passwords are replaced by ***."""
    shown = []
    hide_next = False
    for word in words:
        flag, equals, _ = word.partition("=")
        is_secret = word.startswith("-") and _names_secret(flag)
        if hide_next and not word.startswith("-"):
            shown.append("***")
        elif is_secret and equals:
            shown.append(f"{flag}=***")
        else:
            for pattern, replacement in _VALUES:
                word = pattern.sub(replacement, word)
            shown.append(_PAIR.sub(_hide, word))
        hide_next = is_secret and not equals
    return shown


def _names_secret(name: str) -> bool:
    """Whether the name of a flag or variable has a word for keys, such as WANDB_API_KEY and --hub.accessToken."""
    words = re.split(r"[^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z])", name)
    return any(_SECRET_WORD.fullmatch(word) for word in words)


def _hide(pair: re.Match[str]) -> str:
    name, sign, value = pair.groups()
    return name + sign + ("***" if _names_secret(name) else _PAIR.sub(_hide, value))


def public(value: Any) -> Any:
    """A settings value fit for publication: local paths keep their last part, addresses lose passwords."""
    if isinstance(value, Mapping):
        found: dict[Any, Any] = {}
        for key, entry in value.items():
            name, number = _public_text(key) if isinstance(key, str) else key, 2
            while name in found:  # two folders with one name
                name, number = f"{_public_text(key)} ({number})", number + 1
            found[name] = public(entry)
        return found
    if isinstance(value, list | tuple):
        return [public(entry) for entry in value]
    return _public_text(value) if isinstance(value, str) else value


def _public_text(text: str) -> str:
    plain = text.removeprefix("file://")
    if re.match(r"\w[\w+.-]*://", plain):
        return without_secrets([plain])[0]
    path = Path(plain)
    is_long = plain.count("/") > 1 and not re.search(r"\s", plain)  # the hub's names have one
    if plain.startswith(("/", "~", "./", "../")) or is_long or _is_there(path):
        return path.name or "/"
    return without_secrets([plain])[0]


def _is_there(path: Path) -> bool:
    try:
        return len(path.parts) > 1 and path.exists()
    except (OSError, ValueError):  # the name is too long or contains a NUL
        return False
