"""Losses of 20 steps of each objective are those that are committed: no change of structure changes what is learned.

`pytest -n 0 tests/test_golden_losses.py --write-golden` writes golden/losses.json anew, for a change that means to.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import GOLDEN, loss_tolerance, losses, machine

FILE = GOLDEN / "losses.json"
BLUR = "--objective.blur_sigma=[0.1,2.0]"
FLAGS = {
    "mae": [],
    "dino": ["--objective.num_prototypes=64", BLUR],
    "dinov2": ["--objective.num_prototypes=64", "--batch.per_device=4", BLUR],
    "simdino": [BLUR],
    "simdinov2": [BLUR],
}


@pytest.mark.parametrize("objective", FLAGS)
def test_losses_of_twenty_steps(
    start: Callable[..., int], tmp_path: Path, request: pytest.FixtureRequest, objective: str
) -> None:
    torch.set_num_threads(1)
    assert start(*FLAGS[objective], objective=objective, steps=20) == 0
    found = losses(tmp_path / "run")
    if request.config.getoption("--write-golden"):
        written = json.loads(FILE.read_text())
        machines = {**written["machines"], objective: machine()}
        FILE.write_text(json.dumps({**written, objective: found, "machines": machines}, indent=1) + "\n")
    assert found == pytest.approx(json.loads(FILE.read_text())[objective], rel=loss_tolerance(objective))
