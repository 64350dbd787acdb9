import math

import pytest

from ssl_vit.core.schedules import cosine, warmup_cosine, warmup_drop, warmup_linear


def test_warm_up_is_a_line_from_zero_and_then_half_a_cosine() -> None:
    assert warmup_cosine(0.0, 0.1, 2.0, 0.0) == 0.0
    assert warmup_cosine(0.05, 0.1, 2.0, 0.0) == pytest.approx(1.0)
    assert warmup_cosine(0.1, 0.1, 2.0, 0.0) == pytest.approx(2.0)
    assert warmup_cosine(0.55, 0.1, 2.0, 1.0) == pytest.approx(1.5)
    assert warmup_cosine(1.0, 0.1, 2.0, 0.25) == pytest.approx(0.25)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert warmup_cosine(0.0, 0.0, 2.0, 0.0) == 2.0


def test_is_the_papers_rate_at_a_fractional_epoch() -> None:
    """MAE: lr = peak * epoch / 40 before epoch 40, then half a cosine over the other 760."""
    peak, epoch = 2.4e-3, 123.4
    expected = peak * 0.5 * (1 + math.cos(math.pi * (epoch - 40) / 760))
    assert warmup_cosine(epoch / 800, 40 / 800, peak, 0.0) == pytest.approx(expected)


def test_cosine_runs_up_as_well_as_down() -> None:
    values = [cosine(progress / 10, 0.04, 0.4) for progress in range(11)]
    assert values == sorted(values)
    assert (values[0], values[-1]) == pytest.approx((0.04, 0.4))


def test_a_linear_warm_up_ends_at_its_end() -> None:
    values = [warmup_linear(progress, 0.3, 0.04, 0.07) for progress in (0.0, 0.15, 0.3, 1.0)]
    assert values == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert warmup_linear(0.0, 0.0, 0.04, 0.07) == 0.07


def test_a_rate_that_drops_is_constant_before_and_after() -> None:
    """SimMIM's 800 epochs: 10 of warm-up, a tenth from epoch 700 on."""
    found = [warmup_drop(epoch / 800, 10 / 800, 2.0, 0.875) for epoch in (0, 5, 10, 699, 700, 800)]
    assert found == pytest.approx([0.0, 1.0, 2.0, 2.0, 0.2, 0.2])
