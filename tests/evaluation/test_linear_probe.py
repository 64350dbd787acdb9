from dataclasses import replace

import numpy as np
import pytest
import torch

from ssl_vit.evaluation.linear_probe import PRESETS, LinearProbeConfig, linear_probe, num_steps

QUICK = LinearProbeConfig(features=("cls", "mean"), base_lrs=(0.01, 0.1, 1.0), epochs=20, batch_size=32)


def toy(n: int, seed: int = 0, separable: bool = True) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Patch means that tell four classes apart, and class tokens that tell nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    noise = torch.randn(n, 8, generator=generator)
    mean = 4 * torch.eye(8)[labels] + 0.3 * noise if separable else noise
    return {"cls": torch.randn(n, 2, 8, generator=generator), "mean": mean}, labels.numpy()


@pytest.mark.parametrize(
    "preset",
    [
        QUICK,
        replace(PRESETS["mae"], epochs=40),
        pytest.param(replace(PRESETS["dinov2"], epochs=40), marks=pytest.mark.slow),
    ],
)
def test_separable_features_reach_100_percent(preset: LinearProbeConfig) -> None:
    (train, labels), (test, answers) = toy(400), toy(200, seed=1)
    found = linear_probe([train], labels, test, preset, num_classes=4)
    assert (found.predictions.numpy() == answers).all()
    assert "mean" in found.feature


@pytest.mark.parametrize("preset", [QUICK, PRESETS["mae"]])
def test_shuffled_labels_stay_at_chance(preset: LinearProbeConfig) -> None:
    (train, labels), (test, answers) = toy(400), toy(2000, seed=1)
    accuracies = []
    for seed in range(6):
        shuffled = np.random.default_rng(seed).permutation(labels)
        found = linear_probe([train], shuffled, test, replace(preset, epochs=3), num_classes=4)
        accuracies.append((found.predictions.numpy() == answers).mean())
    # Whole clusters fall to one class or another: of one shuffle alone the accuracy is a small number of quarters.
    assert np.mean(accuracies) == pytest.approx(0.25, abs=0.1)
    noise, shuffled = toy(2000, seed=2, separable=False)
    found = linear_probe([noise], shuffled, test | toy(2000, 3, False)[0], replace(preset, epochs=3), num_classes=4)
    assert (found.predictions.numpy() == answers).mean() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)


def test_the_best_head_is_picked_without_the_test_set() -> None:
    train, labels = toy(200)
    tests = [toy(50, seed=1)[0], toy(50, seed=1, separable=False)[0]]
    found = [linear_probe([train], labels, test, QUICK, num_classes=4) for test in tests]
    assert found[0][1:] == found[1][1:]
    assert set(found[0].held_out) == {(kind, lr) for kind in QUICK.features for lr in QUICK.base_lrs}
    assert found[0].held_out["mean", 0.1] > found[0].held_out["cls", 0.1]
    assert found[0].held_out[found[0].feature, found[0].base_lr] == max(found[0].held_out.values())


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_heads_trained_together_are_those_trained_alone(optimizer: str) -> None:
    """What a grid of heads finds on the held-out part is what each finds in a grid of one other head."""
    train, labels = toy(120)
    config = replace(QUICK, optimizer=optimizer, epochs=3, batch_norm=True)
    together = linear_probe([train], labels, train, config, num_classes=4).held_out
    for pair in ((0.01, 0.1), (0.1, 1.0)):
        for kind in config.features:
            small = replace(config, features=(kind,), base_lrs=pair)
            alone = linear_probe([train], labels, train, small, num_classes=4).held_out
            assert alone == {(kind, lr): together[kind, lr] for lr in pair}


def test_the_same_call_gives_the_same_result_and_every_step_is_reported() -> None:
    train, labels = toy(90)
    steps = []
    first, again = (
        linear_probe([train], labels, train, QUICK, num_classes=4, on_step=lambda: steps.append(1)) for _ in range(2)
    )
    assert torch.equal(first.predictions, again.predictions)
    assert first[1:] == again[1:]
    assert len(steps) == 2 * num_steps(90, QUICK)
    single = replace(QUICK, features=("mean",), base_lrs=(0.1,))
    steps.clear()
    assert linear_probe([train], labels, train, single, num_classes=4, on_step=lambda: steps.append(1)).held_out == {}
    assert len(steps) == num_steps(90, single)


@pytest.mark.parametrize("n", range(3, 41))
def test_a_batch_norm_learns_from_any_number_of_images(n: int) -> None:
    """No batch may be of one image, whatever remains of so few when some are held out."""
    train, labels = toy(n)
    steps = []
    config = replace(QUICK, epochs=2, batch_norm=True, base_lrs=(0.1, 1.0))
    found = linear_probe([train], labels, train, config, num_classes=4, on_step=lambda: steps.append(1))
    assert len(found.predictions) == n
    if n >= 5:  # of fewer, each is the only one of its class, and none is held out
        assert len(steps) == num_steps(n, config)


def test_a_batch_norm_refuses_a_single_image() -> None:
    train, labels = toy(1)
    with pytest.raises(ValueError, match="batch_norm=True: needs at least 2 training images"):
        linear_probe([train], labels, train, replace(QUICK, batch_norm=True), num_classes=4)


def test_views_are_taken_in_turns_and_heads_compared_on_the_centre_crop() -> None:
    train, labels = toy(100)
    useless = {name: torch.zeros_like(values) for name, values in train.items()}
    config = replace(QUICK, features=("mean",), epochs=2, base_lrs=(0.1, 1.0))
    only_first = linear_probe([train], labels, train, replace(config, epochs=1), num_classes=4)
    both = linear_probe([train, useless], labels, train, config, num_classes=4)
    assert both.held_out["mean", 1.0] >= 0.9  # an epoch of each: the first one suffices
    none = linear_probe([useless], labels, train, config, num_classes=4, clean=train)
    assert none.held_out["mean", 1.0] <= 0.5
    assert only_first.held_out["mean", 1.0] >= 0.9


def test_a_head_that_hardly_learns_wins_no_tie() -> None:
    """Of heads that are right about the whole held-out part, the one of the lowest loss is picked."""
    (train, labels), (test, answers) = toy(40), toy(200, seed=1)
    config = replace(QUICK, features=("mean",), base_lrs=(0.5, 1.0, 5.0), epochs=50)
    found = linear_probe([train], labels, test, config, num_classes=4)
    assert set(found.held_out.values()) == {1.0}
    assert found.base_lr == 5.0
    assert (found.predictions.numpy() == answers).all()


def test_without_a_held_out_part_the_middle_rate_is_taken() -> None:
    train, labels = toy(4)  # one image of each class
    config = replace(QUICK, features=("mean", "cls"), base_lrs=(1e-6, 10.0, 0.1))
    found = linear_probe([train], labels, train, config, num_classes=4)
    assert (found.feature, found.base_lr, found.held_out) == ("mean", 0.1, {})


def test_a_class_of_one_image_can_be_there() -> None:
    train, labels = toy(41)
    labels[-1] = 4
    assert len(linear_probe([train], labels, train, QUICK, num_classes=5).predictions) == 41


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("features", ("token",)),
        ("features", ()),
        ("base_lrs", ()),
        ("base_lrs", (0.1, 0.0)),
        ("epochs", 0),
        ("batch_size", 0),
        ("views", -1),
        ("held_out", 1),
        ("warmup", 1.0),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, value) -> None:
    with pytest.raises(ValueError, match=f"^{setting}="):
        LinearProbeConfig(**{setting: value})


def test_the_presets_are_the_papers() -> None:
    dinov2, mae = PRESETS["dinov2"], PRESETS["mae"]
    assert len(dinov2.base_lrs) == 13
    assert (min(dinov2.base_lrs), max(dinov2.base_lrs), dinov2.optimizer) == (1e-5, 0.1, "sgd")
    assert (mae.optimizer, mae.base_lrs[0], mae.batch_size, mae.epochs) == ("lars", 0.1, 16384, 90)
    assert mae.batch_norm
    assert mae.warmup == pytest.approx(10 / 90)
