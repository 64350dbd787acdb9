"""Runs over images some of which cannot be decoded, through the real script."""

import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

import ssl_vit.training.setup as run_module
from scripts.finetune import DEFAULTS as FINETUNE
from scripts.pretrain_mae import DEFAULTS
from ssl_vit.training import supervised
from ssl_vit.training.loop import main
from tests.conftest import SMALL_ENCODER, SMALL_RUN
from tests.processes import finish, kill_at
from tests.test_resume import STEPS, command, losses, same, weights

BAD = ("disc/07.png", "square/19.png")


@pytest.fixture(scope="module")
def photos(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images, two of which are cut off."""
    folder = tmp_path_factory.mktemp("damaged") / "photos"
    shutil.copytree(photo_folder, folder)
    for name in BAD:
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    return folder


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    text = finish(command(photos, run))
    assert text.count("WARNING: images that cannot be decoded are passed over") == 1
    assert text.count("note       2 of the source's 40 images cannot be decoded; the first: ") == 1
    return run


def counts(run: Path) -> list[int]:
    return [json.loads(line)["bad_images"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def listed(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "bad_images.jsonl").read_text().splitlines()]


def test_bad_images_are_counted_and_listed_once(photos: Path, whole: Path) -> None:
    assert counts(whole) == sorted(counts(whole))
    assert counts(whole)[4] == 2  # five steps are an epoch
    assert counts(whole)[-1] >= 4
    assert sorted(record["path"] for record in listed(whole)) == [str(photos / name) for name in BAD]
    assert {record["reason"] for record in listed(whole)} == {"the PNG file is cut off"}


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_killed_run_skips_the_same_images(photos: Path, whole: Path, tmp_path: Path, num_workers: int) -> None:
    run = tmp_path / "run"
    flags = (f"--data.num_workers={num_workers}", "--checkpoint.every_steps=3")
    words = command(photos, run, *flags)
    kill_at(words, 5)
    finish(words)
    assert same(weights(whole), weights(run)) == []
    assert losses(run) == losses(whole)
    assert counts(run) == counts(whole)
    assert listed(run) == listed(whole)


@pytest.mark.slow
def test_two_processes_skip_what_one_skips(photos: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--encoder.drop_path_rate=0", "--data.label_column=null", "--evaluation.every_steps=6"]
    finish(command(photos, one, *flags))
    text = finish(command(photos, two, *flags), num_processes=2)
    assert "2 processes on cpu" in text
    assert text.count("2 of the 40 evaluation images cannot be decoded and are left out") == 2
    for run in (one, two):
        scores = json.loads((run / "results.json").read_text())["scores"]
        assert {scores[name]["knn"]["n"] for name in scores} == {38}
    records = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    found = [[record["bad_images"] for record in of_run if "loss" in record] for of_run in records]
    assert found[0] == found[1]
    assert len(found[0]) == STEPS
    assert listed(one) == listed(two)


@pytest.fixture
def _fresh_state() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()
    torch.set_num_threads(threads)


def start(photos: Path, run: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    given = [f"--data.source={photos}", f"--output_dir={run}", f"--steps={STEPS}", "--data.label_column=none"]
    AcceleratorState._reset_state()
    monkeypatch.setattr("sys.argv", ["pretrain_mae.py", *SMALL_RUN, *given, *flags])
    return main(DEFAULTS)


@pytest.mark.usefixtures("_fresh_state")
def test_a_run_of_too_many_stops_and_goes_on_where_more_are_allowed(
    photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, every, few = tmp_path / "run", "--checkpoint.every_steps=1", "--data.max_bad_share=0.02"
    assert start(photos, run, monkeypatch, every, few) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: data.max_bad_share=0.02: 2 of the source's 40 images cannot be decoded; ")
    assert "the PNG file is cut off. Repair or remove them" in line
    assert not run.exists()
    monkeypatch.setattr(run_module, "look_beforehand", lambda *_: None)  # as where headers tell nothing
    assert start(photos, run, monkeypatch, every, few) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: data.max_bad_share=0.02: 2 of the source's 40 images cannot be decoded; ")
    assert line.endswith("The checkpoints before it are whole.")
    assert list((run / "checkpoints").iterdir())
    assert start(photos, run, monkeypatch, every, "--data.on_bad_image=raise") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the PNG file is cut off" in line
    assert start(photos, run, monkeypatch, every) == 0
    assert same(weights(whole), weights(run)) == []
    assert listed(run) == listed(whole)


@pytest.mark.usefixtures("_fresh_state")
def test_a_run_without_a_good_image_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(b"no image")
    assert start(tmp_path / "photos", tmp_path / "run", monkeypatch) == 2
    assert "none of the 3 images looked at can be decoded" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(run_module, "look_beforehand", lambda *_: None)
    assert start(tmp_path / "photos", tmp_path / "run", monkeypatch) == 1
    assert "nor can any of the next" in capsys.readouterr().err


@pytest.mark.usefixtures("_fresh_state")
def test_a_run_that_ends_by_bad_images_after_its_last_step_leaves_its_checkpoint(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their headers are sound, so that they are found when they are drawn, and all are judged at the last step."""
    shutil.copytree(photo_folder, tmp_path / "photos")
    for name in BAD:
        spoil_pixels(tmp_path / "photos" / name)
    run, flags = tmp_path / "run", ["--steps=5", "--log_every=5", "--checkpoint.every_steps=100"]
    assert start(tmp_path / "photos", run, monkeypatch, *flags, "--data.max_bad_share=0.02") == 1
    assert "2 of the source's 40 images cannot be decoded" in capsys.readouterr().err
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000005"]
    assert start(tmp_path / "photos", run, monkeypatch, *flags) == 0
    assert len(losses(run)) == 1


def spoil_pixels(png: Path) -> None:
    """Replace what a PNG file's pixels are compressed to, with the checksum that belongs to it."""
    data = png.read_bytes()
    at = data.index(b"IDAT") - 4
    length = struct.unpack_from(">I", data, at)[0]
    chunk = b"IDAT" + bytes(length)
    png.write_bytes(data[: at + 4] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[at + 12 + length :])


@pytest.mark.usefixtures("_fresh_state")
def test_fine_tuning_passes_over_bad_images_and_is_not_tested_on_them(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, test = tmp_path / "run", shutil.copytree(photos, tmp_path / "test")
    shutil.copy(test / "disc" / "00.png", test / "disc" / "more.png")
    flags = [*SMALL_ENCODER, f"--data.source={photos}", f"--output_dir={run}", f"--steps={STEPS}", "--encoder.depth=1"]
    AcceleratorState._reset_state()
    monkeypatch.setattr("sys.argv", ["finetune.py", *flags, f"--evaluation.test_source={test}"])
    assert main(FINETUNE, ending=supervised) == 0
    assert "2 of the 41 test images cannot be decoded" in capsys.readouterr().out
    assert sorted(record["path"] for record in listed(run)) == [str(photos / name) for name in BAD]
    assert json.loads((run / "results.json").read_text())["scores"]["fine-tuned"]["test"]["n"] == 39
