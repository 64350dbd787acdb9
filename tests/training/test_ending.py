"""The images that a run is scored on."""

import io
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ssl_vit.data.config import DataConfig
from ssl_vit.data.sources.stream import open_images
from ssl_vit.evaluation.evaluate import EvaluationConfig
from ssl_vit.objectives.mae import MAEConfig
from ssl_vit.training.config import RunConfig
from ssl_vit.training.ending import open_test_source, prepare


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path: Path) -> str:
    for number in range(8):
        file = path / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    return str(path)


def table(path: Path, image: str, label: str) -> str:
    images = [png(number) for number in range(8)]
    pq.write_table(pa.table({image: images, "thumb": images, label: ["a", "b"] * 4}), path)
    return str(path)


def config_of(data: dict[str, Any], **evaluation: str) -> RunConfig:
    return RunConfig(
        objective=MAEConfig(),
        output_dir="x",
        steps=1,
        data=DataConfig(**data),
        evaluation=EvaluationConfig(**evaluation),  # pyright: ignore[reportArgumentType]
    )


@pytest.mark.parametrize("named", ["source", "test_source"])
@pytest.mark.parametrize("split", ["train", "train[:50%]"])
@pytest.mark.parametrize("below", ["", "train"])
def test_a_folder_is_judged_by_beside_a_table_with_columns(tmp_path: Path, named: str, split: str, below: str) -> None:
    data = {"source": table(tmp_path / "a.parquet", "img", "kind"), "split": split}
    data |= {"image_column": "img", "label_column": "kind"}
    folder(tmp_path / "labelled" / below)
    if below:
        folder(tmp_path / "labelled" / "val")
    config = config_of(data, **{named: str(tmp_path / "labelled")})
    _, found = prepare(config, open_images(config.data))
    assert found is not None
    judged = found.labelled if named == "source" else found.test
    assert judged is not None
    assert (len(judged), judged.class_names) == (8, ("a", "b"))


def test_a_table_has_columns_of_its_own(tmp_path: Path) -> None:
    data = {"source": table(tmp_path / "a.parquet", "img", "kind"), "image_column": "img", "label_column": "kind"}
    rows = {"image": [{"bytes": png(number), "path": None} for number in range(8)], "label": list(range(4)) * 2}
    pq.write_table(pa.table(rows), tmp_path / "b.parquet")
    config = config_of(data, source=str(tmp_path / "b.parquet"))
    _, found = prepare(config, open_images(config.data))
    assert found is not None
    assert found.labelled.num_classes == 4


def test_what_was_said_of_the_source_itself_is_not_passed_over(tmp_path: Path) -> None:
    source = table(tmp_path / "a.parquet", "img", "kind")
    wrong = {"source": source, "image_column": "img", "label_column": "knid"}
    for evaluation in ({"source": source}, {"test_source": source}):
        with pytest.raises(ValueError, match=r"data\.label_column='knid': no such column"):
            prepare(config_of(wrong, **evaluation), open_images(DataConfig(source, image_column="img")))
    given = {"test_source": folder(tmp_path / "labelled"), "test_split": "val"}
    with pytest.raises(ValueError, match=r"evaluation\.test_split='val': "):
        open_test_source(config_of({"source": source, "image_column": "img"}, **given))
