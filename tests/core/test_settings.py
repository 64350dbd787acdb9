from dataclasses import dataclass

import pytest

from ssl_vit.core.settings import as_flags, check_given, check_interval, check_ranges, renamed_settings, section

KEYS = {"source": None, "label_column": None, "probe.epochs": None}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "data.source='a': name data.label_column, or\n --data.cache",
            "--source='a': name --label_column, or --data.cache",
        ),
        ("evaluation.source='x': no", "--source='x': no"),
        ("probe.epochs=0: must be at least 1", "--probe.epochs=0: must be at least 1"),
        ("my/data.source: is a file", "my/data.source: is a file"),
        ("give --data.streaming true", "give --data.streaming true (not here: streams are for training)"),
    ],
)
def test_errors_of_shared_code_name_the_flags_of_the_front(text: str, shown: str) -> None:
    assert as_flags(text, KEYS) == shown


def test_another_setting_may_be_at_fault() -> None:
    with (
        pytest.raises(ValueError, match=r"^data.test_source='b': as data.source_of"),
        renamed_settings({"data.source": "data.test_source"}),
    ):
        raise ValueError("data.source='b': as data.source_of")


@dataclass(frozen=True)
class Numbers:
    share: float = 0.5
    count: int | None = None
    pair: tuple[float, float] = (0.1, 0.2)


@pytest.mark.parametrize(
    ("values", "allowed", "message"),
    [
        ({"share": 1.1}, {"share": "[0, 1]"}, r"^share=1.1: must lie in \[0, 1\]$"),
        ({"share": 0.0}, {"share": "(0, 1]"}, r"^share=0.0: must lie in \(0, 1\]$"),
        ({"share": float("nan")}, {"share": "[0, inf)"}, "^share=nan: must be at least 0$"),
        ({"share": float("inf")}, {"share": "(0, inf)"}, "^share=inf: must be above 0$"),
        ({"count": 0}, {"count": "[1, inf); null sets none"}, "^count=0: must be at least 1; null sets none$"),
        ({"count": 300}, {"count": "(0, 240] minutes"}, r"^count=300: must lie in \(0, 240\] minutes$"),
        ({"pair": (0.1, 2.0)}, {"pair": "[0, 1)"}, r"^pair=\(0.1, 2.0\): must lie in \[0, 1\)$"),
    ],
)
def test_numbers_out_of_their_range_are_refused(values: dict, allowed: dict[str, str], message: str) -> None:
    check_ranges(Numbers(), share="[0, 1]", count="[1, inf)", pair="(0, 1)")
    with pytest.raises(ValueError, match=message):
        check_ranges(Numbers(**values), **allowed)


def test_numbers_that_miss_a_bound_by_rounding_are_moved_to_it() -> None:
    numbers = Numbers(share=1 + 1e-9, pair=(0.5, 1 + 1e-9))
    check_ranges(numbers, share="[0, 1]")
    check_interval(numbers, "pair")
    assert (numbers.share, numbers.pair) == (1, (0.5, 1))
    with pytest.raises(ValueError, match="needs 0 < smallest <= largest <= 1"):
        check_interval(Numbers(pair=(0.5, 0.4)), "pair")


def test_lists_of_settings_hold_something_and_nothing_twice() -> None:
    check_given(Numbers(pair=(0.5, 0.4)), "pair")
    for values in ((), (0.5, 0.5)):
        with pytest.raises(ValueError, match=r"^pair=\(.*\): give at least one value, and none twice$"):
            check_given(Numbers(pair=values), "pair")


def test_an_error_that_names_its_own_section_keeps_it() -> None:
    with pytest.raises(ValueError, match=r"^objective.mask_ratio=2: "), section("objective"):
        raise ValueError("mask_ratio=2: too large")
    with pytest.raises(ValueError, match=r"^encoder.image_size=30: "), section("objective"):
        raise ValueError("encoder.image_size=30: does not fit")
