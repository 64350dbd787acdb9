import numpy as np
import torch
from PIL import Image

from ssl_vit.data.transforms import draw_crop, random_resized_crop


def test_boxes_lie_inside_and_have_the_drawn_area_and_aspect() -> None:
    rng = np.random.default_rng(0)
    areas, aspects = [], []
    for _ in range(2000):
        top, left, height, width = draw_crop(300, 400, rng, scale=(0.2, 0.5))
        assert 0 <= top <= 300 - height
        assert 0 <= left <= 400 - width
        areas.append(height * width / 120_000)
        aspects.append(width / height)
    assert 0.19 < min(areas) < 0.22
    assert 0.48 < max(areas) < 0.51
    assert abs(np.mean(areas) - 0.35) < 0.01  # uniform in area
    assert abs(np.mean(np.log(aspects))) < 0.01  # symmetric in log aspect
    assert 0.74 < min(aspects) < 0.77
    assert 1.31 < max(aspects) < 1.35


def test_a_picture_too_long_for_any_box_gives_its_middle() -> None:
    assert draw_crop(10, 1000, np.random.default_rng(0), scale=(0.9, 1.0)) == (0, 493, 10, 13)


def test_a_tiny_picture_still_gives_a_box() -> None:
    top, left, height, width = draw_crop(1, 1, np.random.default_rng(0), scale=(0.2, 1.0))
    assert (top, left, height, width) == (0, 0, 1, 1)


def test_resizing_is_pillows_bicubic() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(80, 170, (60, 80, 3), dtype=np.uint8)).permute(2, 0, 1)
    rng = np.random.default_rng(3)
    top, left, height, width = draw_crop(60, 80, np.random.default_rng(3), scale=(0.2, 1.0))
    crop = random_resized_crop(image, (32, 32), rng, scale=(0.2, 1.0))
    box = (left, top, left + width, top + height)
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).crop(box).resize((32, 32), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(pillow)).permute(2, 0, 1)
    assert (crop.int() - expected.int()).abs().max() <= 1  # rounding; Pillow also clips between its two passes


def test_non_square_sizes_are_not_distorted() -> None:
    rng = np.random.default_rng(0)
    image = torch.zeros(1, 400, 400, dtype=torch.uint8)
    assert random_resized_crop(image, (32, 96), rng, scale=(0.2, 0.3)).shape == (1, 32, 96)
    aspects = [
        width / height for _, _, height, width in (draw_crop(400, 400, rng, (0.1, 0.2), (2.25, 4)) for _ in range(99))
    ]
    assert min(aspects) > 2.2


def test_many_channels_are_cropped_alike() -> None:
    image = torch.randint(0, 256, (1, 50, 50), dtype=torch.uint8).expand(12, -1, -1)
    crop = random_resized_crop(image, (16, 16), np.random.default_rng(0), scale=(0.2, 1.0))
    assert crop.shape == (12, 16, 16)
    assert (crop.int() - crop[:1].int()).abs().max() <= 1
