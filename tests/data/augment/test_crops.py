from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data.augment.crops import OrientationConfig, draw_crop, random_resized_crop, random_view


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


def test_an_image_too_long_for_any_box_gives_its_middle() -> None:
    assert draw_crop(10, 1000, np.random.default_rng(0), scale=(0.9, 1.0)) == (0, 493, 10, 13)


def test_a_tiny_image_still_gives_a_box() -> None:
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


class TestViews:
    corners = torch.zeros(1, 64, 64, dtype=torch.uint8)
    corners[:, :32, 32:], corners[:, 32:, 32:], corners[:, 32:, :32] = 80, 160, 240

    def drawn(self, number: int = 800, size: tuple[int, int] = (4, 4), **settings: float) -> Counter:
        """How often each corner lies where, over views of a whole image."""
        rng, orientation = np.random.default_rng(0), OrientationConfig(**settings)
        views = [random_view(self.corners, size, rng, (1.0, 1.0), orientation)[0] for _ in range(number)]
        return Counter(
            tuple(round(view[row, column].item() / 80) for row in (0, -1) for column in (0, -1)) for view in views
        )

    @pytest.mark.parametrize("size", [(16, 16), (8, 24)])
    def test_without_turns_nothing_more_is_drawn(self, size: tuple[int, int]) -> None:
        image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
        first, second = np.random.default_rng(5), np.random.default_rng(5)
        for _ in range(3):
            view = random_view(image, size, first, (0.2, 0.9), OrientationConfig())
            assert torch.equal(view, random_resized_crop(image, size, second, (0.2, 0.9)))
        assert first.bit_generator.state == second.bit_generator.state

    def test_vertical_flips(self) -> None:
        upright, upside_down = (0, 1, 3, 2), (3, 2, 0, 1)
        found = self.drawn(flip_vertical_prob=0.3)
        assert set(found) == {upright, upside_down}
        assert found[upside_down] / 800 == pytest.approx(0.3, abs=0.05)

    def test_three_turns_are_equally_frequent(self) -> None:
        found = self.drawn(quarter_turn_prob=0.75)
        assert set(found) == {(0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1)}
        assert all(count / 800 == pytest.approx(0.25, abs=0.05) for count in found.values())

    def test_both_together_with_flips_of_the_device_give_all_eight_positions(self) -> None:
        found = self.drawn(quarter_turn_prob=0.75, flip_vertical_prob=0.5)
        assert len(found) == 8
        assert all(count / 800 == pytest.approx(0.125, abs=0.04) for count in found.values())

    def test_a_turn_is_independent_of_a_flip(self) -> None:
        found = self.drawn(quarter_turn_prob=1.0, flip_vertical_prob=0.5)
        assert len(found) == 6
        assert all(count / 800 == pytest.approx(1 / 6, abs=0.045) for count in found.values())

    def test_crops_of_other_shapes_keep_their_shape_and_are_not_distorted(self) -> None:
        """Of stripes, those that a turn lays down are as wide as those that stand."""
        stripes = (torch.arange(240) // 10 % 2 * 255).to(torch.uint8).expand(1, 240, 240)
        rng, periods = np.random.default_rng(0), []
        for _ in range(60):
            view = random_view(stripes, (24, 72), rng, (0.3, 0.3), OrientationConfig(quarter_turn_prob=1.0))[0]
            assert view.shape == (24, 72)
            lying = view[:, 0].float().std() > view[0].float().std()
            line = (view[:, 36] if lying else view[12]) > 127
            periods.append((bool(lying), len(line) / max(1, int((line[1:] != line[:-1]).sum()))))
        standing = np.mean([period for lying, period in periods if not lying])
        assert np.mean([period for lying, period in periods if lying]) == pytest.approx(standing, rel=0.15)

    @pytest.mark.parametrize("name", ["flip_prob", "flip_vertical_prob", "quarter_turn_prob"])
    @pytest.mark.parametrize("value", [-0.1, 1.01])
    def test_probabilities_out_of_range_are_refused(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"^{name}={value}"):
            OrientationConfig(**{name: value})


@pytest.mark.parametrize("shape", [(1, 100_000), (100_000, 1), (2, 60_000)])
def test_crops_of_elongated_images_take_no_more_memory_than_their_size(shape: tuple[int, int]):
    image = torch.zeros(3, *shape, dtype=torch.uint8)
    for seed in range(20):
        top, left, height, width = draw_crop(*shape, np.random.default_rng(seed), (0.08, 1.0))
        assert height * width <= 6
        assert 0 <= top <= shape[0] - height
        assert 0 <= left <= shape[1] - width
        crop = random_resized_crop(image, (24, 24), np.random.default_rng(seed), (0.08, 1.0))
        assert crop.shape == (3, 24, 24)
