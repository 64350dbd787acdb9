import errno
import json
import os
from pathlib import Path

import pytest

from ssl_vit.core.writing import JsonLines, forget_after, replace_text


class FullDisk:
    """`os.write` that has room for some bytes and then fails as the system does."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._write = os.write

    def __call__(self, descriptor: int, content: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(descriptor, bytes(content)[: self.room])
        self.room -= written
        return written


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_that_a_full_disk_refuses_wait_and_stay_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = JsonLines(tmp_path / "log.jsonl")
    file.append([{"step": 1}])
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", FullDisk(room=5))
        file.append([{"step": 2}])
        assert lines(file.path) == [{"step": 1}]  # not a part of a line is left
        file.append([{"step": 3}])
    assert lines(file.path) == [{"step": 1}]
    file.append([{"step": 4}])
    assert lines(file.path) == [{"step": number} for number in (1, 2, 3, 4)]
    warned = capsys.readouterr().err
    assert warned.count("WARNING") == 1
    assert f"{file.path}: No space left on device" in warned
    assert "MiB are free" in warned


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_replaced_file_has_its_old_content_or_its_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    path = tmp_path / "config.yaml"
    replace_text(path, "old")

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(*((os, "fsync") if at == "fsync" else (Path, "replace")), fail)
        with pytest.raises(OSError, match="No space left"):
            replace_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    replace_text(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"step": 1}\n{"step": 2}\n{"step": 3}\n', '{"step": 1}\n{"step": 2}\n'),
        ('{"step": 1}\n{"step": 2', '{"step": 1}\n'),
        ('{"step": 1}\n{"step": 2}', '{"step": 1}\n'),  # cut short before its end, so the step is done again
        ('{"step": 1}\nxx\n{"step": 2}\n{"step": 3}\n', '{"step": 1}\n{"step": 2}\n'),
        ('{"step": 3}\n', ""),
        ("", ""),
    ],
)
def test_steps_after_the_checkpoint_are_forgotten(tmp_path: Path, text: str, kept: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    forget_after(path, 2)
    assert path.read_text() == kept
    assert list(tmp_path.iterdir()) == [path]


def test_going_on_needs_no_space_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\n')
    monkeypatch.setattr("ssl_vit.core.writing.replace_text", lambda *args: pytest.fail("was written anew"))
    forget_after(path, 2)
    assert lines(path) == [{"step": 1}]
