import pytest
import torch

from ssl_vit.data.device_transforms import flip_horizontally, normalize


def test_only_the_chosen_images_are_mirrored() -> None:
    images = torch.randint(0, 256, (3, 2, 4, 5), dtype=torch.uint8)
    flipped = flip_horizontally(images, torch.tensor([False, True, False]))
    assert torch.equal(flipped[0], images[0])
    assert torch.equal(flipped[1], images[1].flip(-1))
    assert torch.equal(flipped[2], images[2])


def test_normalising_scales_each_channel() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 2, 1, 1)
    assert normalize(images, (0.5, 0.5), (0.5, 0.25)).flatten().tolist() == [-1.0, 2.0]


def test_constants_must_fit_the_channels() -> None:
    images = torch.zeros(1, 4, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"data.mean=.*need 4 values"):
        normalize(images, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
