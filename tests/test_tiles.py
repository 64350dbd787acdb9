"""Runs that learn from tiles, through the real script."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.finetune import DEFAULTS as FINETUNE
from scripts.pretrain_mae import DEFAULTS
from ssl_vit.training.config import parse_run
from ssl_vit.training.continuing import check_run_folder
from ssl_vit.training.loop import set_up
from tests.interrupted import killed_after, run
from tests.processes import finish
from tests.test_resume import STEPS, command, losses, same, weights

TILES = ("--data.tile_size=[32,24]", "--data.tile_overlap=4", "--encoder.drop_path_rate=0")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of two classes and many sizes, one of them smaller than a tile and one cut off."""
    folder = tmp_path_factory.mktemp("images") / "slides"
    rng = np.random.default_rng(0)
    for number, size in enumerate([(70, 90), (64, 48), (20, 20), (100, 33), (50, 50), (80, 60)]):
        file = folder / ("light" if number % 2 else "dark") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 100 + 100 * (number % 2), (*size, 3), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:3000])
    return folder


def settings(slides: Path, folder: Path, *flags: str) -> list[str]:
    given = [f"--data.source={slides}", f"--output_dir={folder}", f"--steps={STEPS}", "--data.max_bad_share=1"]
    return [*given, f"--data.cache_dir={folder.parent / 'cache'}", "--data.label_column=none", *TILES, *flags]


@pytest.fixture(scope="module")
def whole(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(*settings(slides, folder)) == 0
    return folder


@pytest.mark.usefixtures("_fresh_state")
@pytest.mark.parametrize("flags", [("--data.num_workers=1",), ("--data.cache=disk", "--data.cache_side=32")])
def test_a_killed_run_goes_on_bit_for_bit(
    slides: Path, whole: Path, tmp_path: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Kept tiles have the pixels of those that are cut from their image each time."""
    folder = tmp_path / "run"
    words = [*settings(slides, folder), "--checkpoint.every_steps=3", *flags]
    with killed_after(5):
        run(*words)
    assert run(*words) == 0
    text = capsys.readouterr().out
    assert "Going on from" in text
    assert "6 images are cut into 48 tiles of 24 x 32 pixels" in text
    assert ": 48 images, no labels" in text
    assert same(weights(whole), weights(folder)) == []
    assert losses(folder) == losses(whole)
    bad = (folder / "bad_images.jsonl").read_text()
    assert bad == (whole / "bad_images.jsonl").read_text()
    assert {Path(json.loads(line)["path"]).name for line in bad.splitlines()} == {"5.png"}


def test_two_processes_learn_what_one_learns(slides: Path, whole: Path, tmp_path: Path) -> None:
    words = command(
        slides, tmp_path / "two", *TILES, "--data.max_bad_share=1", f"--data.cache_dir={tmp_path / 'cache'}"
    )
    text = finish(words, num_processes=2)
    assert "2 processes on cpu" in text
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), rel=1e-4)
    assert len(losses(tmp_path / "two")) == STEPS


@pytest.mark.usefixtures("_fresh_state")
def test_scores_are_of_whole_images(photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (f"--data.source={photo_folder}", f"--output_dir={tmp_path / 'run'}", "--steps=1", "--data.tile_size=20")
    assert run(*flags, f"--data.cache_dir={tmp_path / 'cache'}") == 0
    assert "40 images are cut into 240 tiles" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["judged_on"]["num_test"] == 40
    assert results["scores"]["trained"]["knn"]["n"] == 40


def test_other_tiles_are_another_run(slides: Path, whole: Path) -> None:
    words = [word for word in settings(slides, whole) if "tile" not in word]
    with pytest.raises(ValueError, match=r"data.tile_size \[32, 24\] -> 16"):
        check_run_folder(parse_run(DEFAULTS, [*words, "--data.tile_size=16"]))


@pytest.mark.usefixtures("_fresh_state")
def test_classes_are_learned_from_whole_images(photo_folder: Path, tmp_path: Path) -> None:
    words = [f"--data.source={photo_folder}", f"--output_dir={tmp_path / 'run'}", "--steps=1", "--data.tile_size=20"]
    from ssl_vit.training import supervised

    with pytest.raises(ValueError, match=r"^data.tile_size=20: a class belongs to a whole image"):
        set_up(parse_run(FINETUNE, words), supervised)


@pytest.mark.usefixtures("_fresh_state")
def test_kept_tiles_stay_as_they_are(tmp_path: Path) -> None:
    words = ["--data.source=x", "--steps=1", "--data.cache=ram", "--data.tile_size=[700,288]"]
    config, reasons = parse_run(DEFAULTS, words).resolve(9)
    assert config.data.cache_side == 288
    assert "data.cache_side 288: that of tiles, which stay as they are" in reasons
