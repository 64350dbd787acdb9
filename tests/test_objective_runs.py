"""Objectives of crops without prototypes, from images to scores, export and report."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssl_vit.export import load_backbone
from ssl_vit.export.card import write_card
from ssl_vit.export.run import export_run
from ssl_vit.runs.record import read_run
from ssl_vit.runs.trained import open_trained
from ssl_vit.visualize.verdict import assess
from tests.conftest import last_weights

SIGNS = {"feature_std", "rankme", "projection_rank", "view_cosine"}
KINDS = {
    "simdino": ("teacher_encoder.", SIGNS | {"coding_rate", "ema_momentum"}, "SimDINO (Wu et al. 2025, arXiv:2502"),
    "simdinov2": ("teacher_encoder.", SIGNS | {"coding_rate", "loss_dino", "loss_ibot"}, "SimDINOv2 (Wu et al. 2025"),
    "lejepa": ("encoder.", SIGNS | {"loss_agreement", "loss_regulariser"}, "LeJEPA (Balestriero & LeCun 2025"),
}


@pytest.mark.parametrize("objective", KINDS)
def test_a_run_ends_with_scores_and_an_export_of_what_was_trained(
    start: Callable[..., int], quick_scores: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    prefix, signs, paper = KINDS[objective]
    assert start("--evaluation.every_steps=4", objective=objective, labels=True, steps=8) == 0
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    assert {"raw pixels", "untrained", "trained"} <= results["scores"].keys()
    assert all(0 <= results["scores"]["trained"][name]["accuracy"] <= 1 for name in ("knn", "linear"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert signs <= set().union(*records)
    assert "teacher_temp" not in set().union(*records)
    assert any("eval_knn" in record for record in records)
    weights = last_weights(run)
    for name, value in load_backbone(run).state_dict().items():
        assert torch.equal(value, weights[f"{prefix}{name}"]), name
    finished = (run / "backbone.safetensors").read_bytes()
    assert export_run(run).read_bytes() == finished
    assert (run / "attention.png").stat().st_size > 1000
    assert "num_prototypes" not in re.findall(r"auto +objective\.(\w+)", capsys.readouterr().out)
    assert assess(read_run(run)).reasons
    card = write_card(
        open_trained(run), library="timm", loading_code="", difference=0.0, proved_on="images", license="unknown"
    )
    assert paper in card
