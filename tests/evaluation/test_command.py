import json
from pathlib import Path

import pytest

from ssl_vit.evaluation.command import main
from ssl_vit.export import export_backbone
from ssl_vit.models.vit import ViT


@pytest.fixture
def backbone(tiny_encoder: ViT, tmp_path: Path) -> Path:
    export_backbone(tiny_encoder, tmp_path, mean=(0.5,) * 3, std=(0.5,) * 3, provenance={})
    return tmp_path


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_a_table_is_printed_and_written_and_repeats_itself(
    backbone: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str], probe: str
) -> None:
    command = [str(backbone), "--source", str(photo_folder), "--folds=4", "--k=5"]
    assert main(probe, None, command) == 0
    text = capsys.readouterr().out
    assert ("k-NN (k=5)" in text) == (probe == "knn")
    assert ("linear" in text.splitlines()[0]) == (probe == "linear")
    result = json.loads((backbone / f"{probe}.json").read_text())
    assert result["backbone"][probe]["n"] == 40
    assert result["raw pixels"][probe]["accuracy"] > 0.9  # red discs and blue squares
    assert main(probe, None, [str(backbone / "backbone.safetensors"), *command[1:]]) == 0
    assert capsys.readouterr().out == text


def test_a_test_source_is_scored_instead(backbone: Path, photo_folder: Path) -> None:
    assert main("knn", None, [str(backbone), f"--source={photo_folder}", f"--test_source={photo_folder}"]) == 0
    result = json.loads((backbone / "knn.json").read_text())
    assert result["test_source"] == str(photo_folder)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--source: name the labelled images"),
        (["--source=/nowhere"], "data.source='/nowhere': no such file or folder"),
        (["--source=openmoji", "--k=0"], "k=0: must be at least 1"),
        (["--source=openmoji", "--feature=patch"], "feature"),
        (["--sauce=openmoji"], "--sauce"),
    ],
)
def test_what_cannot_be_used_ends_in_one_line(
    backbone: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main("knn", None, [str(backbone), *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_unlabelled_images_are_refused(backbone: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("knn", None, [str(backbone), f"--source={photo_folder / 'disc'}"]) == 2
    assert "has no labels" in capsys.readouterr().err


def test_a_folder_without_a_backbone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("knn", None, [str(tmp_path)]) == 2
    assert "backbone.safetensors: no such file" in capsys.readouterr().err
