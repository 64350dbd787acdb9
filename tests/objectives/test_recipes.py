"""`auto` settings that several objectives share."""

import pytest

from ssl_vit.data.transform import InputSpec, Normalization
from ssl_vit.objectives.dino import DINOConfig
from ssl_vit.objectives.dinov2 import DINOv2Config
from ssl_vit.objectives.lejepa import LeJEPAConfig
from ssl_vit.objectives.objective import RunSize


@pytest.mark.parametrize("kind", [DINOConfig, DINOv2Config, LeJEPAConfig])
@pytest.mark.parametrize(("side", "widest"), [(448, 2.0), (224, 2.0), (48, 0.43), (8, 0.1)])
def test_small_images_are_blurred_less(kind: type, side: int, widest: float) -> None:
    found = kind(blur_sigma="auto").resolve(RunSize(5_000, 64, 100, image_size=(side, 448)))["blur_sigma"]
    assert found.value == (0.1, widest)
    assert str(found).startswith(f"[0.1, {widest}]: {'the papers' if side >= 224 else '2 pixels of'}")
    kind(blur_sigma=found.value)  # which refuses impossible values


def test_a_blur_that_is_given_stays() -> None:
    assert not LeJEPAConfig(weight=0.1).resolve(RunSize(5_000, 64, 100))


def test_a_blur_that_is_still_auto_is_refused() -> None:
    spec = InputSpec((224, 224), (16, 16), Normalization((0.5,) * 3, (0.5,) * 3))
    with pytest.raises(ValueError, match="blur_sigma='auto': follows from"):
        LeJEPAConfig(blur_sigma="auto").build_transform(spec)
