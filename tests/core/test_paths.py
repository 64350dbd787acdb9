import os
from pathlib import Path

import pytest

from ssl_vit.core.paths import as_path, path_from_text, path_to_text


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"plain/a.png", "plain/a.png"),
        ("Z\u00fcrich/\u65e5\u672c.png".encode(), "Z\u00fcrich/\u65e5\u672c.png"),
        (b"caf\xe9/a\\b/x\\\xff.png", r"caf\xe9/a\b/x\x5c\xff.png"),
        ("\u00e9".encode() + b"\xe9", "\u00e9\\xe9"),
        (rb"a\x41b", r"a\x41b"),
    ],
)
def test_every_name_becomes_text_and_is_found_again(raw: bytes, text: str) -> None:
    path = os.fsdecode(raw)
    assert path_to_text(path) == text
    assert path_from_text(text) == path
    text.encode()


def test_what_exists_is_taken_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert as_path("~/x") == Path("/home/somebody/x")
    assert as_path("~no_such_user/x") == Path("~no_such_user/x")
    Path("~/x").mkdir(parents=True)
    Path(r"lit\xe9ral").mkdir()
    assert as_path("~/x") == Path("~/x")
    assert as_path(r"lit\xe9ral") == Path(r"lit\xe9ral")
    Path(os.fsdecode(b"caf\xe9")).mkdir()
    assert as_path(r"caf\xe9") == Path(os.fsdecode(b"caf\xe9"))
