"""Figures and the report of backbones that are no plain Vision Transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import pretrain_dino
from scripts.visualize import main
from ssl_vit.export import export_backbone
from ssl_vit.objectives.dino import DINOConfig
from ssl_vit.runs.record import list_frames, read_run
from ssl_vit.visualize.patches import patch_pca
from ssl_vit.visualize.preview import draw_preview
from ssl_vit.visualize.report import write_report
from tests.conftest import SMALL_DINO
from tests.families import CONVOLUTIONS, FAMILIES, STAGES
from tests.specs import GREY
from tests.visualize.conftest import train

SHOWS = {
    "hybrid": ["attention", "attention_60", "patch_attention_3", "pca", "similarity", "positions"],
    "dinov3": ["attention", "attention_60", "patch_attention_10", "pca", "similarity"],
    "swin": ["pca", "similarity"],
}


@pytest.mark.parametrize("family", SHOWS)
def test_all_that_a_backbone_has_is_drawn_and_the_rest_refused(
    family: str, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = FAMILIES[family]
    export_backbone(config.build(), tmp_path, normalization=GREY, provenance={"pooled": "cls"})
    given = [str(tmp_path), *(str(photo_folder / "disc" / f"0{number}.png") for number in range(2))]
    assert main(given) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [file.stem for file in files] == SHOWS[family]
    for file in files:
        with Image.open(file) as figure:
            assert len(np.unique(np.asarray(figure.convert("L")))) > 20
    for what in {"attention", "patch_attention", "positions"} - {file.stem.rstrip("_0123456789") for file in files}:
        assert main([*given, "--what", what]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: --what {what}: {config.arch} has no ")
        assert "choose of " in said


@pytest.mark.parametrize("family", ["swin", "convnext"])
def test_the_report_of_a_run_without_attention(family: str, photo_folder: Path, tmp_path: Path) -> None:
    """Its figures, in training and at the end, are the components of the patch tokens."""
    model_args = json.dumps(STAGES if family == "swin" else CONVOLUTIONS)
    small = [flag for flag in SMALL_DINO if not flag.startswith("--encoder.") or "image_size" in flag]
    flags = ["--encoder.arch", FAMILIES[family].arch, "--encoder.model_args", model_args]
    crops = ["--encoder.image_size=64", "--objective.local_crop_size=32", "--data.label_column=none"]
    run = train(pretrain_dino.DEFAULTS, [*small, *flags, *crops], photo_folder, tmp_path / family)
    assert read_run(run).picture == run / "pca.png"
    assert [frame.step for frame in list_frames(run)] == [0, 2, 4, 6]
    out = tmp_path / "report.html"
    assert write_report([run], out, num_images=2, asked=True) == []
    text = out.read_text()
    assert FAMILIES[family].arch in text
    assert '"layers":[],"heads":0' in text
    assert text.count('"similarity":"') == 2


def test_the_figure_in_training_shows_tokens_where_there_is_no_attention(tmp_path: Path) -> None:
    objective = DINOConfig(num_prototypes=8, hidden_dim=16, bottleneck_dim=8).build(FAMILIES["convnext"].build()).eval()
    images = torch.randn(2, 3, 64, 64)
    preview = objective.preview(images, np.random.default_rng(0))
    tokens = objective.backbone()(images).patches
    torch.testing.assert_close(preview.patches, tokens)
    assert preview.grid == (2, 2)
    draw_preview(preview, images, GREY, tmp_path / objective.figure_file)
    with Image.open(tmp_path / "pca.png") as figure:
        shown = np.asarray(figure.convert("RGB")).reshape(-1, 3)
    for colour in (patch_pca(tokens.detach(), (2, 2)).colours.flatten(0, 1) * 255).round().int().tolist():
        assert (shown == colour).all(axis=1).sum() > 100
    assert objective.preview(images[:1, :, :32, :32], np.random.default_rng(0)) is None  # too few to show
