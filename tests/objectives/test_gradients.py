"""Every parameter gets its gradient, also where activations are computed again."""

import pytest
import torch

from ssl_vit.objectives.objective import Objective
from ssl_vit.training.config import RunConfig, parse_run
from ssl_vit.training.device.memory import saved_for_backward
from ssl_vit.training.step import prepare_step
from tests.conftest import OBJECTIVES
from tests.families import FAMILIES, flags_of

CPU = torch.device("cpu")


def build(name: str, *flags: str, grad_checkpointing: bool = False) -> tuple[RunConfig, Objective]:
    defaults, small = OBJECTIVES[name]
    flags = (*flags, "--steps=4", "--encoder.drop_path_rate=0.5", f"--encoder.grad_checkpointing={grad_checkpointing}")
    config, _ = parse_run(defaults, [*small, *flags]).resolve(40)
    return config, config.build_objective().train()


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        *(("mae", []), ("dino", []), ("dinov2", []), ("dinov2", ["--objective.ibot_separate_head=true"])),
        *(("simdino", []), ("simdinov2", []), ("simdinov2", ["--objective.ibot_separate_head=true"])),
    ],
)
def test_no_trainable_parameter_goes_without_a_gradient(name: str, flags: list[str]) -> None:
    """DDP would wait for one in vain, so that `find_unused_parameters` stays off."""
    config, objective = build(name, *flags, "--encoder.drop_path_rate=0")
    prepare_step(config, objective, 4, CPU).forward_backward()
    named = {key: value for key, value in objective.named_parameters() if value.requires_grad}
    assert [key for key, value in named.items() if value.grad is None] == []


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["mae", "dino", "dinov2", "simdinov2"])
def test_checkpointed_activations_change_no_gradient_and_keep_less(name: str, precision: str) -> None:
    """With drop path, whose draws must be the same both times."""
    compare_with_checkpointed(name, f"--precision={precision}")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "convnext, overlapping stem"])
def test_checkpointed_activations_of_every_family(family: str) -> None:
    """A CNN that is only a stem, as this hybrid's, has no blocks to compute again."""
    compare_with_checkpointed("dino", *flags_of("dino", family), most=1.0 if family == "hybrid" else 0.7)


def compare_with_checkpointed(name: str, *flags: str, most: float = 0.7) -> None:
    found = []
    for again in (False, True):
        config, objective = build(name, *flags, grad_checkpointing=again)
        step = prepare_step(config, objective, 4, CPU)
        torch.manual_seed(1)
        kept = saved_for_backward(objective, step.forward_backward)
        grads = {key: value.grad for key, value in objective.named_parameters() if value.requires_grad}
        found.append((kept, grads))
    (kept, grads), (kept_again, grads_again) = found
    assert kept_again < most * kept
    for key, value in grads.items():
        assert value is not None
        assert torch.equal(value, grads_again[key]), key
