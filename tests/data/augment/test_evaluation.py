import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import InterpolationMode

from ssl_vit.data.augment.evaluation import centre_crop, cover, fit_size, middle


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (97, 201), (256, 256), (500, 501)])
def test_centre_crop_is_resize_256_centre_crop_224(size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    usual = T.Compose([T.Resize(256, InterpolationMode.BICUBIC, antialias=True), T.CenterCrop(224)])
    assert torch.equal(centre_crop(image, (224, 224), 0.875), usual(image))


@pytest.mark.parametrize("image_size", [(32, 64), (64, 32), (48, 48)])
@pytest.mark.parametrize("size", [(50, 50), (20, 90), (90, 20), (64, 129), (1, 7)])
def test_centre_crop_covers_the_crop_at_any_shape(image_size, size):
    image = torch.full((1, *size), 200, dtype=torch.uint8)
    for crop_pct in (0.7, 1.0):
        cropped = centre_crop(image, image_size, crop_pct)
        assert cropped.shape == (1, *image_size)
        assert (cropped == 200).all()  # an image too small for the crop would be padded with 0


@pytest.mark.parametrize(("height", "width"), [(1, 100_000), (100_000, 1), (3, 40_000), (200_001, 2)])
def test_an_elongated_image_is_not_enlarged_beyond_what_is_cut_out(height: int, width: int):
    long = torch.linspace(0, 255, max(height, width)).byte()
    image = (long[:, None] if height > width else long[None]).expand(3, height, width)
    for size in ((64, 64), (32, 96)):
        kept = middle((height, width), size)
        resized = cover((kept[0], kept[1]), size, 0.875)
        assert resized[0] * resized[1] < 40 * size[0] * size[1]
        cropped = centre_crop(image, size, 0.875).float()
        assert cropped.shape == (3, *size)
        assert (cropped - 127.5).abs().max() < 2  # the middle of the ramp


@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (41, 327), (64, 64)])
def test_less_elongated_images_are_cropped_as_ever(shape: tuple[int, int]):
    assert middle(shape, (32, 32)) == list(shape)
    height, width = shape[0] * 3, shape[1] * 3
    image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wide = TF.resize(image, cover((height, width), (32, 32), 0.875), InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(centre_crop(image, (32, 32), 0.875), TF.center_crop(wide, [32, 32]))


def test_centre_crop_keeps_the_centre():
    image = torch.zeros(1, 40, 80, dtype=torch.uint8)
    image[..., 20:60] = 255  # the centre square
    assert centre_crop(image, (20, 20), 1.0).float().mean() > 240
    assert 120 < centre_crop(image, (20, 40), 1.0).float().mean() < 135


def test_sizes_that_the_stride_does_not_divide():
    assert fit_size((32, 48), (16, 16)) == ((32, 48), (0, 0))
    with pytest.raises(
        ValueError, match=r"image_size=\(33, 48\): the height 33 is no multiple of 16, .* 32 and 48\. indivisible="
    ):
        fit_size((33, 48), (16, 16))
    assert fit_size((33, 40), (16, 16), "resize") == ((32, 48), (0, 0))
    assert fit_size((5, 41), (16, 16), "resize") == ((16, 48), (0, 0))
    assert fit_size((33, 40), (16, 16), "pad") == ((33, 40), (15, 8))
