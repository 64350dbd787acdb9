"""Runs over images that were decoded beforehand, through the real script."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from scripts.pretrain_mae import DEFAULTS
from ssl_vit.core.settings import as_plain
from ssl_vit.training.config import RunConfig, parse_run, write_config
from ssl_vit.training.continuing import check_run_folder
from tests.interrupted import killed_after, run
from tests.processes import finish
from tests.test_resume import STEPS, command, losses, same, weights

BAD = ("disc/07.png", "square/19.png")
SIDE = "--data.cache_side=36"


@pytest.fixture(scope="module")
def photos(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "photos"
    shutil.copytree(photo_folder, folder)
    for name in BAD:
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    return folder


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(*settings(photos, folder), "--data.cache=ram") == 0
    return folder


def settings(photos: Path, folder: Path) -> list[str]:
    given = [f"--data.source={photos}", f"--output_dir={folder}", f"--steps={STEPS}", "--data.label_column=none"]
    return [*given, SIDE, "--encoder.drop_path_rate=0"]


def listed(run: Path) -> str:
    return (run / "bad_images.jsonl").read_text()


@pytest.mark.usefixtures("_fresh_state")
def test_a_killed_run_goes_on_bit_for_bit_with_other_workers_and_from_disk(
    photos: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, disk = tmp_path / "run", ("--data.cache=disk", f"--data.cache_dir={tmp_path / 'cache'}")
    flags = [*settings(photos, folder), "--checkpoint.every_steps=3"]
    with killed_after(5):
        run(*flags, *disk, "--data.num_workers=2")
    assert "cache      40 images, 2 of them bad" in capsys.readouterr().out
    with killed_after(5):  # at step 8
        run(*flags, *disk, "--data.num_workers=0")
    text = capsys.readouterr().out
    assert "Going on from" in text
    assert "cache " not in text
    assert run(*flags, "--data.cache=ram", "--data.num_workers=2") == 0
    assert "cache      40 images, 2 of them bad" in capsys.readouterr().out
    assert same(weights(whole), weights(folder)) == []
    assert losses(folder) == losses(whole)
    assert listed(folder) == listed(whole)
    assert len(listed(folder).splitlines()) == 2
    assert {json.loads(line)["reason"] for line in listed(folder).splitlines()} == {"the PNG file is cut off"}


@pytest.mark.slow
def test_two_processes_share_what_the_first_one_decodes(photos: Path, whole: Path, tmp_path: Path) -> None:
    flags = (SIDE, "--encoder.drop_path_rate=0", "--data.cache=ram")
    text = finish(command(photos, tmp_path / "two", *flags), num_processes=2)
    assert "2 processes on cpu" in text
    assert text.count("decoded in") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), rel=1e-4)
    assert len(losses(tmp_path / "two")) == STEPS
    assert listed(tmp_path / "two") == listed(whole)


def config(run: Path, *flags: str) -> RunConfig:
    found = parse_run(DEFAULTS, ["--data.source=x", "--steps=10", f"--output_dir={run}", *flags])
    return found.resolve(100)[0]


def test_cached_and_fresh_pixels_are_not_mixed_in_one_run(tmp_path: Path) -> None:
    write_config(config(tmp_path, "--data.cache=disk"), tmp_path / "config.yaml")
    check_run_folder(config(tmp_path, "--data.cache=ram", "--data.cache_dir=elsewhere"))
    with pytest.raises(ValueError, match=r"data.cache 'disk' -> 'none'"):
        check_run_folder(config(tmp_path))
    with pytest.raises(ValueError, match=r"data.cache_side 256 -> 300"):
        check_run_folder(config(tmp_path, "--data.cache=disk", "--data.cache_side=300"))


def test_the_side_follows_from_the_encoder(tmp_path: Path) -> None:
    flags = ("--data.cache=ram", "--encoder.image_size=[448,336]")
    assert config(tmp_path, *flags).data.cache_side == 384
    assert config(tmp_path, *flags, "--data.cache_side=500").data.cache_side == 500
    assert config(tmp_path).data.cache_side == "auto"


def test_runs_from_before_a_setting_go_on(tmp_path: Path) -> None:

    old = as_plain(config(tmp_path))
    for name in ("cache", "cache_side", "cache_dir"):
        del old["data"][name]
    old["data"]["num_workers"] = -1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    check_run_folder(config(tmp_path))
    check_run_folder(parse_run(DEFAULTS, [f"--config={tmp_path / 'config.yaml'}"]))
    with pytest.raises(ValueError, match=r"data.cache 'none' -> 'ram'"):
        check_run_folder(config(tmp_path, "--data.cache=ram"))
