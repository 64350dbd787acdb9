"""Cost against what a run grows by: what is measured, and the line it is compared with. No test looks at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import scaling
from benchmarks.scaling import Series, as_lines, as_result, draw, through_ends, through_origin
from ssl_vit.data.config import DataConfig
from ssl_vit.data.sources.source import open_source
from ssl_vit.training.config import RunConfig, parse_run
from tests.conftest import OBJECTIVES, ROOT, SMALL_RUN


def config_of(objective: str, *flags: str) -> RunConfig:
    defaults, small = OBJECTIVES[objective]
    return parse_run(defaults, [*small, "--data.source=x", "--steps=9", *flags]).resolve(100)[0]


def test_lines_of_proportional_cost() -> None:
    assert through_origin([1, 2, 4], [5, 6, 7], 1) == [3, 6, 12]
    assert through_ends([0, 2, 4], [1, 9, 5]) == [1, 3, 5]


def test_each_axis_is_a_series_about_the_base() -> None:
    size = scaling.scale_image_size(config_of("mae"), 1, 1)
    assert size.more == [16, 32, 48, 64, 96, 128]
    assert size.x == [4, 16, 36, 64, 144, 256]
    batch = scaling.scale_batch(config_of("mae"), 1, 1)
    assert batch.x == [2, 4, 8, 16, 32]
    crops = scaling.scale_local_crops(config_of("dino"), 1, 1)
    assert crops.x == [0, 2, 4, 8]
    for series, base in ((size, 1), (batch, 2), (crops, 0)):
        assert min(series.y) > 0
        assert series.line[base] == pytest.approx(series.y[base])
    with pytest.raises(ValueError, match=r"--axes local_crops: this objective takes none"):
        scaling.scale_local_crops(config_of("mae"), 1, 1)


def test_data_of_each_size_is_opened_and_read(tmp_path: Path) -> None:
    scaling.write_images(tmp_path / "images.parquet", 11)
    assert len(open_source(DataConfig(source=str(tmp_path / "images.parquet")))) == 11
    series = scaling.scale_data(config_of("mae"), rows=(20, 200), batches=2)
    assert series.x == [20, 200]
    assert [found["rows"] for found in series.more] == [20, 200]
    assert all(min(found["first_seconds"], found["again_seconds"]) > 0 for found in series.more)


@pytest.mark.parametrize("name", ["curve.png", "curve.webp"])
def test_there_is_a_panel_for_each_axis(tmp_path: Path, name: str) -> None:
    one = Series("batch", "images of a step", "ms a step", [1, 2, 4], [3, 4, 9], [2, 4, 8])
    two = Series("data", "rows", "s", [10, 100], [1, 2], [0.2, 2], is_logarithmic=True, more=[])
    result = as_result(config_of("mae"), [one, two])
    draw(result, tmp_path / name)
    with Image.open(tmp_path / name) as figure:
        assert figure.width > 1.8 * figure.height
    assert len(as_lines(result)) == 2 + 3 + 2


@pytest.mark.slow
def test_two_processes_do_the_work_of_one(tmp_path: Path) -> None:
    words = [sys.executable, "scripts/benchmark.py", f"--json={tmp_path / 'r.json'}", "scaling", "mae"]
    words += ["--axes", "processes", "--process_steps=2", "--rounds=2", f"--plot={tmp_path / 'curve.png'}", *SMALL_RUN]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    (series,) = json.loads((tmp_path / "r.json").read_text())["series"]
    for found in series["more"].values():
        assert [one["images"] for one in found["rounds"]] == [16, 16]
        assert min(one["cpu_seconds"] for one in found["rounds"]) > 0
    assert series["more"]["1"]["extra_cpu"] == 0
    assert "2 processes:" in done.stdout
    assert (tmp_path / "curve.png").exists()


@pytest.mark.slow
def test_a_run_that_fails_in_its_processes_says_why() -> None:
    words = [sys.executable, "scripts/benchmark.py", "scaling", "mae", "--axes", "processes", "--process_steps=2"]
    words += [*SMALL_RUN, "--process_counts", "3"]  # no part of the batch
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: a run in 3 processes failed: ")
    assert "batch.size" in done.stderr
