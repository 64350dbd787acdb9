from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts import pretrain_dino, pretrain_dinov2, pretrain_mae
from ssl_vit.core.settings import as_plain
from ssl_vit.evaluation.untrained import objective_of, untrained_encoder
from ssl_vit.models.config import EncoderConfig
from ssl_vit.objectives.stored import with_traits
from ssl_vit.runs.provenance import provenance
from ssl_vit.training.config import RunConfig
from tests.conftest import TINY

SMALL = EncoderConfig(image_size=32, pos_embed="learned", **TINY)
NUMBERS = {"num_prototypes": 64, "hidden_dim": 32, "bottleneck_dim": 16}
RUNS = {
    "MAE": (pretrain_mae.DEFAULTS, {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}),
    "DINO": (pretrain_dino.DEFAULTS, NUMBERS),
    "DINOv2": (pretrain_dinov2.DEFAULTS, NUMBERS),
}


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_an_export_remembers_the_weights_that_its_run_began_with(name: str) -> None:
    defaults, changes = RUNS[name]
    config, _ = replace(defaults, encoder=SMALL, steps=4).resolve(100)
    config: RunConfig = replace(config, objective=replace(config.objective, **changes), seed=3)
    at_start = config.build_objective().backbone()
    known = provenance(as_plain(config), with_traits({"objective": name, "step": 4}, Path("state.json")))
    known["objective_config"]["a_setting_of_another_version"] = 1
    assert same(untrained_encoder(config.encoder, objective_of(known), 3), at_start)
    assert not same(untrained_encoder(config.encoder, objective_of(known), 4), at_start)


@pytest.mark.parametrize("known", [{}, {"objective": "FineTune", "objective_config": {}}, {"objective": "os.path"}])
def test_what_no_objective_trained_begins_as_timm_does(known: dict) -> None:
    assert objective_of(with_traits(known, Path("config.json"))) is None
    torch.manual_seed(1)
    expected = SMALL.build()
    assert same(untrained_encoder(replace(SMALL, pretrained="gone"), None, 1), expected)
