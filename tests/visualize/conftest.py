"""Two tiny runs whose figures were drawn in training."""

import sys
from pathlib import Path

import pytest

from scripts import pretrain_dino, pretrain_mae
from ssl_vit.training.config import RunConfig
from ssl_vit.training.loop import main
from tests.conftest import SMALL_DINO, SMALL_RUN

LONG = [
    "--steps=6",
    "--checkpoint.every_steps=3",
    "--evaluation.max_images=16",
    "--evaluation.pictures_every_steps=2",
]


def train(defaults: RunConfig, flags: list[str], source: Path, folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *flags, *LONG, f"--data.source={source}", f"--output_dir={folder}"])
        assert main(defaults) == 0
    return folder


@pytest.fixture(scope="session")
def mae_run(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> Path:
    return train(
        pretrain_mae.DEFAULTS,
        [*SMALL_RUN, "--tracking=tensorboard"],
        photo_folder,
        tmp_path_factory.mktemp("runs") / "mae",
    )


@pytest.fixture(scope="session")
def dino_run(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> Path:
    return train(pretrain_dino.DEFAULTS, SMALL_DINO, photo_folder, tmp_path_factory.mktemp("runs") / "dino")
