"""Full and read-only disks, few file descriptors, no /dev/shm: a line and the old file, for whatever is written."""

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import export, report, visualize
from ssl_vit.core import writing
from ssl_vit.core.writing import report_error
from ssl_vit.evaluation import command, extract
from tests.hostile import small_run

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own, about files that they could not write


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@contextmanager
def limited(kind: int, limit: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def extract_to(suffix: str) -> Callable[[Path, Path, Path], int]:
    def run(run: Path, images: Path, out: Path) -> int:
        flags = [str(run), f"--source={images}", f"--output={out / f'x.{suffix}'}", "--num_workers=0", "--fresh=true"]
        return command.main(extract.extract, {"": extract.ExtractConfig}, None, flags)

    return run


def export_as(target: str) -> Callable[[Path, Path, Path], int]:
    def run(run: Path, images: Path, out: Path) -> int:
        return export.main([str(run), "--to", target, f"--out={out}", f"--images={images}", "--overwrite"])

    return run


# What is written into a folder, each with its bytes at least.
FRONTS: dict[str, tuple[Callable[[Path, Path, Path], int], int]] = {
    "report": (lambda run, images, out: report.main([str(run), f"--out={out}/report.html", "--panel_images=0"]), 9_000),
    "export": (lambda run, images, out: export.main([str(run), f"--out={out / 'own'}"]), 9_000),
    "timm": (export_as("timm"), 9_000),
    "transformers": (export_as("transformers"), 9_000),
    "torchvision": (export_as("torchvision"), 9_000),
    "torch_export": (export_as("torch_export"), 9_000),
    "figures": (
        lambda run, images, out: visualize.main(
            [str(run), *map(str, sorted(images.iterdir())), f"--out={out}", "--what", "similarity"]
        ),
        5_000,
    ),
    "film": (lambda run, images, out: visualize.main(["film", str(run), f"--out={out / 'film.gif'}"]), 500),
    "parquet": (extract_to("parquet"), 600),
    "safetensors": (extract_to("safetensors"), 600),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("front", FRONTS)
def test_a_full_disk_ends_in_a_line_and_leaves_the_old_files(
    whole: Path, images: Path, tmp_path: Path, front: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write, least = FRONTS[front]
    out = tmp_path / "out"
    out.mkdir()
    assert write(whole, images, out) == 0
    before = contents(out)
    capsys.readouterr()
    for limit in (0, least):
        with limited(resource.RLIMIT_FSIZE, limit):
            code = write(whole, images, out)
        error = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
        assert code in (1, 2)
        assert len(error) == 1
        assert error[0].startswith("error: ")
        assert str(out) in error[0]
        assert {name: text for name, text in contents(out).items() if "parts" not in name} == before
    assert write(whole, images, out) == 0
    assert sorted(contents(out)) == sorted(before)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT, errno.ENOSPC])
def test_what_the_system_says_is_said(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    out, own = tmp_path / "report.html", os.open
    out.write_text("old")

    def refuse(path: object, flags: int, *args: int, **settings: object) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), str(path))
        return own(path, flags, *args, **settings)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        assert report.main([str(whole), f"--out={out}", "--panel_images=0"]) == 1
    assert capsys.readouterr().err == f"error: {out}: {os.strerror(number)}\n"
    assert out.read_text() == "old"


def test_few_file_descriptors_end_in_a_line(
    whole: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    assert report.main([str(run), "--panel_images=0"]) == 0  # imports what it needs
    before = (run / "report.html").read_bytes()
    used = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    codes = []
    for spare in range(4):
        capsys.readouterr()
        with limited(resource.RLIMIT_NOFILE, used - 1 + spare):
            codes.append(report.main([str(run), "--panel_images=0"]))
        error = capsys.readouterr().err
        assert (codes[-1], error.count("\n")) in ((0, 0), (1, 1), (2, 1))
        assert (run / "report.html").read_bytes() == before
    assert codes[0] in (1, 2)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x.png"), 1, "x.png: Too many open files; raise `ulimit -n`"),
        (RuntimeError("received 0 items of ancdata"), 1, "received 0 items of ancdata; raise `ulimit -n`"),
        (RuntimeError("unable to write to file </torch_1_2_3>\n: shared memory"), 1, "loader processes need /dev/shm"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error."), 1, "docker: --shm-size"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), 1, "loader processes need /dev/shm"),
        (ValueError("source='x':\n no"), 2, "error: source='x': no\n"),
    ],
)
def test_faults_of_the_machine_say_what_to_do(
    error: Exception, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writing.os, "access", lambda path, mode: False)
    assert report_error(error) == code
    text = capsys.readouterr().err
    assert told in text
    assert text.count("\n") == 1


def test_a_fault_of_ours_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        report_error(RuntimeError("shapes do not fit"))
