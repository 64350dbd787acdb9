"""Frozen models: outside of the objective that holds them, and the same ones when a run goes on."""

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ssl_vit.models.config import EncoderConfig
from ssl_vit.objectives.frozen import Frozen, check_frozen, hashes
from ssl_vit.objectives.objective import Objective
from ssl_vit.runs.checkpoint import load_checkpoint, save_checkpoint
from ssl_vit.training.continuing import open_run_folder
from ssl_vit.training.device.memory import model_memory
from ssl_vit.training.optim import OptimConfig, build_optimizer
from tests.conftest import TINY
from tests.training.test_continuing import config


class Learner(Objective):
    """A linear student of a frozen model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder = EncoderConfig(image_size=16, **TINY).build()
        self.frozen = (Frozen(model, "teacher", "objective.teacher='x'"),)

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        images = batch["images"]
        wanted = self.frozen[0](images)
        return {"loss": (self.encoder(images).cls.mean() - wanted.mean()).square()}


def classifier() -> nn.Module:
    """A convolutional teacher with BatchNorm and dropout, which differ between training and evaluation."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(5)
    )


def test_it_is_outside_of_parameters_state_optimizer_and_modules() -> None:
    model = classifier()
    model(torch.zeros(2, 3, 16, 16))
    learner = Learner(model)
    encoder = EncoderConfig(image_size=16, **TINY).build()
    assert {name.removeprefix("encoder.") for name in learner.state_dict()} == set(encoder.state_dict())
    assert {name.removeprefix("encoder.") for name, _ in learner.named_parameters()} == {
        name for name, _ in encoder.named_parameters()
    }
    assert not any(isinstance(module, nn.BatchNorm2d) for module in learner.modules())
    optimizer = build_optimizer(learner, OptimConfig())
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert not known & {id(parameter) for parameter in model.parameters()}
    held = model_memory(learner, OptimConfig())
    assert held.teacher == pytest.approx(sum(parameter.nbytes for parameter in model.parameters()) / 2**20)
    assert held.gradients == pytest.approx(held.parameters - held.teacher)


def test_it_stays_in_eval_mode_without_gradients_and_unchanged_by_a_step() -> None:
    model = classifier()
    model(torch.randn(2, 3, 16, 16))
    learner = Learner(model)
    before, expected = copy.deepcopy(model.state_dict()), learner.frozen[0].sha256
    images = torch.randn(4, 3, 16, 16)
    for _ in range(2):
        learner.train()
        found = learner.frozen[0](images)
        assert not found.requires_grad
        assert torch.equal(found, learner.frozen[0](images))  # no dropout, no statistics of the batch
        learner({"images": images}, 0.5)["loss"].backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert Frozen(model, "teacher", "").sha256 == expected


def test_the_hash_follows_from_every_parameter_and_buffer() -> None:
    found = set()
    for change in (None, "0.weight", "1.running_var", "1.num_batches_tracked"):
        model = classifier()
        model(torch.zeros(2, 3, 16, 16))
        if change is not None:
            model.state_dict()[change].add_(1)
        found.add(Frozen(model, "teacher", "").sha256)
    assert len(found) == 4
    half = nn.Linear(2, 2, dtype=torch.bfloat16)
    assert Frozen(half, "teacher", "").sha256 != Frozen(copy.deepcopy(half).float(), "teacher", "").sha256


def test_a_changed_missing_or_added_one_is_refused() -> None:
    models = (Frozen(nn.Linear(2, 2), "teacher", "objective.teacher='a.safetensors'"),)
    noted = hashes(models)
    check_frozen(models, noted, "step-1")
    check_frozen((), {}, "step-1")
    with pytest.raises(ValueError, match=r"^objective.teacher='a.safetensors': the teacher's weights are not those "):
        check_frozen(models, {"teacher": "0" * 64}, "step-1")
    with pytest.raises(ValueError, match=r"^objective.teacher='a.safetensors': step-1 was trained without a teacher"):
        check_frozen(models, {}, "step-1")
    with pytest.raises(ValueError, match=r"^step-1: was trained with a teacher, and the settings name none"):
        check_frozen((), noted, "step-1")


def test_a_run_goes_on_with_the_same_weights_alone_and_keeps_its_settings(tmp_path: Path) -> None:
    run = tmp_path / "run"
    models = (Frozen(nn.Linear(2, 2), "teacher", "objective.teacher='a'"),)
    others = (Frozen(nn.Linear(2, 2), "teacher", "objective.teacher='b'"),)
    settings = config(run)
    open_run_folder(settings, frozen=models)
    open_run_folder(settings, frozen=others)  # nothing was trained yet
    learner = Learner(nn.Linear(2, 2))
    optimizer = build_optimizer(learner, OptimConfig())
    save_checkpoint(run, 1, learner, optimizer, {"frozen": hashes(models)})
    written = (run / "config.yaml").read_bytes()
    changed = config(run, log_every=7)
    with pytest.raises(ValueError, match=r"^objective.teacher='b': .*step-00000001 was trained with"):
        open_run_folder(changed, frozen=others)
    assert (run / "config.yaml").read_bytes() == written
    _, checkpoint = open_run_folder(changed, frozen=models)
    assert checkpoint is not None
    assert load_checkpoint(checkpoint, learner, optimizer)["frozen"] == hashes(models)
