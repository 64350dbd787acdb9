import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssl_vit.export.interop import load_reference
from ssl_vit.models.vit import ViT
from ssl_vit.objectives.mae import MAE, MAEConfig
from tests.conftest import GOLDEN

OFFICIAL = {
    name.removeprefix("model."): value
    for name, value in load_file(GOLDEN / "mae_reference.safetensors").items()
    if name.startswith("model.")
}


@pytest.fixture
def objective(tiny_encoder: ViT) -> MAE:
    return MAEConfig(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2).build(tiny_encoder)


def test_the_official_pickle_layout_is_read(objective: MAE, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-799.pth"
    torch.save({"model": OFFICIAL, "epoch": 799, "args": argparse.Namespace(lr=1e-3)}, path)
    load_reference(objective, path)
    assert torch.equal(objective.encoder.vit.norm.weight, OFFICIAL["norm.weight"])
    assert torch.equal(objective.decoder_blocks[0].mlp.fc2.weight, OFFICIAL["decoder_blocks.0.mlp.fc2.weight"])


def test_an_encoder_without_its_decoder_is_refused(objective: MAE, tmp_path: Path) -> None:
    path = tmp_path / "encoder_only.safetensors"
    save_file({name: value for name, value in OFFICIAL.items() if "decoder" not in name}, path)
    before = objective.encoder.vit.norm.weight.clone()
    with pytest.raises(ValueError, match=r"encoder_only.safetensors: does not fit MAE: 19 missing: decoder_blocks.0"):
        load_reference(objective, path)
    assert torch.equal(objective.encoder.vit.norm.weight, before)


def test_another_width_is_refused(tiny_encoder: ViT) -> None:
    wider = MAEConfig(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2).build(tiny_encoder)
    with pytest.raises(ValueError, match="of another shape"):
        load_reference(wider, GOLDEN / "mae_reference.safetensors")


class _Harmful:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("harm"),))


def test_a_pickle_with_code_in_it_is_refused(objective: MAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": OFFICIAL, "args": _Harmful()}, "harmful.pth")
    with pytest.raises(ValueError, match=r"harmful.pth: holds more than tensors"):
        load_reference(objective, "harmful.pth")
    assert not Path("harm").exists()
