"""The measured step and its workers; no test looks at a rate."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from scripts.pretrain_dino import DEFAULTS as DINO_DEFAULTS
from scripts.pretrain_mae import DEFAULTS as MAE_DEFAULTS
from ssl_vit.doctor import cost
from ssl_vit.doctor.cost import measure_step, pace
from ssl_vit.training.config import parse_run
from tests.conftest import SMALL_DINO, SMALL_RUN


@pytest.mark.parametrize(("defaults", "settings"), [(MAE_DEFAULTS, SMALL_RUN), (DINO_DEFAULTS, SMALL_DINO)])
def test_a_step_is_measured(defaults: Any, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_vit.doctor.cost._SECONDS", 0.0)
    config, _ = parse_run(defaults, [*settings, "--data.source=x", "--steps=10"]).resolve(100)
    cost = measure_step(config, torch.device("cpu"))
    assert cost.num_images == 8
    assert cost.activations > 0
    assert cost.rate > 0


def test_the_step_of_a_run_that_goes_on_is_measured_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_vit.doctor.cost._SECONDS", 0.0)
    fresh, _ = parse_run(DINO_DEFAULTS, [*SMALL_DINO, "--data.source=x", "--steps=10"]).resolve(100)
    config = replace(
        fresh,
        encoder=replace(fresh.encoder, pretrained="weights.safetensors"),
        optim=replace(fresh.optim, freeze_backbone_until=0.9),
        objective=replace(fresh.objective, anchor="gram"),
    )
    frozen = measure_step(config, torch.device("cpu"))
    assert frozen.activations > measure_step(fresh, torch.device("cpu")).activations  # of the anchor


def test_a_micro_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_SECONDS", 0.0)
    prepare, tried = cost.prepare_step, []

    def prepare_if_it_fits(config: Any, objective: Any, num_images: int, device: torch.device) -> Any:
        tried.append(num_images)
        if num_images > 2:
            raise torch.OutOfMemoryError
        return prepare(config, objective, num_images, device)

    monkeypatch.setattr(cost, "prepare_step", prepare_if_it_fits)
    config = parse_run(MAE_DEFAULTS, [*SMALL_RUN, "--data.source=x", "--steps=10"])
    assert cost.measure_step(config, torch.device("cpu")).num_images == 2
    assert tried == [8, 4, 2]


def test_workers_keep_up_as_far_as_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_vit.doctor.cost.num_cpus", lambda: 8)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert pace(900.0, 200.0, cuda) == (5, 900.0)
    assert pace(9000.0, 200.0, cuda) == (7, 1400.0)
    assert pace(300.0, 600.0, cpu) == (0, pytest.approx(200.0))
