"""Steps that are compared are the same work: as many parameters, as many operations, the same kind of attention."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.peers import PEERS, lightly_dino
from benchmarks.step import compare_steps, count_flops, own_step
from ssl_vit.models.vit import ViT
from ssl_vit.training.config import RunConfig, parse_run
from tests.conftest import OBJECTIVES

CPU = torch.device("cpu")
SMALL = {
    "mae": ["--encoder.depth=2", "--objective.decoder_depth=2"],
    "dino": ["--encoder.depth=2", "--objective.num_prototypes=256", "--objective.num_local_crops=2"],
}


def config_of(objective: str, *more: str) -> RunConfig:
    flags = ["--encoder.arch=vit_tiny_patch16_224", "--batch.size=2", "--data.source=x", "--steps=10"]
    return parse_run(OBJECTIVES[objective][0], [*flags, *SMALL[objective], *more]).resolve(100)[0]


def makers(objective: str) -> list[Any]:
    found = PEERS[type(OBJECTIVES[objective][0].objective)]
    return [
        pytest.param(
            objective,
            make,
            id=f"{objective} {name}",
            marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}"),
        )
        for name, make in found.items()
    ]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("objective", "make"), [*makers("mae"), *makers("dino")])
def test_another_librarys_step_is_the_same_work(
    objective: str, make: Any, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for DINO's last block, of which we compute class tokens alone."""
    config = config_of(objective)
    theirs = count_flops(make(config, 2, CPU, dtype))
    if objective == "dino":
        assert count_flops(own_step(config, 2, CPU, dtype)) < 0.9 * theirs
    whole = ViT.forward_groups
    monkeypatch.setattr(ViT, "forward_groups", lambda self, groups, cls_only=False, **how: whole(self, groups, **how))
    assert count_flops(own_step(config, 2, CPU, dtype)) == pytest.approx(theirs, rel=0.02)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_transformers_learns_as_many_parameters_and_attends_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import ViTMAEForPreTraining

    built, init = [], ViTMAEForPreTraining.__init__
    monkeypatch.setattr(ViTMAEForPreTraining, "__init__", lambda self, config: built.append(self) or init(self, config))
    config = config_of("mae")
    own = sum(parameter.numel() for parameter in config.build_objective().parameters() if parameter.requires_grad)
    for dtype, attention in ((None, "sdpa"), (torch.bfloat16, "eager")):
        PEERS[type(config.objective)]["transformers"](config, 2, CPU, dtype)
        assert sum(parameter.numel() for parameter in built[-1].parameters() if parameter.requires_grad) == own
        attending = [part for part in built[-1].modules() if type(part).__name__.endswith("Attention")]
        assert {part.config._attn_implementation for part in attending if hasattr(part, "config")} == {attention}


@pytest.mark.skipif(importlib.util.find_spec("lightly") is None, reason="needs lightly")
def test_lightlys_teacher_drops_no_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.layers.drop import DropPath

    seen = []
    monkeypatch.setattr(DropPath, "forward", lambda self, x: seen.append((self.training, x.requires_grad)) or x)
    lightly_dino(config_of("dino", "--encoder.drop_path_rate=0.1"), 2, CPU, None)()
    assert {training for training, learns in seen if not learns} == {False}
    assert {training for training, learns in seen if learns} == {True}


def test_operations_are_counted_alike_whichever_kernel_attends() -> None:
    counts = []
    for fused in (True, False):
        q, k, v = (torch.randn(2, 3, 7, 16, requires_grad=True) for _ in range(3))

        def step(fused: bool = fused, q: Any = q, k: Any = k, v: Any = v) -> None:
            if fused:
                out = nn.functional.scaled_dot_product_attention(q, k, v)
            else:
                out = (q / 4 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
            out.sum().backward()

        counts.append(count_flops(step))
    assert counts == [6 * 2 * 2 * 3 * 7 * 7 * 16] * 2


def test_a_step_is_measured_beside_the_same_with_other_settings() -> None:
    cross = "--objective.decoder cross --objective.predict_ratio 0.25"
    beside = {cross: config_of("mae", *cross.replace("decoder ", "decoder=").replace("ratio ", "ratio=").split())}
    result = compare_steps(config_of("mae"), beside=beside, steps=1, rounds=2, kinds=["fp32"])
    assert set(result["rates"]) == {"ssl_vit, fp32", f"ssl_vit {cross}, fp32"}
    assert list(result["ratios_to"]) == ["ssl_vit, fp32"]
    assert list(result["ratios_to"]["ssl_vit, fp32"]) == [f"ssl_vit {cross}, fp32"]
    flops = result["gflop_per_image"]
    assert flops[f"ssl_vit {cross}, fp32"] < 0.7 * flops["ssl_vit, fp32"]
    assert result["settings"]["encoder"]["depth"] == 2


@pytest.mark.parametrize(
    ("objective", "flags", "reason"),
    [
        ("mae", ["--objective.decoder=cross"], r"^objective\.decoder='cross': --peers have the standard decoder alone"),
        ("dinov2", [], "^--peers: none does the step of DINOv2$"),
    ],
)
def test_a_step_that_no_other_library_has_is_refused(objective: str, flags: list[str], reason: str) -> None:
    defaults, small = OBJECTIVES[objective]
    config = parse_run(defaults, [*small, *flags, "--steps=10"]).resolve(40)[0]
    with pytest.raises(ValueError, match=reason):
        compare_steps(config, peers=True, steps=1, rounds=1)
