"""Vision Transformers with rotary positions."""

import pytest
import torch

from ssl_vit.models import EncoderConfig
from ssl_vit.models.encoder import Encoder
from tests.families import SMALL

ARCHS = {
    "dinov3": EncoderConfig("vit_small_patch16_dinov3", 64, **SMALL),
    "dinov3, biases": EncoderConfig("vit_small_patch16_dinov3_qkvb", 64, **SMALL),
    "eva02": EncoderConfig("eva02_tiny_patch14_224", 56, depth=2),
    "one rotation a block": EncoderConfig("vit_small_patch16_rope_mixed_224", 64, depth=2),
    "eva, without rotations": EncoderConfig("eva_giant_patch14_224", 56, **SMALL),
    "perception encoder": EncoderConfig("vit_pe_core_tiny_patch16_384", 64, depth=2),
}


@pytest.fixture(params=ARCHS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    torch.manual_seed(0)
    return ARCHS[request.param].build().eval()


def test_features_are_timms_at_any_size(encoder: Encoder) -> None:
    for rows, columns in ((4, 4), (2, 5)):
        images = torch.randn(2, 3, rows * encoder.stride[0], columns * encoder.stride[1])
        tokens = encoder.model.forward_features(images)
        features = encoder(images)
        torch.testing.assert_close(features.patches, tokens[:, -rows * columns :], rtol=1e-4, atol=1e-5)
        if encoder.has_cls_token:
            torch.testing.assert_close(features.cls, tokens[:, 0], rtol=1e-4, atol=1e-5)


def test_kept_tokens_keep_their_rotations(encoder: Encoder) -> None:
    images = torch.randn(2, 3, *encoder.image_size)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    whole, kept = encoder(images), encoder(images, keep=order)
    torch.testing.assert_close(kept.cls, whole.cls, rtol=1e-4, atol=1e-5)
    expected = whole.patches.gather(1, order[..., None].expand(-1, -1, encoder.embed_dim))
    torch.testing.assert_close(kept.patches, expected, rtol=1e-4, atol=1e-5)
    changed = images.clone()
    changed[:, :, : encoder.stride[0]] = 7.0  # the first row
    keep = torch.tensor([[4, 9, 15], [5, 8, 12]])
    assert torch.equal(encoder(images, keep=keep).patches, encoder(changed, keep=keep).patches)


def test_rotations_are_augmented_in_training_alone() -> None:
    augmented = {"rope_shift_coords": 0.5, "rope_jitter_coords": 1.5, "rope_rescale_coords": 2.0}
    plain = EncoderConfig("vit_small_patch16_dinov3", 64, **SMALL).build()
    encoder = EncoderConfig("vit_small_patch16_dinov3", 64, model_args=augmented, **SMALL).build()
    encoder.load_state_dict(plain.state_dict())
    for parameters in zip(encoder.parameters(), plain.parameters(), strict=True):
        noise = 0.3 * torch.randn_like(parameters[0])
        for parameter in parameters:
            parameter.data.add_(noise)
    images = torch.randn(2, 3, 64, 64)

    def trained(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return encoder.train()(images).cls

    assert torch.equal(trained(1), trained(1))
    assert not torch.allclose(trained(1), trained(2), atol=1e-3)
    assert torch.equal(encoder.eval()(images).cls, plain(images).cls)
    assert torch.equal(plain.train()(images).cls, plain.eval()(images).cls)  # off by default
