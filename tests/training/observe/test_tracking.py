"""Trackers, each written offline and read back by its own library."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image

from ssl_vit.training.observe.tracking import Tracker, check_tracker, start_tracker

SETTINGS = {"seed": 0, "optim": {"base_lr": 0.1, "betas": [0.9, 0.95]}, "data": {"split": None}}
RECORDS = [
    {"step": 1, "loss": 2.0, "grad_norm": None, "lr": 0.1},
    {"step": 2, "loss": 1.5, "grad_norm": 0.3, "lr": 0.2},
    {"step": 2, "eval_knn": 0.25},
]


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState()
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY", "TRACKIO_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def figure(tmp_path: Path) -> Path:
    path = tmp_path / "step-00000002.webp"
    Image.fromarray(np.full((8, 12, 3), 200, dtype=np.uint8)).save(path, lossless=True)
    return path


def track(name: Any, folder: Path, figure: Path, start_step: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    tracker = start_tracker(name, folder, SETTINGS, start_step, is_writer=True)
    assert isinstance(tracker, Tracker)
    for record in RECORDS:
        tracker.log({**record, "step": record["step"] + start_step})
    tracker.figure(figure, 2 + start_step)
    tracker.finish()


def test_tensorboard_reads_the_same_numbers_and_figures(tmp_path: Path, figure: Path) -> None:
    pytest.importorskip("tensorboard", reason='pip install "ssl-vit[tensorboard]"')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    track("tensorboard", run, figure)
    track("tensorboard", run, figure, start_step=1)  # killed after step 1 was saved: step 2 is done again
    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 2.0), (2, 2.0), (3, 1.5)]
    assert [(event.step, pytest.approx(event.value)) for event in read.Scalars("grad_norm")] == [(3, 0.3)]
    assert {"loss", "lr", "grad_norm", "eval_knn"} == set(read.Tags()["scalars"])
    assert [(image.step, image.width, image.height) for image in read.Images("pictures")] == [(3, 12, 8)]


@pytest.mark.filterwarnings("ignore")  # those of the package itself
def test_mlflow_keeps_numbers_settings_and_figures_in_the_folder(tmp_path: Path, figure: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason='pip install "ssl-vit[mlflow]"')
    run = tmp_path / "run"
    track("mlflow", run, figure)
    track("mlflow", run, figure, start_step=1)
    client = mlflow.MlflowClient(f"sqlite:///{run.resolve() / 'mlflow' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'ssl_vit'")
    (found,) = client.search_runs([experiment.experiment_id])  # the one that was begun goes on
    assert found.data.params["optim.base_lr"] == "0.1"
    assert found.data.metrics["loss"] == 1.5
    assert [file.path for file in client.list_artifacts(found.info.run_id, "pictures")] == [f"pictures/{figure.name}"]
    mlflow.set_tracking_uri(None)


@pytest.mark.filterwarnings("ignore")  # those of the package itself
def test_wandb_is_offline_and_writes_into_the_folder(tmp_path: Path, figure: Path) -> None:
    pytest.importorskip("wandb", reason='pip install "ssl-vit[wandb]"')
    run = tmp_path / "run"
    track("wandb", run, figure)
    (offline,) = (run / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))
    assert len(list((offline / "files" / "media" / "images").rglob("*.png"))) == 1


@pytest.mark.filterwarnings("ignore")  # those of the package itself
def test_trackio_keeps_its_numbers_in_the_folder(tmp_path: Path, figure: Path) -> None:
    if find_spec("trackio") is None:  # not imported yet: it reads where to write as it is
        pytest.skip('pip install "ssl-vit[trackio]"')
    run = tmp_path / "run"
    track("trackio", run, figure)
    assert [path for path in (run / "trackio").rglob("*") if path.is_file()]


def test_other_processes_and_runs_without_a_tracker_have_none(tmp_path: Path) -> None:
    assert start_tracker("tensorboard", tmp_path, SETTINGS, 0, is_writer=False) is None
    assert start_tracker("none", tmp_path, SETTINGS, 0, is_writer=True) is None
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tracker("none")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("ssl_vit.training.observe.tracking.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"""tracking='wandb': its package is missing: pip install "ssl-vit\[wandb\]"""
    ):
        check_tracker("wandb")
