"""Every family of backbones: features, probes, extraction and segmentation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ssl_vit.data.augment.evaluation import EvalTransform
from ssl_vit.data.sources.source import DataConfig, open_source
from ssl_vit.evaluation import command
from ssl_vit.evaluation.extract import ExtractConfig, extract
from ssl_vit.evaluation.features import EncodeSettings, extract_features, num_layers_for, select_feature
from ssl_vit.evaluation.linear_probe import LinearProbeConfig
from ssl_vit.evaluation.probes import (
    KNNConfig,
    LinearConfig,
    evaluate_knn,
    evaluate_linear,
)
from ssl_vit.evaluation.segmentation import SegmentationConfig, evaluate_segmentation
from ssl_vit.export import export_backbone, load_backbone
from tests.evaluation.test_segmentation import write
from tests.families import FAMILIES
from tests.specs import GREY, grey

LAST_LAYERS = {"swin": 2, "swinv2": 2, "convnext": 1, "convnextv2": 1, "convnext, overlapping stem": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_timms(family: str, photo_folder: Path) -> None:
    """`cls` is what timm's model without a classifier returns, `cls4` of as many blocks as share width and grid."""
    encoder = FAMILIES[family].build().eval()
    source, spec = open_source(DataConfig(source=str(photo_folder))), grey(encoder.in_chans)
    transform, rows = EvalTransform(encoder.image_size, spec), np.arange(2)
    number = num_layers_for(["cls", "cls4+mean"], encoder)
    assert number == LAST_LAYERS.get(family, encoder.config.depth or min(4, encoder.num_layers))
    settings = EncodeSettings(2, torch.device("cpu"))
    found = extract_features(encoder, source, rows, transform, settings, num_layers=number)
    assert found["cls"].shape == (2, number, encoder.embed_dim)
    assert select_feature(found, "cls4+mean").shape == (2, (number + 1) * encoder.embed_dim)
    model: Any = encoder.model
    images = torch.stack([transform(source.image(row, encoder.in_chans), row) for row in (0, 1)])
    with torch.inference_mode():
        maps = model.forward_features(transform.on_device(images, torch.device("cpu")))
        pooled = maps[:, 0] if encoder.has_cls_token else model.forward_head(maps)
    torch.testing.assert_close(found["cls"][:, -1], pooled, rtol=1e-4, atol=1e-5)


def front(evaluate: Callable[..., None], configs: dict[str, Any], *args: object) -> int:
    return command.main(evaluate, configs, None, [*map(str, args), "--precision=no", "--num_workers=0"])


@pytest.mark.parametrize("family", ["distilled", "hybrid", "swin", "convnext"])
def test_every_script_takes_it(family: str, photo_folder: Path, tmp_path: Path) -> None:
    export_backbone(FAMILIES[family].build(), tmp_path, normalization=GREY, provenance={"pooled": "cls"})
    given = [tmp_path, f"--source={photo_folder}"]
    probe = LinearProbeConfig(features=("cls4",), base_lrs=(0.1,), epochs=2)
    linear = {"": LinearConfig(shots=(1,), draws=2, folds=2), "probe": probe}
    assert front(evaluate_linear, linear, *given, "--baselines=[untrained]") == 0
    result = json.loads((tmp_path / "linear.json").read_text())
    assert result["heads"]["backbone"]["feature"] == result["heads"]["untrained"]["feature"] == "cls4"
    assert front(evaluate_knn, {"": KNNConfig(ks=(3,))}, *given, "--baselines=[]") == 0
    assert len(list((tmp_path / "features").iterdir())) == 1  # k-NN reads what the linear probe has kept

    encoder, out = load_backbone(tmp_path), tmp_path / "features.safetensors"
    side, stride = encoder.image_size[0] + 1, encoder.stride[0]
    size = [f"--image_size={side}", "--indivisible=pad"]
    assert front(extract, {"": ExtractConfig}, *given, f"--output={out}", "--patches=true", *size) == 0
    found, rows = load_file(out)["patches"], -(-side // stride)
    assert found.shape == (40, rows, rows, encoder.embed_dim)
    transform = EvalTransform((side, side), GREY, padding=(rows * stride - side,) * 2)
    image = transform(open_source(DataConfig(source=str(photo_folder))).image(7, 3), 7)
    with torch.inference_mode():
        expected = encoder(transform.on_device(image[None], torch.device("cpu"))).patches
    torch.testing.assert_close(found[7].flatten(0, 1), expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["swin", "convnext"])
def test_segmentation_joins_the_blocks_that_share_width_and_grid(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = FAMILIES[family].build()
    export_backbone(encoder, tmp_path, normalization=GREY, provenance={})
    source = write(tmp_path / "masks.parquet", 12)
    configs = {"": SegmentationConfig(steps=3, batch_size=4, base_lrs=(0.01,), baselines=())}
    most = encoder.num_last_layers
    assert front(evaluate_segmentation, configs, tmp_path, f"--source={source}", f"--num_layers={most}") == 0
    assert 0 < json.loads((tmp_path / "segmentation.json").read_text())["backbone"]["miou"] < 1
    capsys.readouterr()
    assert front(evaluate_segmentation, configs, tmp_path, f"--source={source}", f"--num_layers={most + 1}") == 2
    said = f"num_layers={most + 1}: the last {most} blocks of {encoder.config.arch} share width and grid"
    assert said in capsys.readouterr().err
