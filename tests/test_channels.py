"""Runs over images that are neither square nor of three channels, from the command line to the backbone."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from ssl_vit.export import load_backbone
from ssl_vit.training.loop import main
from tests.conftest import SMALL_DINO, SMALL_RUN

tifffile = pytest.importorskip("tifffile")


@pytest.fixture
def bands(tmp_path: Path) -> Path:
    """Images of 12 bands, half of them arrays and half of them TIFF files of 12 pages of 16 bits."""
    folder = tmp_path / "bands"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(0, 256, (40, 60, 12), dtype=np.uint8)
        if number % 2:
            np.save(folder / f"{number}.npy", pixels)
        else:
            planes = np.moveaxis(pixels, -1, 0).astype(np.uint16) * 257
            tifffile.imwrite(folder / f"{number}.tif", planes, photometric="minisblack")
    return folder


@pytest.mark.parametrize(("objective", "small", "cache"), [("mae", SMALL_RUN, "ram"), ("dino", SMALL_DINO, "none")])
def test_twelve_bands_of_no_square_are_learned_from(
    bands: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    objective: str,
    small: list[str],
    cache: str,
) -> None:
    twelve = [f"--data.{name}={[0.4] * 12}" for name in ("mean", "std")]
    run = [f"--data.source={bands}", f"--output_dir={tmp_path / 'run'}", "--steps=2", "--data.pages=channels"]
    size = ["--encoder.in_chans=12", "--encoder.image_size=[24,40]", f"--data.cache={cache}"]
    local = ["--objective.local_crop_size=[8,16]"] if objective == "dino" else []
    AcceleratorState._reset_state()
    monkeypatch.setattr("sys.argv", ["pretrain.py", *small, *run, *twelve, *size, *local, "--data.on_bad_image=raise"])
    threads = torch.get_num_threads()
    assert main(importlib.import_module(f"scripts.pretrain_{objective}").DEFAULTS) == 0
    torch.set_num_threads(threads)
    assert (
        "note       of 8 images looked at, 4 hold 16 bits a channel, which are rounded to 8\n"
        in capsys.readouterr().out
    )
    encoder = load_backbone(tmp_path / "run")
    assert encoder(torch.zeros(1, 12, 24, 40)).patches.shape == (1, 15, 32)
    if objective == "mae":
        before = sorted(tmp_path.iterdir())
        for output in ("run", "continued"):  # one is there, and would be moved aside
            rgb = [f"--data.source={photo_folder}", f"--output_dir={tmp_path / output}", "--steps=2", "--fresh"]
            monkeypatch.setattr("sys.argv", ["pretrain.py", *small, *rgb, f"--encoder.pretrained={tmp_path / 'run'}"])
            capsys.readouterr()
            assert main(importlib.import_module("scripts.pretrain_mae").DEFAULTS) == 2
            why = "is read from there" if output == "run" else "none of the 40 images looked at can be decoded with"
            assert why in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before
