"""Swin and ConvNeXt: what timm computes, where masks go, which layers learn slower."""

from typing import Any

import pytest
import torch
from timm.models import group_parameters
from torch import Tensor

from ssl_vit.models import EncoderConfig
from ssl_vit.models.encoder import Encoder
from tests.families import CONVOLUTIONS, FAMILIES, STAGES

HIERARCHICAL = ("swin", "swinv2", "convnext", "convnextv2", "convnext, overlapping stem")


@pytest.fixture(params=HIERARCHICAL)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    torch.manual_seed(0)
    built = FAMILIES[request.param].build().eval()
    for parameter in built.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return built


def test_the_feature_of_an_image_is_what_timms_classifier_reads(encoder: Encoder) -> None:
    images = torch.randn(2, encoder.in_chans, *encoder.image_size)
    torch.testing.assert_close(encoder(images).cls, encoder.model(images), rtol=1e-4, atol=1e-5)


def test_head_norm_first_is_pooled_after_the_norm() -> None:
    encoder = EncoderConfig("convnext_tiny_hnf", 64, model_args=CONVOLUTIONS).build().eval()
    images = torch.randn(2, 3, 64, 64)
    features = encoder(images)
    torch.testing.assert_close(features.cls, encoder.model(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.cls, features.patches.mean(dim=1), rtol=1e-4, atol=1e-5)


def test_a_mask_is_enlarged_to_the_outputs_of_the_stem(encoder: Encoder) -> None:
    """The first stage sees the token at every place of a masked one, and the stem's outputs everywhere else."""
    if not encoder.supports_mask:
        return
    net: Any = encoder.model
    stages = net.layers if hasattr(net, "layers") else net.stages
    seen: list[Tensor] = []
    stages[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = torch.randn(1, encoder.in_chans, *encoder.image_size)
    mask = torch.zeros(1, encoder.num_patches, dtype=torch.bool)
    mask[0, 1] = True  # first row, second column
    token = torch.randn(encoder.mask_dim)
    encoder(images)
    encoder(images, mask=mask, mask_token=token)
    plain, masked = (maps if hasattr(net, "layers") else maps.permute(0, 2, 3, 1) for maps in seen)
    (rows, columns), side = encoder.grid_size, plain.shape[1] // encoder.grid_size[0]
    assert plain.shape == (1, rows * side, columns * side, encoder.mask_dim)
    replaced = (masked == token).all(dim=-1)[0]
    expected = torch.zeros(rows * side, columns * side, dtype=torch.bool)
    expected[:side, side : 2 * side] = True
    assert torch.equal(replaced, expected)
    assert torch.equal(masked[0][~expected], plain[0][~expected])


def test_layers_are_timms_groups_and_the_norm_after_them(encoder: Encoder) -> None:
    model: Any = encoder.model
    groups: Any = group_parameters(model, model.group_matcher(), reverse=True)
    layers = {name: encoder.layer_of(f"net.{name}") for name in groups}
    body = [name for name in groups if not name.startswith(("norm", "head"))]
    ordered = sorted({groups[name] for name in body})
    assert {name: layers[name] for name in body} == {name: ordered.index(groups[name]) for name in body}
    assert {layers[name] for name in groups.keys() - set(body)} == {encoder.num_layers + 1}


def test_windows_and_shifts_are_those_of_the_size_that_swin_is_built_for() -> None:
    small = EncoderConfig("swin_tiny_patch4_window7_224", 64, model_args=STAGES).build().eval()
    large = EncoderConfig("swin_tiny_patch4_window7_224", 128, model_args=STAGES).build().eval()
    large.load_state_dict(small.state_dict())
    images = torch.randn(1, 3, 128, 128)
    assert not torch.allclose(small(images).cls, large(images).cls, atol=1e-3)
    again = EncoderConfig("swin_tiny_patch4_window7_224", 64, model_args=small.config.model_args).build().eval()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(images).cls, small(images).cls)


def test_images_need_not_be_square_or_of_the_built_size(encoder: Encoder) -> None:
    height, width = encoder.stride[0] * 3, encoder.stride[1] * 2
    assert encoder(torch.randn(1, encoder.in_chans, height, width)).patches.shape == (1, 6, encoder.embed_dim)


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_tables_of_windows_have_no_weight_decay(name: str) -> None:
    encoder = FAMILIES[name].build()
    exempt = encoder.no_weight_decay()
    word = {"swin": "relative_position_bias_table", "swinv2": "cpb_mlp"}[name]
    assert [parameter for parameter in exempt if word in parameter]
    assert exempt <= {parameter for parameter, _ in encoder.named_parameters()}
