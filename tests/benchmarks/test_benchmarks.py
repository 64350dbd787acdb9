"""What is compared is the same work, and the table says what was measured. No test looks at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from scripts.pretrain_dino import DEFAULTS
from ssl_vit.benchmarks.loader import compare_loader, pillow_mae, pillow_views
from ssl_vit.benchmarks.memory import head_and_loss, pairwise_loss, peak_of
from ssl_vit.benchmarks.rounds import alternate, ratios
from ssl_vit.benchmarks.step import compare_attention
from ssl_vit.config import parse_run
from ssl_vit.objectives.dino import dino_loss
from tests.conftest import ROOT, SMALL_DINO


def test_contenders_take_turns_and_ratios_are_within_a_round() -> None:
    calls: list[str] = []
    rates = alternate({name: lambda name=name: calls.append(name) or 3 for name in "ab"}, rounds=2)
    assert "".join(calls) == "ab" + "abab"  # once to warm up
    assert all(len(values) == 2 and min(values) > 0 for values in rates.values())
    found = ratios({"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 12.0]}, "a")["b"]
    assert (found.median, found.low, found.high) == (2.0, 1.0, 3.0)


def test_both_losses_are_the_same_number() -> None:
    logits, probs = torch.randn(5, 3, 17), torch.randn(2, 3, 17).softmax(dim=-1)
    torch.testing.assert_close(pairwise_loss(logits, probs), dino_loss(logits, probs))


def test_the_loss_without_pairs_needs_less_memory() -> None:
    peaks = {
        kind: peak_of(
            head_and_loss(kind, batch=64, num_local_crops=8, num_prototypes=8192, device="cpu"), torch.device("cpu")
        )
        for kind in ("pairwise", "ssl_vit")
    }
    assert peaks["ssl_vit"] < 0.5 * peaks["pairwise"]


def test_loader_rates_are_of_each_pipeline_of_an_objective(photo_folder: Path) -> None:
    result = compare_loader(str(photo_folder), num_images=3, batch_size=2, rounds=1, num_local_crops=1)
    own = ("crops alone", "whole, colours on cpu")
    kinds = ("paper (Pillow)", *own, *(f"{kind}, cache" for kind in own))
    assert list(result["rates"]) == [f"{name}: {kind}" for name in ("MAE", "DINO") for kind in kinds]
    assert result["ratios"]["MAE: paper (Pillow)"]["median"] == result["ratios"]["DINO: paper (Pillow)"]["median"] == 1
    assert len(pillow_views(8)) == 10
    assert pillow_mae()(Image.new("RGB", (300, 260))).shape == (3, 224, 224)


def test_a_training_step_is_measured_with_both_kinds_of_attention() -> None:
    config, _ = parse_run(DEFAULTS, [*SMALL_DINO, "--data.source=x", "--steps=10"]).resolve(100)
    result = compare_attention(config, steps=1, rounds=1)
    assert set(result["rates"]) == {"fused attention", "plain attention"}
    assert "training step of DINO" in result["what"]


@pytest.mark.parametrize("name", ["empty", pytest.param("nowhere", marks=pytest.mark.slow)])
def test_a_folder_without_images_ends_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    words = [sys.executable, "scripts/benchmark.py", "loader", "--data", str(tmp_path / name)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: --data={tmp_path / name}: holds no .jpg or .png file"


def test_the_script_prints_a_table_and_writes_json(photo_folder: Path, tmp_path: Path) -> None:
    words = [sys.executable, "scripts/benchmark.py", "--rounds=1", f"--json={tmp_path / 'r.json'}"]
    words += ["loader", f"--data={photo_folder}", "--num_images=2", "--num_local_crops=1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "crops alone" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["machine"]["torch"] == torch.__version__
