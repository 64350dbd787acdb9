import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional as TF

from ssl_vit.data.augment.device import (
    JITTER_ORDERS,
    color_jitter,
    flip_horizontally,
    gaussian_blur,
    normalize,
    shift_hue,
    solarize,
    to_grey,
    to_unit,
)
from ssl_vit.data.transform import Normalization
from tests.specs import GREY


def test_only_the_chosen_images_are_mirrored() -> None:
    images = torch.randint(0, 256, (3, 2, 4, 5), dtype=torch.uint8)
    flipped = flip_horizontally(images, torch.tensor([False, True, False]))
    assert torch.equal(flipped[0], images[0])
    assert torch.equal(flipped[1], images[1].flip(-1))
    assert torch.equal(flipped[2], images[2])


def test_normalising_scales_each_channel() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 2, 1, 1)
    for pixels in (images, to_unit(images)):
        assert normalize(pixels, Normalization((0.5, 0.5), (0.5, 0.25))).flatten().tolist() == [-1.0, 2.0]


def test_constants_must_fit_the_channels() -> None:
    images = torch.zeros(1, 4, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"data.mean=.*need 4 values"):
        normalize(images, GREY)


class TestColorJitter:
    OPERATIONS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)

    def test_is_torchvisions_image_by_image(self) -> None:
        images = torch.rand(48, 3, 6, 7)
        images[0] = 0.5  # no colour: the hue is undefined
        factors = torch.empty(48, 4).uniform_(0.6, 1.4)
        factors[:, 3] = torch.empty(48).uniform_(-0.1, 0.1)
        orders = torch.arange(48) % 24
        jittered = color_jitter(images, factors, orders)
        for image, factor, order, found in zip(images, factors, orders, jittered, strict=True):
            expected = image
            for operation in JITTER_ORDERS[order]:
                expected = self.OPERATIONS[operation](expected, factor[operation].item())
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)  # torchvision's luma sums to .9999

    def test_neutral_factors_change_nothing(self) -> None:
        images = torch.rand(2, 3, 4, 4)
        neutral = torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 2)
        assert torch.equal(color_jitter(images, neutral, torch.zeros(2, dtype=torch.long)), images)

    @pytest.mark.parametrize("channels", [1, 4, 12])
    def test_other_channels_have_brightness_and_contrast_only(self, channels: int) -> None:
        images = torch.rand(2, channels, 4, 4)
        orders = torch.zeros(2, dtype=torch.long)
        full, part = torch.tensor([[0.8, 1.2, 0.5, 0.1]] * 2), torch.tensor([[0.8, 1.2, 1.0, 0.0]] * 2)
        changed = color_jitter(images, full, orders)
        assert torch.equal(changed, color_jitter(images, part, orders))
        assert not torch.equal(changed, images)

    def test_the_input_stays_as_it_was(self) -> None:
        images = torch.rand(2, 3, 4, 4)
        before = images.clone()
        color_jitter(images, torch.tensor([[0.7, 1.0, 1.0, 0.05]] * 2), torch.zeros(2, dtype=torch.long))
        assert torch.equal(images, before)


def test_a_third_of_the_wheel_turns_red_into_green() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    assert shift_hue(red, torch.full((1, 1, 1), 1 / 3)).flatten().tolist() == pytest.approx([0, 1, 0], abs=1e-5)


def test_blur_is_a_gaussian_and_near_pillows() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 44, 3), dtype=np.uint8)
    images = to_unit(torch.from_numpy(pixels).permute(2, 0, 1)[None].repeat(3, 1, 1, 1))
    blurred = gaussian_blur(images, torch.tensor([0.0, 0.5, 2.0]), radius=6)
    assert torch.equal(blurred[0], images[0])
    for row, sigma in ((1, 0.5), (2, 2.0)):
        reference = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)), dtype=np.float32)
        found = blurred[row].permute(1, 2, 0).numpy() * 255
        assert np.abs(found - reference)[8:-8, 8:-8].mean() < 0.03 * 255  # Pillow approximates by boxes


def test_blur_of_a_point_is_the_kernel() -> None:
    images = torch.zeros(2, 1, 21, 21)
    images[:, :, 10, 10] = 1
    blurred = gaussian_blur(images, torch.tensor([1.0, 1.5]), radius=5)
    for image, sigma in zip(blurred[:, 0], (1.0, 1.5), strict=True):
        assert image.sum().item() == pytest.approx(1.0, abs=1e-5)
        assert (image[10, 12] / image[10, 10]).item() == pytest.approx(np.exp(-0.5 * (2 / sigma) ** 2), rel=1e-4)
        assert torch.allclose(image, image.T)


@pytest.mark.parametrize("size", [(5, 5), (24, 31)])
def test_blur_of_nine_pixels_with_mirrored_borders_is_torchvisions(size: tuple[int, int]) -> None:
    """DINOv2's code uses its GaussianBlur(9, sigma=(0.1, 2))."""
    images, sigmas = torch.rand(4, 3, *size), torch.tensor([0.1, 0.7, 1.4, 2.0])
    found = gaussian_blur(images, sigmas, 4, "reflect")
    for image, sigma, blurred in zip(images, sigmas.tolist(), found, strict=True):
        torch.testing.assert_close(blurred, TF.gaussian_blur(image, [9, 9], [sigma, sigma]))


def test_images_too_small_to_be_mirrored_are_blurred() -> None:
    images, sigmas = torch.rand(1, 2, 4, 9), torch.tensor([1.0])
    assert torch.equal(gaussian_blur(images, sigmas, 4, "reflect"), gaussian_blur(images, sigmas, 4))


def test_grey_and_solarised_images_are_the_chosen_ones() -> None:
    images, rows = torch.rand(2, 3, 4, 4), torch.tensor([False, True])
    grey, inverted = to_grey(images, rows), solarize(images, rows)
    assert torch.equal(grey[0], images[0])
    assert torch.equal(inverted[0], images[0])
    torch.testing.assert_close(grey[1], TF.rgb_to_grayscale(images[1], 3), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(inverted[1], TF.solarize(images[1], 128 / 255))
    assert torch.equal(to_grey(images[:, :2], rows), images[:, :2])  # two channels have no colours to lose
