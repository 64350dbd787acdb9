import dataclasses
import math
import re
from typing import Any

import pytest
import torch

from scripts import pretrain_dino, pretrain_dinov2
from ssl_vit.core.settings import as_plain
from ssl_vit.objectives.collapse import RECIPE_LR, PrototypeUse, causes, diagnose, feature_std, rankme
from ssl_vit.training.config import RunConfig, parse_run
from tests.conftest import ROOT, SMALL_DINO

DINO, DINOV2 = pretrain_dino.DEFAULTS, pretrain_dinov2.DEFAULTS
HEALTHY = {"teacher_entropy": 2.0, "kl": 0.5, "feature_std": 0.6, "prototypes_used": 0.4}
ONLY = {"num_prototypes": 512}
COLLAPSED = [
    ({"teacher_entropy": 0.999 * math.log(512), "kl": 0.001}, "stands at ln K = 6.24.*teacher_temp"),
    ({"feature_std": 0.01}, "nearly the same features.*ema_momentum"),
    ({"teacher_entropy": 0.01, "kl": 0.02, "prototypes_used": 0.01}, "same few prototypes.*teacher_temp"),
]


def test_spread_is_one_for_directions_everywhere_and_zero_for_one() -> None:
    assert feature_std(torch.randn(4096, 16)).item() == pytest.approx(1.0, abs=0.02)
    assert feature_std(torch.randn(1, 16).repeat(8, 1)).item() == pytest.approx(0.0, abs=1e-6)


def test_rankme_counts_dimensions() -> None:
    orthogonal, _ = torch.linalg.qr(torch.randn(64, 8))
    assert rankme(orthogonal).item() == pytest.approx(8, rel=1e-3)
    assert rankme(torch.randn(32, 1) @ torch.randn(1, 8)).item() == pytest.approx(1, rel=1e-2)


def test_features_that_are_not_finite_do_not_stop_it() -> None:
    assert rankme(torch.full((4, 8), float("nan"))).isfinite()


def test_prototypes_in_use_are_counted_over_an_interval() -> None:
    use = PrototypeUse()
    use.note(torch.eye(8)[[0, 1]])
    use.note(torch.eye(8)[[1, 1]])
    assert use.read().item() == pytest.approx(2 / 4)  # four samples could have used four
    use.note(torch.eye(8)[[0] * 20])
    assert use.read().item() == pytest.approx(1 / 8)  # twenty could have used all eight


def test_a_healthy_run_has_no_diagnosis() -> None:
    assert diagnose(HEALTHY, ONLY) is None


@pytest.mark.parametrize(("values", "words"), COLLAPSED)
def test_each_way_to_collapse_is_told_apart(values: dict[str, float], words: str) -> None:
    diagnosis = diagnose({**HEALTHY, **values}, ONLY)
    assert diagnosis is not None
    assert re.search(words, diagnosis)


SPOILED = [
    (["--objective.ema_momentum=0"], "objective.ema_momentum 0 makes the teacher a copy"),
    (["--objective.ema_momentum=0.5", "--optim.base_lr=0.01", "--batch.size=8"], "objective.ema_momentum 0.5"),
    (["--objective.ema_momentum_end=0.5"], "objective.ema_momentum_end 0.5 makes"),
    (["--optim.base_lr=0.01"], "optim.base_lr 0.01 is 20 times the recipe's 0.0005"),
    (["--optim.base_lr=0.012", "--batch.size=16"], "optim.base_lr 0.012 is 24 times"),
    (["--objective.centering=none"], "objective.centering none leaves"),
    (["--objective.center_momentum=1"], "objective.center_momentum 1 leaves"),
    (["--objective.teacher_temp=0.01"], "objective.teacher_temp 0.01 is too low"),
    (["--objective.num_prototypes=65536"], "objective.num_prototypes 65,536 are many for 20,000 images"),
    (["--optim.weight_decay_end=4"], "optim.weight_decay 4 is above 1"),
    (["--optim.warmup=0"], "optim.warmup 0 starts"),
    (["--batch.size=16"], "batch.size 16 is small"),
]


def settings(defaults: RunConfig, *flags: str) -> dict[str, Any]:
    config, _ = parse_run(defaults, ["--data.source=x", *flags]).resolve(20_000)
    return {**as_plain(config), "num_images": 20_000}


@pytest.mark.parametrize(("flags", "words"), SPOILED)
def test_the_settings_that_explain_a_collapse_are_named_first(flags: list[str], words: str) -> None:
    spoiled = settings(DINO, *flags)
    diagnosis = diagnose({**HEALTHY, "feature_std": 0.01}, spoiled["objective"], spoiled)
    assert diagnosis is not None
    assert re.match(rf"All images get nearly the same features \(spread 0.010 of 1\). {re.escape(words)}", diagnosis)
    assert "Else try" in diagnosis


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--objective.teacher_temp=0.2"], "teacher_temp 0.2 is too high"),
        (["--objective.teacher_temp=0.06", "--objective.teacher_temp_warmup=0"], "teacher_temp_warmup 0 starts at"),
    ],
)
def test_a_blunt_teacher_explains_that_all_prototypes_are_alike(flags: list[str], words: str) -> None:
    assert words in causes(settings(DINO, *flags), is_uniform=True)[0]
    assert causes(settings(DINO, *flags), is_uniform=False) == []


@pytest.mark.parametrize("defaults", [DINO, DINOV2])
@pytest.mark.parametrize("is_uniform", [True, False])
def test_the_recipes_explain_no_collapse(defaults: RunConfig, is_uniform: bool) -> None:
    assert causes(settings(defaults), is_uniform=is_uniform) == []
    assert RECIPE_LR[defaults.optim.lr_scaling] == defaults.optim.base_lr
    assert causes({}, is_uniform=is_uniform) == []


@pytest.mark.parametrize("batch", [64, 128, 1024])
@pytest.mark.parametrize("defaults", [DINO, DINOV2])
def test_nor_do_the_optimizer_and_rate_of_auto(defaults: RunConfig, batch: int) -> None:
    chosen = settings(defaults, "--optim.optimizer=auto", "--optim.base_lr=auto", f"--batch.size={batch}")
    assert chosen["optim"]["optimizer"] == "muon"
    assert causes(chosen, is_uniform=False) == []


@pytest.mark.parametrize("name", ["dino_vits16_imagenet1k", "dino_vitb16_imagenet1k", "dinov2_vitl16_imagenet1k"])
def test_nor_do_the_configs(name: str) -> None:
    defaults = DINOV2 if name.startswith("dinov2") else DINO
    config, _ = parse_run(defaults, [f"--config={ROOT / 'configs' / name}.yaml"]).resolve(1_281_167)
    for is_uniform in (True, False):
        assert causes({**as_plain(config), "num_images": 1_281_167}, is_uniform=is_uniform) == []


def test_an_objective_knows_its_own_settings() -> None:
    config, _ = parse_run(DINO, [*SMALL_DINO, "--data.source=x", "--steps=9"]).resolve(100)
    spoiled = dataclasses.replace(config.objective, ema_momentum=0.0)
    objective = dataclasses.replace(config, objective=spoiled).build_objective()
    assert "objective.ema_momentum 0 " in str(objective.diagnose({**HEALTHY, "feature_std": 0.0}))


def test_the_docs_name_the_same_settings() -> None:
    section = (
        (ROOT / "docs" / "when_it_goes_wrong.md").read_text().partition("## If it collapses")[2].partition("\n## ")[0]
    )
    said = [text for _, text in SPOILED] + [str(diagnose({**HEALTHY, **values}, ONLY)) for values, _ in COLLAPSED]
    named = set(re.findall(r"(?:objective|optim)\.\w+", " ".join(said)))
    more = {"objective.teacher_temp_warmup"}
    assert named | more == set(re.findall(r"`((?:objective|optim)\.\w+)`", section))
