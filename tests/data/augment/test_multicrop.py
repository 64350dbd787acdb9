import numpy as np
import pytest
import torch

from ssl_vit.data.augment import multicrop
from ssl_vit.data.augment.multicrop import MultiCropConfig, MultiCropTransform
from tests.specs import grey, spec

NORMALIZATION = grey(std=0.25)
CPU = torch.device("cpu")


def build(**settings) -> MultiCropTransform:
    return MultiCropConfig(local_crop_size=16, **settings).build_transform(spec(32, 48, normalization=NORMALIZATION))


def draw(transform: MultiCropTransform, seed: int, channels: int = 3) -> dict[str, torch.Tensor]:
    image = torch.randint(0, 256, (channels, 60, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return transform(image, np.random.default_rng(seed))


def params_of(transform: MultiCropTransform, num: int = 2000) -> np.ndarray:
    rng = np.random.default_rng(0)
    return torch.stack([transform._draw_params((0, 1, 2), rng) for _ in range(num)]).numpy()


def test_crops_are_uint8_and_follow_from_the_samples_generator() -> None:
    transform = build()
    first, again, other = draw(transform, 1), draw(transform, 1), draw(transform, 2)
    assert first["global_crops"].shape == (2, 3, 32, 48)
    assert first["local_crops"].shape == (8, 3, 16, 16)
    assert first["global_crops"].dtype == first["local_crops"].dtype == torch.uint8
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["global_crops"], other["global_crops"])
    assert not torch.equal(first["global_params"], other["global_params"])


def test_a_sample_looks_the_same_in_any_batch() -> None:
    transform = build()
    samples = [draw(transform, seed) for seed in range(6)]

    def batch(chosen: list[int]) -> dict[str, torch.Tensor]:
        return transform.on_device(
            {name: torch.stack([samples[row][name] for row in chosen]) for name in samples[0]}, CPU
        )

    whole, part = batch([0, 1, 2, 3, 4, 5]), batch([4, 2])
    for name in whole:
        torch.testing.assert_close(whole[name][[4, 2]], part[name], rtol=1e-4, atol=1e-4)
    assert whole["global_crops"].shape == (6, 2, 3, 32, 48)


def test_without_augmentation_crops_are_only_normalised() -> None:
    none = {"flip_prob": 0.0, "color_jitter_prob": 0.0, "grey_prob": 0.0}
    transform = build(**none, blur_prob=(0.0, 0.0, 0.0), solarize_prob=(0.0, 0.0, 0.0))
    sample = draw(transform, 0)
    batch = transform.on_device({name: value[None] for name, value in sample.items()}, CPU)
    torch.testing.assert_close(batch["local_crops"][0], (sample["local_crops"] / 255 - 0.5) / 0.25)


def test_probabilities_of_each_view_are_the_papers() -> None:
    drawn = params_of(build())
    assert (drawn[:, :, 7] > 0).mean(axis=0) == pytest.approx([1.0, 0.1, 0.5], abs=0.04)  # blur
    assert drawn[:, :, 8].mean(axis=0) == pytest.approx([0.0, 0.2, 0.0], abs=0.04)  # solarisation
    assert drawn[:, :, 6].mean() == pytest.approx(0.2, abs=0.03)  # grey
    assert drawn[:, :, 0].mean() == pytest.approx(0.5, abs=0.03)  # flip
    assert (drawn[:, :, 1] != 1).mean() == pytest.approx(0.8, abs=0.03)  # jitter
    for column, (low, high) in {1: (0.6, 1.4), 2: (0.6, 1.4), 3: (0.8, 1.2), 4: (-0.1, 0.1)}.items():
        assert low <= drawn[:, :, column].min()
        assert drawn[:, :, column].max() <= high
        jittered = drawn[:, :, 1] != 1
        assert np.ptp(drawn[:, :, column][jittered]) > 0.9 * (high - low)
    sigmas = drawn[:, :, 7][drawn[:, :, 7] > 0]
    assert 0.1 <= sigmas.min() < 0.15
    assert 1.95 < sigmas.max() <= 2.0
    assert len(np.unique(drawn[:, :, 5])) == 24


def test_the_published_blur_of_dinov2_is_a_preset() -> None:
    drawn = params_of(build(blur_prob="dinov2"))
    assert (drawn[:, :, 7] > 0).mean(axis=0) == pytest.approx([0.0, 0.9, 0.5], abs=0.04)


def test_the_presets_blur_as_the_papers_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """DINOv2: nine pixels whatever the deviation, borders mirrored. DINO: Pillow's, which nothing cuts off."""
    calls = []
    monkeypatch.setattr(
        multicrop, "gaussian_blur", lambda images, sigmas, *how, **named: calls.append((how, named)) or images
    )
    for preset in ("dinov2", "dino", (0.0, 0.9, 0.5)):
        transform = build(num_local_crops=0, blur_prob=preset)
        transform.on_device({name: value[None] for name, value in draw(transform, 0).items()}, CPU)
    assert calls == [((4, "reflect"), {}), ((), {"radius": 6}), ((), {"radius": 6})]


def test_each_view_is_turned_by_itself() -> None:
    transform = build(num_local_crops=6, local_crop_scale=(1.0, 1.0), quarter_turn_prob=0.75, flip_vertical_prob=0.5)
    image = torch.zeros(1, 64, 64, dtype=torch.uint8)
    image[:, :32, :32] = 255
    sample = transform(image, np.random.default_rng(1))
    bright = {view[0].float().view(2, 8, 2, 8).mean(dim=(1, 3)).argmax().item() for view in sample["local_crops"]}
    assert len(bright) > 1
    assert sample["global_crops"].shape == (2, 1, 32, 48)


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
def test_any_number_of_channels(channels: int) -> None:
    transform = MultiCropConfig(local_crop_size=16).build_transform(spec(32, normalization=grey(channels, std=1.0)))
    sample = draw(transform, 3, channels)
    batch = transform.on_device({name: value[None] for name, value in sample.items()}, CPU)
    assert batch["global_crops"].shape == (1, 2, channels, 32, 32)
    assert batch["global_crops"].isfinite().all()
