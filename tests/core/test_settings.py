import pytest

from ssl_vit.core.settings import as_flags, said_of

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
        said_of({"data.source": "data.test_source"}),
    ):
        raise ValueError("data.source='b': as data.source_of")
