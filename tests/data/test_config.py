import math

import pytest

from ssl_vit.data.augment.multicrop import MultiCropConfig
from ssl_vit.data.augment.supervised import AugmentConfig
from ssl_vit.data.config import DataConfig
from ssl_vit.evaluation.evaluate import EvaluationConfig
from ssl_vit.objectives.dinov2 import DINOv2Config
from ssl_vit.objectives.mae import MAEConfig


def test_settings_that_rounding_put_a_hair_outside_are_clamped():
    data = DataConfig(source="x", mean=(-1e-9, 1.0000001, 0.5), std=(1 + 1e-7, 1, 0.25), max_bad_share=1 + 1e-12)
    assert (data.mean, data.std, data.max_bad_share) == ((0, 1, 0.5), (1, 1, 0.25), 1)
    crops = MultiCropConfig(global_crop_scale=(0.4, 1.0000002), flip_prob=-1e-8, solarize_prob=(0.0, 0.2, -1e-9))
    assert (crops.global_crop_scale, crops.flip_prob, crops.solarize_prob) == ((0.4, 1), 0, (0, 0.2, 0))
    mae = MAEConfig(crop_scale=(0.2, 1 + 1e-9), quarter_turn_prob=0.1 * 3 + 0.7000000001)
    assert (mae.crop_scale, mae.quarter_turn_prob) == ((0.2, 1), 1)
    assert DINOv2Config(mask_prob=1 + 1e-9).mask_prob == AugmentConfig(random_erasing=1 + 1e-9).random_erasing == 1
    with pytest.raises(ValueError, match=r"flip_prob=1\.001: must lie in"):
        MAEConfig(flip_prob=1.001)
    assert EvaluationConfig(crop_pct=1 + 1e-7).crop_pct == 1


@pytest.mark.parametrize(
    "settings",
    [{"mean": (123.7, 0.5, 0.5)}, {"mean": (-0.01,), "std": (1,)}, {"std": (0.2, 1.01, 0.2)}, {"std": (0, 1, 1)},
     {"mean": (math.nan, 0, 0)}, {"max_bad_share": 1.1}],
)  # fmt: skip
def test_settings_far_outside_are_refused_with_what_they_are(settings: dict):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=rf"^{name}=.*must lie in [\[(]0, 1\]; (one number per channel|1 never)"):
        DataConfig(source="x", **settings)
