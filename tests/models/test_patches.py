import torch

from ssl_vit.models.patches import patchify, unpatchify


def test_patches_are_row_major_and_channels_last() -> None:
    images = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6).float()
    patches = patchify(images, (2, 3))
    assert patches.shape == (1, 4, 12)
    expected = [images[0, channel, row, column] for row in (0, 1) for column in (3, 4, 5) for channel in (0, 1)]
    assert patches[0, 1].tolist() == [float(value) for value in expected]  # the patch to the right of the first
    assert torch.equal(unpatchify(patches, images.shape, (2, 3)), images)
