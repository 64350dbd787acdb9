"""Classifiers that leave as timm's: proven equal when they are written, and again here."""

import json
from pathlib import Path

import pytest
import timm
import torch

from ssl_vit.export.classifier import export_classifier
from ssl_vit.models.config import EncoderConfig
from ssl_vit.objectives.finetune import FineTuneConfig
from tests.conftest import TINY
from tests.families import FAMILIES
from tests.specs import grey

SETTINGS = {"class_names": ("a", "b", "c"), "normalization": grey(mean=0.1, std=0.2), "crop_pct": 0.9, "provenance": {}}
ENCODERS = {
    "square": EncoderConfig(image_size=32, pos_embed="sincos", **TINY),
    "not square": EncoderConfig(image_size=(16, 48), **TINY),
    "registers": EncoderConfig(arch="vit_small_patch14_reg4_dinov2", image_size=42, depth=1),
    "no class token": EncoderConfig(arch="vit_medium_patch16_gap_256", image_size=64, depth=1),
    "another norm": EncoderConfig("aimv2_large_patch14_224", 28, depth=1, embed_dim=48, num_heads=4),
    **FAMILIES,
}


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("name", ENCODERS)
def test_timm_loads_what_was_trained(tmp_path: Path, name: str, pool: str) -> None:
    encoder = ENCODERS[name].build()
    objective = FineTuneConfig(num_classes=3, pool=pool, head_init=0.5, model_ema=0.5).build(encoder)
    images = torch.randn(2, encoder.in_chans, *encoder.image_size)
    optimizer = torch.optim.AdamW((p for p in objective.parameters() if p.requires_grad), lr=0.01)
    objective({"images": images, "targets": torch.eye(3)[:2]}, 0.5)["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
    optimizer.step()
    objective.after_step(0.5)
    settings = {**SETTINGS, "normalization": grey(encoder.in_chans, mean=0.1, std=0.2)}
    assert export_classifier(objective.eval(), tmp_path, **settings) == tmp_path / "model.safetensors"
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(images), objective.logits(images)["head"], rtol=1e-4, atol=1e-5)
    data, channels = timm.data.resolve_model_data_config(loaded), encoder.in_chans
    assert (data["mean"], data["std"], data["crop_pct"]) == ([0.1] * channels, [0.2] * channels, 0.9)
    assert data["input_size"] == (channels, *encoder.image_size)
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == ["a", "b", "c"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_classifier_that_would_load_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = FineTuneConfig(num_classes=3, head_init=0.5).build(ENCODERS["square"].build())
    monkeypatch.setattr(objective, "logits", lambda images: {"head": torch.ones(len(images), 3)})
    with pytest.raises(RuntimeError, match="logits differ"):
        export_classifier(objective, tmp_path, **SETTINGS)
    assert list(tmp_path.iterdir()) == []
