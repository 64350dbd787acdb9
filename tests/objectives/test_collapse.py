import math
import re

import pytest
import torch

from ssl_vit.objectives.collapse import PrototypeUse, diagnose, feature_std, rankme

HEALTHY = {"teacher_entropy": 2.0, "kl": 0.5, "feature_std": 0.6, "prototypes_used": 0.4}


def test_spread_is_one_for_directions_everywhere_and_zero_for_one() -> None:
    assert feature_std(torch.randn(4096, 16)).item() == pytest.approx(1.0, abs=0.02)
    assert feature_std(torch.randn(1, 16).repeat(8, 1)).item() == pytest.approx(0.0, abs=1e-6)


def test_rankme_counts_dimensions() -> None:
    orthogonal, _ = torch.linalg.qr(torch.randn(64, 8))
    assert rankme(orthogonal).item() == pytest.approx(8, rel=1e-3)
    assert rankme(torch.randn(32, 1) @ torch.randn(1, 8)).item() == pytest.approx(1, rel=1e-2)


def test_features_that_are_not_finite_do_not_stop_it() -> None:
    assert rankme(torch.full((4, 8), float("nan"))).isfinite()


def test_prototypes_in_use_are_counted_over_an_interval() -> None:
    use = PrototypeUse()
    use.note(torch.eye(8)[[0, 1]])
    use.note(torch.eye(8)[[1, 1]])
    assert use.read().item() == pytest.approx(2 / 4)  # four samples could have used four
    use.note(torch.eye(8)[[0] * 20])
    assert use.read().item() == pytest.approx(1 / 8)  # twenty could have used all eight


def test_a_healthy_run_has_no_diagnosis() -> None:
    assert diagnose(HEALTHY, 512) is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"teacher_entropy": 0.999 * math.log(512), "kl": 0.001}, "stands at ln K = 6.24.*teacher_temp"),
        ({"feature_std": 0.01}, "nearly the same features.*centering"),
        ({"teacher_entropy": 0.01, "kl": 0.02, "prototypes_used": 0.01}, "same few prototypes.*teacher_temp"),
    ],
)
def test_each_way_to_collapse_is_told_apart(values: dict[str, float], words: str) -> None:
    diagnosis = diagnose({**HEALTHY, **values}, 512)
    assert diagnosis is not None
    assert re.search(words, diagnosis)
