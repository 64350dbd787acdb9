"""`auto` settings that several objectives share."""

from types import ModuleType

import pytest

from scripts import pretrain_dino, pretrain_dinov2, pretrain_lejepa
from ssl_vit.data.transform import InputSpec, Normalization
from ssl_vit.objectives.dino import DINOConfig
from ssl_vit.objectives.dinov2 import DINOv2Config
from ssl_vit.objectives.lejepa import LeJEPAConfig
from ssl_vit.objectives.objective import RunSize
from ssl_vit.training.config import parse_run


@pytest.mark.parametrize("kind", [DINOConfig, DINOv2Config, LeJEPAConfig])
@pytest.mark.parametrize(("side", "widest"), [(448, 2.0), (224, 2.0), (48, 0.43), (8, 0.1)])
def test_small_images_are_blurred_less(kind: type, side: int, widest: float) -> None:
    found = kind(blur_sigma="auto").resolve(RunSize(5_000, 64, 100, image_size=(side, 448)))["blur_sigma"]
    assert found.value == (0.1, widest)
    assert str(found).startswith(f"[0.1, {widest}]: {'the papers' if side >= 224 else '2 pixels of'}")
    kind(blur_sigma=found.value)  # which refuses impossible values


@pytest.mark.parametrize("front", [pretrain_dino, pretrain_dinov2, pretrain_lejepa])
def test_the_default_blur_follows_the_size_of_images(front: ModuleType) -> None:
    config, reasons = parse_run(front.DEFAULTS, ["--data.source=x", "--steps=9", "--encoder.image_size=48"]).resolve(
        100
    )
    assert config.objective.blur_sigma == (0.1, 0.43)  # pyright: ignore[reportAttributeAccessIssue]
    assert [line for line in reasons if line.startswith("objective.blur_sigma [0.1, 0.43]: ")]


def test_a_blur_that_is_given_stays() -> None:
    assert not LeJEPAConfig(weight=0.1).resolve(RunSize(5_000, 64, 100))


def test_a_blur_that_is_still_auto_is_refused() -> None:
    spec = InputSpec((224, 224), (16, 16), Normalization((0.5,) * 3, (0.5,) * 3))
    with pytest.raises(ValueError, match="blur_sigma='auto': follows from"):
        LeJEPAConfig(blur_sigma="auto").build_transform(spec)
