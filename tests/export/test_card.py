import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from ssl_vit.export.card import _scores, measured_on
from ssl_vit.export.targets import export_to, proof_images
from tests.export.test_targets import ENCODERS, build

SETTINGS = {"split": "train[:20%]", "test_split": "test"}


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (
            {"judged_on": {"source": "/home/me/photos/", "split": "train", "num_test": 40, "num_classes": 2}},
            "`photos` (train), 40 images of 2 classes, each by what was learned from others",
        ),
        (
            {
                "source": "a/x.parquet",
                "test_source": "b/y.parquet",
                "num_train": 9,
                "num_test": 1234,
                "settings": SETTINGS,
            },
            "`y.parquet` (test), 1,234 images; learned from `x.parquet` (train[:20%]), 9 images",
        ),
        (
            {"source": "{/a/b: 0.5, c: 2}", "test_source": "a held-out 20% of /d/e", "num_test": 5},
            "a held-out 20% of `e`, 5 images; learned from `{b: 0.5, c: 2}`",
        ),
        ({"test": "masks", "num_classes": 3}, "`masks` of 3 classes"),
        ({"step": 4}, "not recorded"),
    ],
)
def test_a_score_says_what_it_was_measured_on(result: dict, words: str, tmp_path: Path) -> None:
    assert measured_on(result) == words
    score = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 40}
    (tmp_path / "results.json").write_text(json.dumps({**result, "scores": {"trained": {"knn": score}}}))
    assert list(_scores(tmp_path))[1].endswith(f"| {words} |")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("learned positions", "A Vision Transformer pre-trained"),
        ("hybrid", "A Vision Transformer behind a CNN pre-trained"),
        ("swin", "A Swin Transformer pre-trained"),
        ("swinv2", "A Swin Transformer pre-trained"),
        ("convnext", "A ConvNeXt pre-trained"),
        ("convnextv2", "A ConvNeXt pre-trained"),
    ],
)
def test_the_card_says_what_the_backbone_is_and_its_pyramid_is_that_of_its_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    trained = build(ENCODERS[name], "DINO")
    encoder, model = trained.encoder, trained.encoder.model
    monkeypatch.chdir(export_to(trained, "timm", tmp_path, proof_images(trained)).folder)
    card = Path("README.md").read_text()
    assert words in card
    assert ("; class token and " in card) == encoder.has_cls_token
    assert f"one for {encoder.stride[0]} x {encoder.stride[1]} pixels" in card
    if name in ("learned positions", "hybrid"):
        assert "features_only" not in card
        return
    found: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[1], found)
    maps: list[torch.Tensor] = []
    for stage in model.stages if name.startswith("convnext") else model.layers:
        stage.register_forward_hook(lambda module, inputs, output: maps.append(output))
    images = torch.randn(2, encoder.in_chans, *(2 * side for side in encoder.image_size))
    with torch.inference_mode():
        encoder(images)
        for output, expected in zip(found["pyramid"](images), maps, strict=True):
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert [tuple(shown.shape[1:2]) for shown in found["maps"]] == [(width,) for width in found["channels"]]
    assert found["strides"] == encoder.strides
    sides = [encoder.image_size[0] // stride for stride in encoder.strides]
    assert [shown.shape[2] for shown in found["maps"]] == sides


@pytest.mark.parametrize("name", ["learned positions", "hybrid", "dinov3", "distilled"])
def test_timms_maps_of_a_vit_are_the_outputs_of_its_last_blocks(tmp_path: Path, name: str) -> None:
    trained = build(replace(ENCODERS[name], depth=4), "DINO")
    encoder = trained.encoder
    folder = export_to(trained, "timm", tmp_path, proof_images(trained)).folder
    pyramid: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    outputs: list[torch.Tensor] = []
    for block in encoder.vit.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    images = torch.randn(2, 3, *encoder.image_size)
    with torch.inference_mode():
        encoder(images)
        maps = pyramid(images)
    assert pyramid.feature_info.reduction() == 3 * encoder.strides
    for found, expected in zip(maps, outputs[-3:], strict=True):
        tokens = expected[:, encoder.vit.num_prefix_tokens :]
        scale = float(tokens.abs().max())
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens, rtol=0, atol=1e-5 * scale)
