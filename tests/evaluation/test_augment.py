import random

import numpy as np
import pytest
import torch

from ssl_vit.evaluation.augment import AugmentConfig, SupervisedTransform, _seeded

PLAIN = {"rand_augment": None, "random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}


def batch_of(transform: SupervisedTransform, seeds: list[int], channels: int = 3) -> dict[str, torch.Tensor]:
    image = torch.randint(0, 256, (channels, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    samples = [transform(image, np.random.default_rng(seed)) for seed in seeds]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    batch["label"] = torch.arange(len(seeds)) % 3
    return transform.on_device(batch, torch.device("cpu"))


def build(**changes) -> SupervisedTransform:
    return SupervisedTransform(AugmentConfig(**(PLAIN | changes)), 3, (32, 24), (0.5,) * 3, (0.5,) * 3)


def test_without_augmentation_targets_are_the_labels() -> None:
    batch = batch_of(build(), [0, 1, 2, 3])
    assert batch["images"].shape == (4, 3, 32, 24)
    assert torch.equal(batch["targets"], torch.eye(3)[[0, 1, 2, 0]])


def test_everything_but_mixup_follows_from_the_sample_alone() -> None:
    full = {"rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 1.0}
    alone = [batch_of(build(**full), [seed])["images"][0] for seed in range(6)]
    together = batch_of(build(**full), list(range(6)))["images"]
    assert torch.equal(torch.stack(alone), together)
    assert not torch.equal(together[0], together[1])


def test_global_generators_stay_as_they_were() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    drawn = []
    for _ in range(2):
        with _seeded(3):
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert before[0] == random.getstate()
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[2], torch.get_rng_state())


def test_random_erasing_replaces_a_box_by_noise() -> None:
    plain, erased = (batch_of(build(random_erasing=share), list(range(8)))["images"] for share in (0.0, 1.0))
    changed = (plain != erased).any(dim=1)
    shares = changed.float().mean(dim=(1, 2))
    assert (shares > 0.01).all()
    assert (shares < 0.4).all()
    rows, columns = changed[0].any(dim=1).nonzero(), changed[0].any(dim=0).nonzero()
    box = changed[0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert box.float().mean() > 0.95  # noise may hit a pixel's own value


def test_label_smoothing_spreads_a_share_over_all_classes() -> None:
    targets = batch_of(build(label_smoothing=0.3), [0, 1])["targets"]
    torch.testing.assert_close(targets[0], torch.tensor([0.8, 0.1, 0.1]))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_have_mixed_targets(kind: str) -> None:
    plain, mixed = (batch_of(build(**settings), [0, 1]) for settings in ({}, {kind: 1.0}))
    share = mixed["targets"][0, 0]
    assert 0 < share < 1
    torch.testing.assert_close(mixed["targets"], torch.tensor([[share, 1 - share, 0], [1 - share, share, 0]]))
    if kind == "mixup":
        expected = share * plain["images"] + (1 - share) * plain["images"].flip(0)
        torch.testing.assert_close(mixed["images"], expected)
    else:
        own = (mixed["images"][0] == plain["images"][0]).all(dim=0).float().mean()
        assert own == pytest.approx(float(share), abs=0.02)


def test_of_an_odd_number_one_picture_stays_as_it_is() -> None:
    plain, mixed = (batch_of(build(**settings), [0, 1, 2]) for settings in ({}, {"mixup": 1.0}))
    assert torch.equal(plain["images"][2], mixed["images"][2])
    assert torch.equal(plain["targets"][2], mixed["targets"][2])
    assert not torch.equal(plain["images"][0], mixed["images"][0])


def test_the_strongest_posterisation_leaves_a_bit() -> None:
    transform = build(rand_augment="rand-m10-n1-p1.0-mstd0-inc1-tPosterizeIncreasing")
    operations = [item for item in transform.augment.ops if item.name == "PosterizeIncreasing"]
    assert operations
    assert operations[0].level_fn(10.0, {}) == (1,)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("crop_scale", (0.0, 1.0)),
        ("flip_prob", 1.5),
        ("random_erasing", -0.1),
        ("mixup", -1.0),
        ("label_smoothing", 1.0),
        ("rand_augment", "augmix-m3"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, value) -> None:
    with pytest.raises(ValueError, match=f"^{setting}="):
        AugmentConfig(**{setting: value})


def test_rand_augment_wants_three_channels() -> None:
    with pytest.raises(ValueError, match=r"rand_augment='rand-m9-mstd0\.5-inc1': needs 3 channels, not 1"):
        SupervisedTransform(AugmentConfig(), 3, (32, 32), (0.5,), (0.5,))
