"""A real run is measured: its own rates and waits, and nothing of it stays."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.end_to_end import as_lines, compare_end_to_end
from ssl_vit.training.config import parse_run
from tests.conftest import OBJECTIVES, ROOT, SMALL_RUN


@pytest.mark.usefixtures("_fresh_state")
def test_each_arch_runs_with_and_without_cache_and_leaves_nothing(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    defaults, small = OBJECTIVES["mae"]
    config = parse_run(defaults, [*small, f"--data.source={photo_folder}", "--batch.per_device=4", "--epochs=1"])
    archs = ["vit_tiny_patch16_224", "vit_small_patch16_224"]
    result = compare_end_to_end(config, archs=archs, cache=True, steps=2, rounds=3)
    assert list(result["runs"]) == [name for arch in archs for name in (arch, f"{arch}, cache")]
    for run in result["runs"].values():
        assert len(run["rates"]) == len(run["ready_rates"]) == 3
        assert 0 < run["data_wait"] < 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    for wait, run in zip((0.05, 0.2, 0.09, 0.3), result["runs"].values(), strict=True):
        run["data_wait"] = wait
        run["rate"] = 100 * wait
    result["fastest_fed"] = archs[1]
    assert as_lines(result)[-1] == f"highest rate that waits less than 10% of the time: 9.0 images/s ({archs[1]})"


@pytest.mark.slow
def test_the_script_measures_a_run(photo_folder: Path, tmp_path: Path) -> None:
    words = [sys.executable, "scripts/benchmark.py", "--rounds=1", f"--json={tmp_path / 'r.json'}", "end_to_end", "mae"]
    words += [f"--data={photo_folder}", "--steps_per_round=1", *SMALL_RUN]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["runs"]["vit_tiny_patch16_224"]["num_workers"] == 0
    assert "images ready" in done.stdout
