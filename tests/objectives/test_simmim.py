import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_vit.export.interop import load_reference
from ssl_vit.models import EncoderConfig
from ssl_vit.objectives.simmim import SimMIM, SimMIMConfig, simmim_loss, window_moments
from tests.conftest import GOLDEN
from tests.families import FAMILIES
from tests.specs import spec

SWIN = {"depths": [2, 2, 2, 2], "embed_dim": 8, "num_heads": [1, 2, 4, 8], "window_size": 6}
SWIN_V2 = {"depths": [2, 2, 2], "embed_dim": 8, "num_heads": [1, 2, 4], "window_size": 6}
ENCODERS = {
    "simmim_swin": EncoderConfig("swin_base_patch4_window7_224", 96, model_args=SWIN),
    "simmim_swinv2": EncoderConfig("swinv2_base_window8_256", 96, model_args=SWIN_V2),
    "simmim_vit": EncoderConfig("vit_base_patch16_224", 96, embed_dim=32, depth=2, num_heads=4),
}


def build(name: str, **settings) -> tuple[SimMIM, dict[str, Tensor], dict[str, Tensor]]:
    """The objective with the reference's weights, the reference numbers, and their images and mask as a batch."""
    objective = SimMIMConfig(**settings).build(ENCODERS[name].build())
    file = GOLDEN / f"{name}_reference.safetensors"
    load_reference(objective, file)
    golden = load_file(file)
    rows, _ = objective.encoder.grid_size
    step = golden["mask"].shape[1] // rows  # that of Swin is at the stem
    mask = golden["mask"][:, ::step, ::step].flatten(1).bool()
    return objective, golden, {"images": golden["images"], "mask": mask}


@pytest.mark.parametrize("name", ENCODERS)
class TestAgainstThePapersCode:
    def test_features(self, name: str) -> None:
        objective, golden, batch = build(name)
        for key, masking in (("features", {"mask": batch["mask"]}), ("features_unmasked", {})):
            given = {**masking, "mask_token": objective.mask_token[0, 0]} if masking else {}
            patches = objective.encoder(batch["images"], **given).patches
            expected = golden[key].flatten(2).transpose(1, 2)
            torch.testing.assert_close(patches, expected, rtol=1e-5, atol=1e-5)

    def test_reconstruction_loss_and_gradient(self, name: str) -> None:
        objective, golden, batch = build(name)
        found = objective.reconstruct(batch["images"], batch["mask"])
        torch.testing.assert_close(found, golden["reconstruction"], rtol=1e-5, atol=1e-5)
        loss = objective(batch, 0.0)["loss"]
        assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-5)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in objective.parameters() if p.grad is not None])
        assert norm.item() == pytest.approx(golden["grad_norm"].item(), rel=1e-5)

    def test_normalised_target(self, name: str) -> None:
        _, golden, _ = build(name)
        keys = [key for key in golden if key.startswith("loss_norm_target")]
        assert keys
        for key in keys:
            size = 47 if key == "loss_norm_target" else int(key.rpartition("_")[2])
            objective, _, batch = build(name, norm_target=size)
            loss = objective(batch, 0.0)["loss"]
            assert loss.item() == pytest.approx(golden[key].item(), rel=1e-5)
        if "grad_norm_norm_target" in golden:
            loss.backward()
            norm = nn.utils.get_total_norm([p.grad for p in objective.parameters() if p.grad is not None])
            assert norm.item() == pytest.approx(golden["grad_norm_norm_target"].item(), rel=1e-5)


def test_the_loss_is_that_of_the_sheet() -> None:
    def waves(shape: tuple[int, ...], frequency: float, phase: float) -> Tensor:
        count = torch.arange(np.prod(shape), dtype=torch.float64)
        return torch.sin(frequency * count + phase).float().reshape(shape)

    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, :4, :4] = True
    mask[1, 4:] = True
    loss = simmim_loss(waves((2, 3, 8, 8), 0.17, 0.2), waves((2, 3, 8, 8), 0.27, 0.5), mask)
    assert loss.item() == pytest.approx(0.706544, abs=1e-6)


def test_windows_are_clipped_at_the_borders() -> None:
    images = torch.randn(1, 2, 9, 11)
    mean, deviation = window_moments(images, 5)
    corner, middle = images[:, :, :3, :3], images[:, :, 2:7, 3:8]
    for row, column, window in ((0, 0, corner), (4, 5, middle)):
        torch.testing.assert_close(mean[:, :, row, column], window.mean(dim=(2, 3)))
        expected = window.flatten(2).std(dim=-1)
        torch.testing.assert_close(deviation[:, :, row, column], expected, rtol=1e-4, atol=1e-4)


def test_masks_are_whole_units_and_follow_from_the_samples_generator() -> None:
    config = SimMIMConfig(mask_unit=32)
    transform = config.build_transform(spec(96, stride=16))
    image = torch.randint(0, 256, (3, 100, 120), dtype=torch.uint8)
    masks = [transform(image, np.random.default_rng(seed))["mask"] for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    for mask in masks:
        units = mask.reshape(3, 2, 3, 2)
        assert torch.equal(units.any(dim=3).any(dim=1), units.all(dim=3).all(dim=1))
        assert int(units[:, 0, :, 0].sum()) == 6  # ceil(.6 of 9)


@pytest.mark.parametrize(
    ("settings", "encoder", "said"),
    [
        ({"mask_unit": 24}, "swin", r"mask_unit=24: must be a multiple of the encoder's stride \(16, 16\), such as 32"),
        ({"mask_unit": 64}, "swin", r"mask_ratio=0.6: masks 1 of 1 units of 64 x 64 pixels"),
        ({"mask_unit": 48}, "swin", r"encoder.image_size=\(64, 64\): the height 64 .* 48 and 96; masks are drawn"),
        ({}, "hybrid", "encoder.arch='vit_tiny_r_s16_p8_224': SimMIM masks tokens, .*; use vit_"),
        ({"norm_target": 46}, "swin", "norm_target=46: must be odd"),
        ({"mask_ratio": 1.0}, "swin", "mask_ratio=1.0"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict, encoder: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SimMIMConfig(**settings).build(FAMILIES[encoder].build())


def test_images_of_another_size_are_filled_in() -> None:
    objective = SimMIMConfig(mask_unit=16).build(FAMILIES["swin"].build())
    shown = objective.fill_in(torch.randn(1, 3, 96, 64), torch.tensor([[0, 3, 23]]))
    assert shown.patches.shape == (1, 24, 16 * 16 * 3)
    assert shown.visible[0].nonzero().flatten().tolist() == [0, 3, 23]


def test_a_predicted_window_is_shown_in_the_images_colours() -> None:
    torch.manual_seed(0)
    objective = SimMIMConfig(mask_unit=16, norm_target=5).build(FAMILIES["swin"].build())
    images = torch.randn(2, 3, 64, 64)
    objective.reconstruct = lambda images, mask: objective.target(images)
    keep = torch.arange(8).expand(2, -1)
    shown = objective.fill_in(images, keep)
    assert not shown.norm_pix_loss
    assert shown.visible[:, :8].all()
    assert not shown.visible[:, 8:].any()
    expected = images.unfold(2, 16, 16).unfold(3, 16, 16)[0, :, 1, 2]  # row 1, column 2
    torch.testing.assert_close(shown.patches[0, 6].reshape(16, 16, 3).permute(2, 0, 1), expected, rtol=1e-3, atol=1e-3)
