"""What the probes refuse, and what they say where nothing can be chosen."""

import shutil
from pathlib import Path

import pytest

from ssl_vit.export import export_backbone
from ssl_vit.models.vit import ViT
from tests.evaluation.test_command import SCRIPTS, run
from tests.specs import GREY


@pytest.fixture
def backbone(tiny_encoder: ViT, tmp_path: Path) -> Path:
    export_backbone(tiny_encoder, tmp_path / "backbone", normalization=GREY, provenance={})
    return tmp_path / "backbone"


@pytest.mark.parametrize("flags", [["--test_split=train"], ["--test_source=COPY"]])
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_images_that_are_learned_from_are_no_test(
    backbone: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, flags: list[str]
) -> None:
    copy = shutil.copytree(photo_folder, tmp_path / "copy")
    flags = [flag.replace("COPY", str(copy)) for flag in flags]
    assert run(name, backbone, f"--source={photo_folder}", *flags) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "are the images that are learned from" in line
    assert "name others with --test_source or --test_split, or leave both out" in line


def test_a_logistic_regression_takes_no_settings_of_heads(
    backbone: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("linear", backbone, f"--source={photo_folder}", "--logistic=true", "--probe.epochs=5") == 2
    assert "--logistic=True: fits one regression and trains no heads; leave --protocol and --probe.* out" in (
        capsys.readouterr().err
    )


def test_one_image_of_each_class_leaves_none_to_choose_a_head(
    backbone: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("disc", "square"):
        (tmp_path / "one" / kind).mkdir(parents=True)
        file = min((photo_folder / kind).iterdir())
        shutil.copy(file, tmp_path / "one" / kind / file.name)
    flags = ["--feature=mean", "--shots=[]", "--probe.base_lrs=[1e-9,0.001,1.0]"]
    assert run("linear", backbone, f"--source={tmp_path / 'one'}", f"--test_source={photo_folder}", *flags) == 0
    text = capsys.readouterr().out
    assert "backbone: nothing was held out to choose a head, so it is mean at base_lr 0.001\n" in text
    assert "best on the held-out part" not in text
