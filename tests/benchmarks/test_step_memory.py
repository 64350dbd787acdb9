"""Memory of whole steps: its parts, and that the straight line between small batches leads to a larger one."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.step_memory import _peak, as_lines, measure_step_memory, memory_table
from ssl_vit.training.config import RunConfig, parse_run
from tests.conftest import OBJECTIVES, ROOT

CPU = torch.device("cpu")


def config_of(objective: str) -> RunConfig:
    defaults, small = OBJECTIVES[objective]
    return parse_run(defaults, [*small, "--data.source=x", "--steps=9"]).resolve(100)[0]


@pytest.mark.parametrize("objective", ["mae", "dino"])
def test_what_is_extrapolated_is_what_a_larger_batch_takes(objective: str) -> None:
    config = config_of(objective)
    found = measure_step_memory(config, 16, CPU)
    assert found["measured_at"] == [2, 4]
    assert found["rest"] == pytest.approx(_peak(config, 16, CPU), rel=0.05)
    learns = sum(p.numel() for p in config.build_objective().parameters() if p.requires_grad)
    assert found["held"] >= 4 * 4 * learns / 2**20


def test_checkpointing_leaves_what_is_held_and_saves_the_rest() -> None:
    config = config_of("mae")
    deep = replace(config, encoder=replace(config.encoder, depth=8))
    result = memory_table({"deep": deep}, 32)
    plain, saving = result["step_memory"]
    assert (plain["grad_checkpointing"], saving["grad_checkpointing"]) == (False, True)
    assert plain["held"] == saving["held"]
    assert saving["rest"] < 0.7 * plain["rest"]
    assert as_lines(result)[-1].endswith("measured at batches 2 and 4 and extrapolated to 32 on a straight line.")


def test_a_batch_that_does_not_fit_is_said_to() -> None:
    with (
        mock.patch("benchmarks.step_memory._peak_on_cuda", side_effect=torch.OutOfMemoryError),
        mock.patch("torch.cuda.empty_cache"),
    ):
        found = measure_step_memory(config_of("mae"), 64, torch.device("cuda"))
    assert found["rest"] is None
    row = {"name": "large", "grad_checkpointing": False, **found}
    lines = as_lines({"step_memory": [row], "batch": 64, "extrapolated": False})
    assert lines[1].endswith("does not fit at batch 64")


@pytest.mark.slow
def test_the_script_prints_the_table(tmp_path: Path) -> None:
    words = [sys.executable, "scripts/benchmark.py", f"--json={tmp_path / 'r.json'}", "memory", "--steps", "--batch=8"]
    words += ["--archs", "vit_tiny_patch16_224", "--num_prototypes=64", "--num_local_crops=1"]
    words += ["--encoder.depth=1", "--encoder.embed_dim=32", "--encoder.num_heads=2", "--data.source=x"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads((tmp_path / "r.json").read_text())["step_memory"]
    assert [row["name"] for row in rows] == ["mae vit_tiny_patch16_224"] * 2 + ["dino vit_tiny_patch16_224"] * 2
    assert "checkpointing" in done.stdout
