import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_vit.export.interop import load_reference
from ssl_vit.models import EncoderConfig
from ssl_vit.models.hierarchical import ConvNeXtBlock
from ssl_vit.objectives.fcmae import FCMAE, FCMAEConfig
from tests.conftest import GOLDEN
from tests.families import CONVOLUTIONS, FAMILIES

ENCODER = EncoderConfig("convnextv2_tiny", 128, model_args={"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]})


@pytest.fixture
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "fcmae_reference.safetensors")


def build(**settings) -> FCMAE:
    objective = FCMAEConfig(decoder_embed_dim=24, **settings).build(ENCODER.build())
    load_reference(objective, GOLDEN / "fcmae_reference.safetensors")
    return objective


class TestAgainstThePapersCode:
    def test_the_sparse_layout_is_timms_dense_one(self, golden: dict[str, Tensor]) -> None:
        own = build().encoder.model.state_dict()
        expected = {name.removeprefix("timm."): value for name, value in golden.items() if name.startswith("timm.")}
        assert expected.keys() == {name for name in own if not name.startswith("head.")}
        assert all(torch.equal(own[name], value) for name, value in expected.items())

    def test_features(self, golden: dict[str, Tensor]) -> None:
        encoder, images, mask = build().encoder, golden["images"], golden["mask"].bool()
        found = encoder.forward_visible(images, mask)
        torch.testing.assert_close(found, golden["features_per_image_grn"], rtol=1e-5, atol=1e-5)
        whole = encoder.forward_visible(images, torch.zeros_like(mask))
        torch.testing.assert_close(whole, golden["features_unmasked"], rtol=1e-5, atol=1e-5)

    def test_prediction_losses_and_gradient(self, golden: dict[str, Tensor]) -> None:
        objective, batch = build(), {"images": golden["images"], "mask": golden["mask"].bool()}
        found = objective.reconstruct(batch["images"], batch["mask"])
        torch.testing.assert_close(found[:1], golden["pred_per_image_grn_first"], rtol=1e-5, atol=1e-5)
        loss = objective(batch, 0.0)["loss"]
        assert loss.item() == pytest.approx(golden["loss_norm_pix_per_image_grn"].item(), rel=1e-5)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in objective.parameters() if p.grad is not None])
        assert norm.item() == pytest.approx(golden["grad_norm_norm_pix_per_image_grn"].item(), rel=1e-5)
        raw = build(norm_pix_loss=False)(batch, 0.0)["loss"]
        assert raw.item() == pytest.approx(golden["loss_raw_per_image_grn"].item(), rel=1e-5)


@pytest.mark.parametrize("arch", ["convnext_tiny", "convnextv2_tiny", "convnextv2_atto"])  # the last: 1x1 convolutions
def test_removed_pixels_change_nothing_bit_for_bit(arch: str) -> None:
    torch.manual_seed(0)
    encoder = EncoderConfig(arch, 128, model_args=CONVOLUTIONS).build()
    for parameter in encoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    images, mask = torch.randn(2, 3, 128, 128), torch.rand(2, 16) < 0.6
    pixels = mask.reshape(2, 4, 4).repeat_interleave(32, dim=1).repeat_interleave(32, dim=2)[:, None]
    changed = torch.where(pixels, 5 * torch.randn_like(images), images)
    before, after = encoder.forward_visible(images, mask), encoder.forward_visible(changed, mask)
    assert torch.equal(before, after)
    assert not before.flatten(2).transpose(1, 2)[mask].any()
    visible = before.flatten(2).transpose(1, 2)[~mask]
    assert visible.abs().mean() > 0.01
    assert not torch.allclose(visible, encoder.forward_visible(images, ~mask).flatten(2).transpose(1, 2)[~mask])
    # Each image is on its own.
    torch.testing.assert_close(encoder.forward_visible(images[:1], mask[:1]), before[:1], rtol=1e-4, atol=1e-5)


def test_with_all_visible_it_is_the_plain_network() -> None:
    encoder = FAMILIES["convnextv2"].build().eval()
    images = torch.randn(2, 3, *encoder.image_size)
    maps = encoder.forward_visible(images, torch.zeros(2, encoder.num_patches, dtype=torch.bool))
    torch.testing.assert_close(encoder._features(maps).patches, encoder(images).patches, rtol=1e-4, atol=1e-5)


def test_norms_of_grn_leave_out_removed_sites() -> None:
    """Without the mask before GRN, biases at removed sites would count."""
    block = ConvNeXtBlock(4, use_grn=True, ls_init_value=None)
    for parameter in block.parameters():
        parameter.data.normal_()
    x, visible = torch.randn(1, 4, 2, 6), torch.ones(1, 1, 2, 6)
    visible[..., 3:] = 0
    whole = block(x * visible, visible=visible)
    narrow = block(x[..., :3], visible=visible[..., :3])  # as if the removed sites did not exist
    torch.testing.assert_close(whole[..., :3], narrow, rtol=1e-4, atol=1e-5)


def test_the_final_norm_does_not_train() -> None:
    objective = FCMAEConfig(decoder_embed_dim=16).build(FAMILIES["convnextv2"].build())
    frozen = [name for name, parameter in objective.named_parameters() if not parameter.requires_grad]
    assert frozen == ["encoder.net.head.norm.weight", "encoder.net.head.norm.bias"]


@pytest.mark.parametrize("name", ["swin", "hybrid", "dinov3", "convnext, overlapping stem"])
def test_an_encoder_that_cannot_be_sparse_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"encoder.arch=.*cannot; use convnextv2_\* or convnext_\*, and for Swin"):
        FCMAEConfig().build(FAMILIES[name].build())


def test_a_mask_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask_ratio=0.9: masks 6 of 6 units of 32 x 32 pixels"):
        FCMAEConfig(mask_ratio=0.9).build(FAMILIES["convnextv2"].build())
