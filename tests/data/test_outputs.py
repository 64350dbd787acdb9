import shutil
from pathlib import Path

import pytest

from scripts.export import main as export
from scripts.visualize import main as visualize
from ssl_vit.core.writing import MARKER, is_output, mark, written_files
from ssl_vit.data.decoded import open_decoded
from ssl_vit.data.sources.source import DataConfig, Source, open_source


@pytest.fixture
def images(photo_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(photo_folder, tmp_path / "images")


def _open(folder: Path) -> Source:
    return open_source(DataConfig(source=str(folder)))


def _is_untouched(folder: Path) -> bool:
    source = _open(folder)
    return len(source) == 40 and source.class_names == ("disc", "square")


def test_runs_and_what_is_made_of_them_are_no_images_whatever_is_deleted(start, images: Path) -> None:
    run = images / "runs" / "a"
    assert start(f"--output_dir={run}", "--evaluation.pictures_every_steps=2", steps=2) == 0
    assert export([str(run), "--to", "timm", "--out", str(images / "exported")]) == 0
    assert export([str(run), "--out", str(images / "bare")]) == 0
    assert (
        visualize(
            [str(run), "--what", "pca", "--num_images", "2", "--open_source", "true", "--out", str(images / "disc")]
        )
        == 0
    )
    assert {path.name for path in images.rglob("*.png")} >= {"reconstructions.png", "pca.png"}
    assert _is_untouched(images)
    written = "left out, since ssl_vit wrote it: bare, disc/pca.png, exported/timm and 1 more"
    assert written in " ".join(_open(images).notes)
    run = run.rename(images / "runs" / "a-before-20250101-000000")
    marker = (run / MARKER).rename(run / "marker")
    assert _is_untouched(images)
    for name in ("run.lock", "heartbeat.json", "provenance.json", "backbone.safetensors"):
        (run / name).unlink()
    assert _is_untouched(images)
    marker.rename(run / MARKER)
    figures = {path for path in run.rglob("*") if path.suffix in (".png", ".webp")}
    assert {path.name for path in figures} >= {"reconstructions.png", "step-00000002.webp"}
    for path in run.iterdir():
        if path not in figures and path.name not in (MARKER, "pictures"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert _is_untouched(images)


def test_decoded_images_are_no_images(images: Path) -> None:
    config = DataConfig(str(images), cache="disk", cache_side=16, cache_dir=str(images / "cache"))
    open_decoded(open_source(config), config, 3)
    entry = next((images / "cache").glob("*/table.npy")).parent
    assert _is_untouched(images)
    (entry / "about.json").unlink()
    (entry / MARKER).unlink()
    assert _is_untouched(images)
    mark(entry)
    (entry / "pixels.bin").unlink()
    assert _is_untouched(images)


def test_an_output_that_is_named_as_source_is_refused_with_the_reason(images: Path) -> None:
    mark(images)
    with pytest.raises(ValueError, match=r"^data\.source=.*no images .*left out, since ssl_vit wrote it: \.$"):
        _open(images)
    (images / MARKER).unlink()
    for name in ("config.yaml", "config.json", "model.safetensors"):
        (images / name).touch()  # which any project's folder may hold
    (images / "checkpoints").mkdir()
    assert _is_untouched(images)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"run.lock", "metrics.jsonl"}, True),
        ({"heartbeat.json", "checkpoints", "a.png"}, True),
        ({"config.yaml", "checkpoints"}, True),
        ({"model.pt2", "config.json"}, True),
        ({"model.safetensors", "state.json"}, True),
        ({"pixels.bin", "table.npy"}, True),
        ({"run.lock", "a.png"}, False),
        ({"config.json", "results.json", "a.png"}, False),
        ({"table.npy", "chair.npy"}, False),
        (set(), False),
    ],
)
def test_outputs_are_told_by_several_names(tmp_path: Path, names: set[str], expected: bool) -> None:
    assert is_output(tmp_path, names) is expected


def test_marks_are_of_single_files_and_are_written_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "a.png"):
        mark(tmp_path, name)
    assert (tmp_path / MARKER).read_text() == "a.png\nb.png\n"
    assert not is_output(tmp_path, [MARKER])
    assert written_files(tmp_path, [MARKER]) == {"a.png", "b.png", "unfinished-a.png", "unfinished-b.png"}
    assert written_files(tmp_path, []) == set()
    mark(tmp_path / "absent")  # what cannot be written is no error
