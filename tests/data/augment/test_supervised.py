import random
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment
from timm.data.transforms_factory import create_transform
from torchvision.transforms.v2 import functional as TF

from ssl_vit.data.augment.supervised import AugmentConfig, SupervisedTransform, _seeded
from ssl_vit.data.transform import Normalization
from tests.specs import grey, spec

PLAIN = {"rand_augment": None, "random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}


def batch_of(transform: SupervisedTransform, seeds: list[int], channels: int = 3) -> dict[str, torch.Tensor]:
    image = torch.randint(0, 256, (channels, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    samples = [transform(image, np.random.default_rng(seed)) for seed in seeds]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    batch["label"] = torch.arange(len(seeds)) % 3
    return transform.on_device(batch, torch.device("cpu"))


def build(**changes) -> SupervisedTransform:
    return SupervisedTransform(AugmentConfig(**(PLAIN | changes)), 3, spec(32, 24))


class TestDrawsAreIndependent:
    """One image after another through RandAugment, erasing and mixing, as a batch of two each."""

    SAMPLES = 600

    @pytest.fixture(scope="class")
    @classmethod
    def drawn(cls) -> np.ndarray:
        """For each sample: operations of RandAugment, whether it is erased, whether the batch is cut (not mixed)."""
        config = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25, mixup=0.8, cutmix=1.0)
        transform = SupervisedTransform(config, 3, spec(16))
        image, applied = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8), []
        for operation in transform.augment.ops:
            operation.aug_fn = lambda image, *_, **__: applied.append(1) or image
        rows = []
        with (
            mock.patch("timm.data.random_erasing._get_pixels", return_value=0.0) as erased,
            mock.patch("timm.data.mixup.cutmix_bbox_and_lam", return_value=((0, 1, 0, 1), 0.5)) as cut,
        ):
            for seed in range(cls.SAMPLES):
                applied.clear()
                erased.reset_mock()
                cut.reset_mock()
                sample = transform(image, np.random.default_rng((seed, 1, 3, 1)))
                batch = {name: value.expand(2, *value.shape).clone() for name, value in sample.items()}
                transform.on_device(batch | {"label": torch.arange(2)}, torch.device("cpu"))
                rows.append((len(applied), erased.called, cut.called))
        return np.array(rows)

    def test_shares_are_those_asked_for(self, drawn: np.ndarray) -> None:
        assert (np.bincount(drawn[:, 0]) / self.SAMPLES) == pytest.approx([0.25, 0.5, 0.25], abs=0.05)
        assert drawn[:, 1:].mean(axis=0) == pytest.approx([0.25, 0.5], abs=0.05)

    @pytest.mark.parametrize("operations", [0, 1, 2])
    def test_erasing_and_mixing_do_not_follow_from_rand_augment(self, drawn: np.ndarray, operations: int) -> None:
        chosen = drawn[drawn[:, 0] == operations]
        assert chosen[:, 1:].mean(axis=0) == pytest.approx([0.25, 0.5], abs=0.13)  # above three deviations of 150

    def test_mixing_does_not_follow_from_erasing(self, drawn: np.ndarray) -> None:
        assert drawn[drawn[:, 1] == 1, 2].mean() == pytest.approx(0.5, abs=0.13)

    def test_the_global_generators_get_different_seeds(self) -> None:
        with _seeded(7):
            words = {random.getstate()[1][:-1], tuple(np.random.get_state()[1].tolist())}  # noqa: NPY002
            assert np.random.randint(2**32, size=50, dtype=np.uint32)[-1] not in torch.randint(2**32, (60,))  # noqa: NPY002
        assert len(words) == 2


class TestRandAugmentIsTimms:
    """As MAE's fine-tuning asks timm for it: create_transform(..., interpolation="bicubic")."""

    NAME, MEAN, STD = "rand-m9-mstd0.5-inc1", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls) -> tuple[RandAugment, RandAugment]:
        theirs = create_transform(
            224,
            is_training=True,
            auto_augment=cls.NAME,
            interpolation="bicubic",
            re_prob=0.25,
            mean=cls.MEAN,
            std=cls.STD,
        )
        ours = SupervisedTransform(
            AugmentConfig(rand_augment=cls.NAME), 10, spec(224, normalization=Normalization(cls.MEAN, cls.STD))
        )
        [augment] = [item for item in theirs.transforms if isinstance(item, RandAugment)]
        return ours.augment, augment

    def test_operations_and_their_parameters(self, pair: tuple[RandAugment, RandAugment]) -> None:
        ours, theirs = pair
        assert ours.num_layers == theirs.num_layers
        for own, other in zip(ours.ops, theirs.ops, strict=True):
            assert repr(own) == repr(other)
            assert (own.kwargs, own.hparams) == (other.kwargs, other.hparams)
            assert own.kwargs["resample"] == Image.Resampling.BICUBIC

    def test_the_same_seed_gives_the_same_image(self, pair: tuple[RandAugment, RandAugment]) -> None:
        y, x = np.mgrid[:60, :60]
        pixels = np.stack([4 * x, 4 * y, 2 * (x + y)], axis=-1).astype(np.uint8)
        same = 0
        for seed in range(40):
            images = []
            for augment in pair:
                with _seeded(seed):
                    images.append(np.asarray(augment(Image.fromarray(pixels))))
            same += np.array_equal(*images)
        assert same == 40

    def test_geometric_operations_are_bicubic(self) -> None:
        augment = build(rand_augment="rand-m9-n1-p1.0").augment
        [rotate] = [item for item in augment.ops if item.name == "Rotate"]
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
        with _seeded(1):
            found = np.asarray(rotate(image))
        turned = [
            np.asarray(image.rotate(sign * 27, Image.Resampling.BICUBIC, fillcolor=(128,) * 3)) for sign in (1, -1)
        ]
        assert any(np.array_equal(found, expected) for expected in turned)


def test_turns_and_vertical_flips_are_drawn_for_supervised_training_too() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, :16, :16] = 255
    transform = build(crop_scale=(1.0, 1.0), flip_prob=0.0, quarter_turn_prob=0.75, flip_vertical_prob=0.5)
    crops = [transform(image, np.random.default_rng(seed))["images"] for seed in range(40)]
    corners = {TF.resize(crop, [2, 2])[0].argmax().item() for crop in crops}
    assert corners == {0, 1, 2, 3}


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


def test_of_an_odd_number_one_image_stays_unmixed() -> None:
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
        ("quarter_turn_prob", 2.0),
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
        SupervisedTransform(AugmentConfig(), 3, spec(32, normalization=grey(1)))
