from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssl_vit.data.config import DataConfig
from ssl_vit.data.sources.fingerprint import fingerprint
from ssl_vit.data.sources.source import Source, open_source
from tests.data.shards import numbered_png


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def key(source: Source, rows: Any = None) -> str:
    return fingerprint(source, np.arange(len(source)) if rows is None else np.asarray(rows))


@pytest.fixture
def mixed(tmp_path: Path) -> Source:
    """Rows of bytes, of nothing, and of files 2 and 4 named from the folder of the table."""
    for number in (2, 4):
        (tmp_path / f"{number}.png").write_bytes(numbered_png(number))
    images = [
        {"bytes": numbered_png(0), "path": "2.png"},
        None,
        {"bytes": None, "path": "2.png"},
        {"bytes": numbered_png(3), "path": None},
        {"bytes": None, "path": "4.png"},
        {"bytes": None, "path": "missing.png"},
    ]
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet")
    return open_source(DataConfig(source=str(tmp_path / "x.parquet")))


def test_each_row_that_lies_in_a_file_counts_wherever_it_stands(tmp_path: Path, mixed: Source) -> None:
    before, first, without = key(mixed), key(mixed, [3, 2]), key(mixed, [0, 1, 3, 5])
    (tmp_path / "4.png").write_bytes(numbered_png(40) + b"longer")
    assert key(mixed) != before
    assert key(mixed, [3, 2]) == first
    assert key(mixed, [0, 1, 3, 5]) == without
    (tmp_path / "missing.png").write_bytes(numbered_png(5))
    assert key(mixed, [0, 1, 3, 5]) != without
    (tmp_path / "2.png").unlink()
    assert key(mixed, [3, 2]) != first


def test_a_subset_is_told_by_its_own_rows(tmp_path: Path, mixed: Source) -> None:
    part, other = mixed.subset(np.array([4, 0])), mixed.subset(np.array([2, 3]))
    keys = key(part), key(other), key(part, [1])
    assert len(set(keys)) == 3
    (tmp_path / "4.png").write_bytes(b"other")
    assert (key(part) != keys[0], key(other) == keys[1], key(part, [1]) == keys[2]) == (True, True, True)


@pytest.mark.parametrize("order", [("table", "photos"), ("photos", "table"), ("other", "photos")])
def test_each_source_of_a_mixture_counts(tmp_path: Path, order: tuple[str, str]) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / f"photos/{number}.png").write_bytes(numbered_png(number))
    for name in ("table", "other"):
        rows = (
            [{"bytes": numbered_png(9), "path": None}] if name == "table" else [{"bytes": None, "path": "photos/0.png"}]
        )
        pq.write_table(pa.table({"image": rows}), tmp_path / f"{name}.parquet")
    names = {"photos": "photos", "table": "table.parquet", "other": "other.parquet"}
    config = DataConfig(source={f"{tmp_path}/{names[name]}": 1.0 for name in order})
    before = key(open_source(config))
    assert key(open_source(config)) == before
    (tmp_path / "photos/2.png").write_bytes(numbered_png(77) + b"longer")
    assert key(open_source(config)) != before


def test_a_table_that_was_written_anew_is_another(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": numbered_png(1), "path": None}]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    sources = [DataConfig(source=str(tmp_path / name)) for name in ("saved", "x.parquet")]
    before = [key(open_source(config)) for config in sources]
    assert [key(open_source(config)) for config in sources] == before
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes())
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    assert all(key(open_source(config)) != old for config, old in zip(sources, before, strict=True))
