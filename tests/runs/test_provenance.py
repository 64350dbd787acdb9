import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ssl_vit.core import writing
from ssl_vit.data.sources.source import DataConfig, open_source
from ssl_vit.runs import provenance
from ssl_vit.runs.provenance import fingerprint, git_revision, note_session, without_secrets


def note(folder: Path, photos: Path, step: int = 0, num_processes: int = 1) -> None:
    source = open_source(DataConfig(source=str(photos)))
    note_session(
        folder, source, seed=3, start_step=step, num_steps=9, num_processes=num_processes, num_micro=1, precision="no"
    )


def noted(folder: Path) -> list[dict]:
    return json.loads((folder / "provenance.json").read_text())["sessions"]


def test_each_start_is_noted_and_what_changed_is_told(
    tmp_path: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note(tmp_path, photo_folder)
    note(tmp_path, photo_folder)
    assert capsys.readouterr().out == ""
    note(tmp_path, photo_folder, step=7, num_processes=2)
    assert "processes.count 1 -> 2" in capsys.readouterr().out
    first, _, last = noted(tmp_path)
    assert (first["step"], last["step"], first["seed"]) == (0, 7, 3)
    assert first["processes"] == {"count": 1, "micro_batches": 1, "precision": "no"}
    assert first["versions"]["torch"] == provenance.version("torch")
    assert first["hardware"]["cores"] >= 1
    assert first["data"]["rows"] == 40
    assert first["command"][0]


def test_other_images_are_told_of(tmp_path: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(photo_folder, photos)
    before = fingerprint(open_source(DataConfig(source=str(photo_folder))))
    assert fingerprint(open_source(DataConfig(source=str(photos)))) == before  # wherever they lie
    run = tmp_path / "run"
    run.mkdir()
    note(run, photos)
    (photos / "disc" / "03.png").write_bytes((photos / "disc" / "03.png").read_bytes() + b"x")
    note(run, photos)
    assert "data: as many images as before, of other names or sizes" in capsys.readouterr().out
    (photos / "disc" / "03.png").rename(photos / "disc" / "03a.png")
    note(run, photos)
    assert "data: as many images as before, of other names or sizes" in capsys.readouterr().out
    (photos / "disc" / "04.png").unlink()
    note(run, photos)
    told = capsys.readouterr().out
    assert "data.rows 40 -> 39" in told
    assert "sha256" not in told
    assert "names or sizes" not in told


def test_a_full_disk_or_a_damaged_file_does_not_stop_a_run(
    tmp_path: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note(tmp_path, photo_folder)

    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(writing, "flush", fail)
        note(tmp_path, photo_folder, step=2)
    assert "provenance.json: No space left on device" in capsys.readouterr().out
    assert [session["step"] for session in noted(tmp_path)] == [0]
    (tmp_path / "provenance.json").write_text("{")
    note(tmp_path, photo_folder, step=4)
    assert "cannot be read and is replaced" in capsys.readouterr().out
    assert [session["step"] for session in noted(tmp_path)] == [4]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--hub_token", "abc", "--seed", "1"], ["--hub_token", "***", "--seed", "1"]),
        (["--hub_token=abc"], ["--hub_token=***"]),
        (["--data.token=abc"], ["--data.token=***"]),
        (["--api-key", "abc"], ["--api-key", "***"]),
        (["--password=x=y"], ["--password=***"]),
        (["x=hf_abcdefghijkl"], ["x=***"]),
        (["ghp_0123456789abcdef"], ["***"]),
        (["--data.source=https://me:secret@host/x"], ["--data.source=https://***@host/x"]),
        (["https://host/x?a=1&X-Amz-Signature=abc&b=2"], ["https://host/x?a=1&X-Amz-Signature=***&b=2"]),
        (["--hub_token", "--seed", "1"], ["--hub_token", "--seed", "1"]),
        (["--objective.pooling=token", "--num_tokens", "4"], ["--objective.pooling=token", "--num_tokens", "4"]),
        (["a@b.png", "my_images"], ["a@b.png", "my_images"]),
    ],
)
def test_a_command_line_is_kept_without_its_secrets(given: list[str], shown: list[str]) -> None:
    assert without_secrets(given) == shown


def test_git_revision_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None
    person = ["-c", "user.name=a", "-c", "user.email=a@b.c"]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(tmp_path), *person, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    assert git_revision(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "first")
    (tmp_path / "untracked").touch()
    assert git_revision(tmp_path) == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_revision(tmp_path) == {"revision": git("rev-parse", "HEAD"), "dirty": True}
