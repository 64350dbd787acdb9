"""Classifiers that leave as timm's: proven equal when they are written, and again here."""

import json
from pathlib import Path

import pytest
import timm
import torch

from ssl_vit.export.classifier import export_classifier, export_distilled
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.weights.backbone import backbone_file
from ssl_vit.objectives.finetune import FineTune, FineTuneConfig
from ssl_vit.runs.trained import open_trained
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


@pytest.mark.parametrize("name", ["square", "another norm", "swinv2", "convnext", "distilled"])
def test_two_heads_that_learned_from_labels_and_a_teacher_leave_as_timms(tmp_path: Path, name: str) -> None:
    """As one of averaged weights where both read the same features."""
    encoder = ENCODERS[name].build()
    config = FineTuneConfig(num_classes=3, head_init=0.5, model_ema=0.5, teacher="a folder that is not read")
    objective = FineTune(config, encoder).eval()
    assert len(objective.classifier.heads) == 2
    images = torch.randn(2, encoder.in_chans, *encoder.image_size)
    settings = {**SETTINGS, "normalization": grey(encoder.in_chans, mean=0.1, std=0.2)}
    export_classifier(objective, tmp_path, **settings)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(images), objective.logits(images)["head"], rtol=1e-4, atol=1e-5)


class TestTransformers:
    def test_a_distilled_deit_becomes_its_classifier_with_teacher(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        encoder = FAMILIES["distilled"].build()
        objective = FineTuneConfig(num_classes=3, head_init=0.5).build(encoder).eval()
        settings = {name: value for name, value in SETTINGS.items() if name != "provenance"}
        folder = export_distilled(objective, tmp_path / "out", **settings)
        loaded = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(folder).eval()
        images = torch.randn(2, 3, 64, 64)
        found = loaded(images)
        torch.testing.assert_close(found.logits, objective.logits(images)["head"], rtol=1e-4, atol=1e-5)
        of_labels, of_teacher = objective.classifier.each(encoder.head_inputs(images))
        torch.testing.assert_close(found.cls_logits, of_labels, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.distillation_logits, of_teacher, rtol=1e-4, atol=1e-5)
        assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
        assert loaded.config.label2id == {"a": 0, "b": 1, "c": 2}
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        assert (tuple(processor.image_mean), tuple(processor.image_std)) == ((0.1,) * 3, (0.2,) * 3)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    def test_other_logits_and_other_backbones_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("transformers")
        settings = {name: value for name, value in SETTINGS.items() if name != "provenance"}
        objective = FineTuneConfig(num_classes=3, head_init=0.5).build(FAMILIES["distilled"].build())
        monkeypatch.setattr(objective, "logits", lambda images: {"head": torch.ones(len(images), 3)})
        with pytest.raises(RuntimeError, match="logits differ"):
            export_distilled(objective, tmp_path / "out", **settings)
        with pytest.raises(
            ValueError, match=r"^encoder.arch=.*: transformers' DeiTForImageClassificationWithTeacher is"
        ):
            export_distilled(FineTuneConfig(num_classes=3).build(ENCODERS["square"].build()), tmp_path, **settings)
        assert list(tmp_path.iterdir()) == []


def test_a_classifier_that_would_load_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = FineTuneConfig(num_classes=3, head_init=0.5).build(ENCODERS["square"].build())
    monkeypatch.setattr(objective, "logits", lambda images: {"head": torch.ones(len(images), 3)})
    with pytest.raises(RuntimeError, match="logits differ"):
        export_classifier(objective, tmp_path, **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_is_not_taken_for_a_backbone(tmp_path: Path) -> None:
    objective = FineTuneConfig(num_classes=3).build(ENCODERS["square"].build()).eval()
    export_classifier(objective, tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match=r"no such file; .*model.safetensors is a fine-tuned classifier, which timm"):
        backbone_file(tmp_path)
    assert open_trained(tmp_path).encoder.embed_dim == 32  # without its head, as weights to start from
