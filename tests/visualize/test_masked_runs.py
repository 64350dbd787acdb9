"""Figures and the report of runs of SimMIM and FCMAE."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.visualize import main
from ssl_vit.runs.record import list_frames, read_run
from ssl_vit.runs.trained import open_trained
from ssl_vit.visualize.report import write_report
from tests.conftest import OBJECTIVES
from tests.families import flags_of
from tests.visualize.conftest import train


@pytest.mark.parametrize(("objective", "family"), [("simmim", "swin"), ("simmim", "dinov3"), ("fcmae", "convnextv2")])
def test_reconstructions_in_training_later_and_in_the_report(
    objective: str, family: str, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults, small = OBJECTIVES[objective]
    run = train(defaults, [*small, *flags_of(objective, family)], photo_folder, tmp_path / "run")
    assert read_run(run).picture == run / "reconstructions.png"
    assert [frame.step for frame in list_frames(run)] == [0, 2, 4, 6]
    trained = open_trained(run)
    assert trained.pooled == "mean"
    assert type(trained.objective).__name__.lower() == objective
    capsys.readouterr()
    out, masks = tmp_path / "figures", ["--mask", "random", "block", "--mask_ratios", "0.5"]
    assert main([str(run), "--open_source", "--out", str(out), "--num_images", "2", *masks]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [file.stem for file in files][:2] == ["reconstructions_random", "reconstructions_block"]
    for file in files[:2]:
        with Image.open(file) as figure:
            assert len(np.unique(np.asarray(figure.convert("L")))) > 20
    notes = write_report([run], tmp_path / "report.html", asked=True)
    page = (tmp_path / "report.html").read_text()
    assert notes == []
    assert '"similarity"' in page
