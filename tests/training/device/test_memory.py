from dataclasses import replace

import pytest

from scripts.pretrain_dino import DEFAULTS
from ssl_vit.training.config import parse_run
from ssl_vit.training.device.memory import build_on_meta, model_memory
from tests.conftest import SMALL_DINO


def test_memory_is_that_of_the_built_model() -> None:
    config, _ = parse_run(DEFAULTS, [*SMALL_DINO, "--data.source=x", "--steps=10"]).resolve(100)
    memory, built = model_memory(build_on_meta(config), config.optim), config.build_objective()
    held = sum(parameter.numel() for parameter in built.parameters())
    learns = sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)
    teacher = [built.teacher_encoder, built.teacher_head]
    assert memory.parameters * 2**20 == 4 * held
    assert memory.gradients * 2**20 == 4 * learns
    assert memory.optimizer == 2 * memory.gradients
    assert memory.total == memory.parameters + 3 * memory.gradients
    assert memory.teacher * 2**20 == 4 * sum(p.numel() for module in teacher for p in module.parameters())


def test_muon_holds_one_moment_of_each_matrix_of_a_block() -> None:
    config, _ = parse_run(DEFAULTS, [*SMALL_DINO, "--data.source=x", "--steps=10"]).resolve(100)
    objective = build_on_meta(config)
    memory = model_memory(objective, replace(config.optim, optimizer="muon"))
    blocks = objective.encoder.vit.blocks
    matrices = sum(parameter.nbytes for parameter in blocks.parameters() if parameter.ndim == 2)
    assert memory.optimizer == pytest.approx(2 * memory.gradients - matrices / 2**20)
    assert memory.total == pytest.approx(memory.parameters + memory.gradients + memory.optimizer)
