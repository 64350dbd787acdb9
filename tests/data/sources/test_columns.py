from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssl_vit.data.config import DataConfig
from ssl_vit.data.sources.source import Source, open_source
from tests.data.shards import numbered_png

NAMED = datasets.ClassLabel(names=["a", "b", "c"])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def source(folder: Path, values: Any, kind: datasets.ClassLabel | None = None, column: str | None = None) -> Source:
    """A parquet file as another tool may write it: the names of its classes bind no number."""
    values = values if isinstance(values, pa.Array) else pa.array(values)
    table = pa.table({"image": [numbered_png(0)] * len(values), "label": values})
    if kind is not None:
        features = datasets.Features({"image": datasets.Value("binary"), "label": kind})
        table = table.replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(table, folder / "x.parquet")
    return open_source(DataConfig(source=str(folder / "x.parquet"), label_column=column))


def labels(opened: Source) -> list[int] | None:
    return None if opened.labels is None else opened.labels.tolist()


def test_declared_classes_are_kept_and_none_and_minus_one_are_no_label(tmp_path: Path) -> None:
    opened = source(tmp_path, [0, -1, 2, None], NAMED)
    assert (opened.class_names, opened.num_classes) == (("a", "b", "c"), 2)
    assert labels(opened) == [0, -1, 2, -1]


@pytest.mark.parametrize(
    ("values", "kind", "told"),
    [
        ([0, 1, 3], NAMED, r"row 2 holds 3; labels count from 0 \(-1 = no label\) to below 3"),
        ([0, -7, 1], NAMED, "row 1 holds -7; "),
        ([0, 254, 255], NAMED, "row 1 holds 254; "),
        ([0, -2, 1], None, "row 1 holds -2; "),
        ([1, 0, 10**12], None, "row 2 holds 1000000000000; .* below 1000000;"),
        (pa.array([1, 2**63 + 5, 3], pa.uint64()), None, "row 1 holds 9223372036854775813; "),
        (pa.array([1, 2**64 - 1, 3], pa.uint64()), None, "row 1 holds 18446744073709551615; "),
    ],
)
def test_numbers_out_of_range_are_refused_by_row_and_value(tmp_path: Path, values: Any, kind: Any, told: str) -> None:
    for column in (None, "label"):
        with pytest.raises(ValueError, match=rf"^data.label_column='label': {told}") as caught:
            source(tmp_path, values, kind, column)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "column"),
    [([0.0, 1.0, 1.0], "label"), ([0.0, float("nan"), 1.0], "label"), ([[0], [1], [1]], "label")],
)
def test_floats_and_lists_are_refused_where_named_and_told_of_where_not(
    tmp_path: Path, values: Any, column: str
) -> None:
    with pytest.raises(ValueError, match=r"^data.label_column='label': holds \w+; labels are classes, integers, bool"):
        source(tmp_path, values, None, column)
    opened = source(tmp_path, values)
    assert labels(opened) is None
    assert opened.notes[0].startswith("no labels: column 'label' holds ")


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([0, 255, 2, 255], NAMED, [0, -1, 2, -1]),
        ([3, 255, 3, 127], None, [0, -1, 0, 1]),
        (pa.array([1, 255], pa.uint8()), None, [0, -1]),
        ([3, 255, 200, 128], None, [0, 3, 2, 1]),  # of so wide a range 255 is one
        ([3, 255, 0, 1], datasets.ClassLabel(num_classes=256), [3, 255, 0, 1]),
        ([255, 255, 255, None], None, None),
    ],
)
def test_255_is_no_label_where_all_others_are_small(tmp_path: Path, values: Any, kind: Any, expected: Any) -> None:
    opened = source(tmp_path, values, kind)
    assert labels(opened) == expected
    passed_over = expected is None or -1 in expected
    assert any("hold 255 and count as rows without a label" in note for note in opened.notes) == passed_over


def test_only_numbers_that_occur_are_classes(tmp_path: Path) -> None:
    opened = source(tmp_path, [700_000, 5, 5, None, 700_000])
    assert (labels(opened), opened.class_names, opened.num_classes) == ([1, 0, 0, -1, 1], ("5", "700000"), 2)


def test_numbers_that_hardly_repeat_are_no_classes_unless_named(tmp_path: Path) -> None:
    values = [*range(20), 3, 4]
    opened = source(tmp_path, values)
    assert (labels(opened), opened.class_names) == (None, ())
    assert opened.notes == (
        "no labels: column 'label' holds 20 different numbers in 22 rows; give --data.label_column label if these are "
        "classes",
    )
    assert labels(source(tmp_path, values, None, "label")) == values
    assert labels(source(tmp_path, values, datasets.ClassLabel(num_classes=20))) == values
    assert labels(source(tmp_path, [*range(20)] * 2)) == [*range(20)] * 2


@pytest.mark.parametrize(("values", "named"), [(["cat", "dog", None], [0, 1, -1]), ([True, False, None], [1, 0, -1])])
def test_strings_and_booleans_are_classes_where_named_and_told_of_where_not(
    tmp_path: Path, values: Any, named: list[int]
) -> None:
    opened = source(tmp_path, values)
    assert labels(opened) is None
    assert "give --data.label_column label if these are classes" in opened.notes[0]
    assert labels(source(tmp_path, values, None, "label")) == named
    assert np.array_equal(opened.columns["label"], values)
