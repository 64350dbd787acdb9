"""Runs and exports that version 0.1.0 wrote before the package was laid out anew: they go on, load and score alike.

golden/former/NAME holds a run of 20 steps, without its last checkpoint: `last_weights.safetensors` is what that held.
"""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ssl_vit.export import load_backbone
from ssl_vit.runs.trained import open_trained
from ssl_vit.training import supervised
from ssl_vit.training.config import parse_run
from ssl_vit.training.loop import set_up, train
from tests.conftest import GOLDEN, last_weights, loss_tolerance, losses

RUNS = GOLDEN / "former"
SCRIPTS = {"mae": "pretrain_mae", "dino": "pretrain_dino", "finetune": "finetune"}


@pytest.mark.usefixtures("_fresh_state")
@pytest.mark.parametrize("name", list(SCRIPTS))
def test_a_former_run_goes_on_to_the_same_weights_and_scores(name: str, photo_folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    run, photos = tmp_path / name, tmp_path / "photos"
    shutil.copytree(RUNS / name, run)
    photos.symlink_to(photo_folder)
    for file in ("results.json", *(path.name for path in run.glob("*.safetensors"))):
        (run / file).unlink()
    flags = [f"--config={run / 'config.yaml'}", f"--output_dir={run}", f"--data.source={photos}"]
    if name == "finetune":
        flags.append(f"--encoder.pretrained={RUNS / 'mae'}")
    defaults = importlib.import_module(f"scripts.{SCRIPTS[name]}").DEFAULTS
    ending = [supervised] if name == "finetune" else []
    assert train(set_up(parse_run(defaults, flags), *ending)) == 0

    assert losses(run) == pytest.approx(losses(RUNS / name), rel=loss_tolerance())
    expected = load_file(RUNS / name / "last_weights.safetensors")
    found = last_weights(run)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6 if loss_tolerance() < 1e-5 else 1e-3)
    scores, before = (json.loads((folder / "results.json").read_text())["scores"] for folder in (run, RUNS / name))
    assert scores == before


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_a_former_export_is_what_its_run_trained(name: str) -> None:
    """The backbone that was written loads, and is the one that a run's last checkpoint holds."""
    encoder = load_backbone(RUNS / name / "backbone.safetensors")
    weights = load_file(RUNS / name / "last_weights.safetensors")
    prefix = "encoder." if name == "mae" else "teacher_encoder."
    trained = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    assert encoder.state_dict().keys() == trained.keys()
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, trained[key]), key


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_a_former_checkpoint_can_be_exported(name: str) -> None:
    trained = open_trained(RUNS / name)
    assert trained.provenance["objective"] == {"mae": "MAE", "dino": "DINO"}[name]
    assert trained.provenance["steps"] == 10


@pytest.mark.parametrize(("name", "pooled"), [("mae", "mean"), ("dino", "cls")])
def test_the_feature_of_a_former_run_and_export_follows_from_its_objective(name: str, pooled: str) -> None:
    assert open_trained(RUNS / name).pooled == pooled
    assert open_trained(RUNS / name / "backbone.safetensors").pooled == pooled
