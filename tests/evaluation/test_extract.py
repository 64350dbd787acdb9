"""extract_features.py: one file of any source, however often the extraction is killed."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ssl_vit.data.augment.evaluation import EvalTransform
from ssl_vit.data.sources.source import DataConfig, open_source
from ssl_vit.evaluation import command, extract
from ssl_vit.evaluation.extract import ExtractConfig
from ssl_vit.evaluation.feature_files import read_description
from ssl_vit.evaluation.features import EncodeSettings, extract_features, select_feature
from ssl_vit.export import export_backbone, load_backbone
from ssl_vit.models.config import EncoderConfig
from tests.conftest import TINY
from tests.specs import GREY

TRANSFORM = EvalTransform((32, 32), GREY)


def build_backbone(folder: Path) -> Path:
    torch.manual_seed(0)
    encoder = EncoderConfig(image_size=32, **TINY).build()
    export_backbone(encoder, folder, normalization=GREY, provenance={})
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def parquet(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as bytes, with names and numbers."""
    source = open_source(DataConfig(source=str(photo_folder)))
    rows = {
        "image": [{"bytes": Path(row["path"]).read_bytes(), "path": None} for row in source.rows["image"]],
        "name": [f"picture {number}" for number in range(40)],
        "number": [number * 7 for number in range(40)],
    }
    file = tmp_path_factory.mktemp("parquet") / "pictures.parquet"
    features = datasets.Features(
        {"image": datasets.Image(), "name": datasets.Value("string"), "number": datasets.Value("int32")}
    )
    datasets.Dataset.from_dict(rows, features).to_parquet(str(file))
    return file


def run(backbone: Path, source: Path | str, output: Path, *flags: str) -> int:
    given = [str(backbone), f"--source={source}", f"--output={output}", "--precision=no", *flags]
    return command.main(extract.extract, {"": ExtractConfig}, None, given)


def expected(backbone: Path, source: Path, kind: str) -> torch.Tensor:
    encoder, opened = load_backbone(backbone), open_source(DataConfig(source=str(source)))
    settings = EncodeSettings(40, torch.device("cpu"))
    pieces = extract_features(encoder, opened, np.arange(40), TRANSFORM, settings, num_layers=2)
    return select_feature(pieces, kind)


def embeddings(file: Path) -> torch.Tensor:
    if file.suffix == ".safetensors":
        return load_file(file)["embeddings"]
    return torch.tensor(pq.read_table(file).column("embedding").to_pylist())


def remember_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that are encoded from now on."""
    stream, encoded = extract.stream_features, []

    def remember(encoder, source, indices, *args, **settings):
        encoded.extend(indices.tolist())
        return stream(encoder, source, indices, *args, **settings)

    monkeypatch.setattr(extract, "stream_features", remember)
    return encoded


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
@pytest.mark.parametrize("kind", ["cls", "cls4+mean"])
def test_values_are_those_of_the_features(
    backbone: Path, photo_folder: Path, tmp_path: Path, suffix: str, kind: str
) -> None:
    file = tmp_path / "new" / f"features.{suffix}"
    flags = [f"--feature={kind}", "--rows_per_part=7", "--batch_size=5"]
    assert run(backbone, photo_folder, file, *flags) == 0
    torch.testing.assert_close(embeddings(file), expected(backbone, photo_folder, kind), rtol=1e-4, atol=1e-5)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    description = read_description(file)
    assert description is not None
    assert description["class_names"] == ["disc", "square"]
    if suffix == "safetensors":
        assert load_file(file)["labels"].tolist() == [0] * 20 + [1] * 20
    else:
        loaded = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path))
        assert loaded["label"][:] == [0] * 20 + [1] * 20
        assert loaded["row"][:] == list(range(40))
        assert loaded["path"][0] == str(photo_folder / "disc" / "00.png")


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
def test_patches_are_a_grid(backbone: Path, photo_folder: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"features.{suffix}"
    flags = ["--patches=true", "--image_size=[32,48]", "--crop_pct=1", "--dtype=float16", "--rows_per_part=15"]
    assert run(backbone, photo_folder, file, *flags) == 0
    source = open_source(DataConfig(source=str(photo_folder)))
    transform = EvalTransform((32, 48), GREY, crop_pct=1.0)
    images = transform.on_device(transform(source.image(33, 3), 33)[None], torch.device("cpu"))
    tokens = load_backbone(backbone)(images).patches[0].detach().view(4, 6, 32)
    if suffix == "safetensors":
        patches = load_file(file)["patches"]
        assert patches.dtype == torch.float16
        assert patches.shape == (40, 4, 6, 32)
    else:
        patches = torch.tensor(pq.read_table(file).column("patches").to_pylist()).view(40, 4, 6, 32)
    torch.testing.assert_close(patches[33].float(), tokens, rtol=2e-3, atol=2e-3)
    description = read_description(file)
    assert description is not None
    assert description["patch_grid"] == [4, 6]


def test_ids_are_carried_along(
    backbone: Path, parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(backbone, parquet, tmp_path / "text.parquet", "--ids=name", "--rows_per_part=9") == 0
    table = pq.read_table(tmp_path / "text.parquet")
    assert table.column("name").to_pylist() == [f"picture {number}" for number in range(40)]
    assert table.column("path").null_count == 40
    assert "label" not in table.column_names
    assert run(backbone, parquet, tmp_path / "numbers.safetensors", "--ids=number", "--rows_per_part=9") == 0
    assert load_file(tmp_path / "numbers.safetensors")["ids"].tolist() == [7 * number for number in range(40)]
    capsys.readouterr()
    assert run(backbone, parquet, tmp_path / "text.safetensors", "--ids=name") == 2
    assert "ids='name': holds string; parquet takes text and integers" in capsys.readouterr().err
    assert run(backbone, parquet, tmp_path / "x.parquet", "--ids=nam") == 2
    assert "ids='nam': no such column; did you mean 'name'? there are: name, number" in capsys.readouterr().err


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """Three images with columns of numbers, and with names of columns that parquet output has itself."""
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    image = {"bytes": (tmp_path / "picture.png").read_bytes(), "path": None}
    columns = {
        "image": pa.array([image] * 3, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "large": pa.array([2**53 + 1, -(2**63), 2**63 - 1], pa.int64()),
        "gap": pa.array([2**53 + 1, None, 3], pa.int64()),
        "unsigned": pa.array([0, 1, 2**63], pa.uint64()),
        **{name: pa.array([5, 6, 7]) for name in ("row", "path", "label", "embedding", "patches")},
    }
    file = tmp_path / "numbered.parquet"
    pq.write_table(pa.table(columns), file)
    return file


def test_ids_keep_every_digit(
    backbone: Path, numbered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(backbone, numbered, tmp_path / "large.safetensors", "--ids=large", "--rows_per_part=2") == 0
    assert load_file(tmp_path / "large.safetensors")["ids"].tolist() == [2**53 + 1, -(2**63), 2**63 - 1]
    for name, values in {"gap": [2**53 + 1, None, 3], "unsigned": [0, 1, 2**63]}.items():
        file = tmp_path / f"{name}.parquet"
        assert run(backbone, numbered, file, f"--ids={name}", "--rows_per_part=2") == 0
        assert pq.read_table(file).column(name).to_pylist() == values
    capsys.readouterr()
    for name, reason in {"gap": "row 1 holds none", "unsigned": "does not fit int64"}.items():
        assert run(backbone, numbered, tmp_path / "x.safetensors", f"--ids={name}") == 2
        message = capsys.readouterr().err
        assert f"ids='{name}': {reason}" in message
        assert message.rstrip().endswith("write parquet")
    assert not list(tmp_path.glob("x.safetensors*"))


@pytest.mark.parametrize("name", ["row", "path", "label", "embedding", "patches"])
def test_ids_do_not_replace_what_is_written_anyway(
    backbone: Path, numbered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run(backbone, numbered, tmp_path / "x.parquet", f"--ids={name}") == 2
    assert f"ids='{name}': a column of this name is written anyway" in capsys.readouterr().err
    assert run(backbone, numbered, tmp_path / "x.safetensors", f"--ids={name}") == 0
    assert load_file(tmp_path / "x.safetensors")["ids"].tolist() == [5, 6, 7]


def test_what_is_there_is_not_overwritten_silently(
    backbone: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "features.parquet"
    assert run(backbone, photo_folder, file) == 0
    written = file.stat().st_mtime_ns
    assert run(backbone, photo_folder, file) == 0
    assert "is finished" in capsys.readouterr().out
    assert run(backbone, photo_folder, file, "--rows_per_part=7") == 0  # the rows are the same
    assert "is finished" in capsys.readouterr().out
    assert run(backbone, photo_folder, file, "--feature=mean", "--dtype=float16") == 2
    message = capsys.readouterr().err
    assert "feature 'cls' -> 'mean', dtype 'float32' -> 'float16'" in message
    assert "or --fresh" in message
    assert file.stat().st_mtime_ns == written
    assert run(backbone, photo_folder, file, "--feature=mean", "--fresh=true") == 0
    torch.testing.assert_close(embeddings(file), expected(backbone, photo_folder, "mean"), rtol=1e-4, atol=1e-5)
    file.write_text("my notes")
    assert run(backbone, photo_folder, file) == 2
    assert "holds something else" in capsys.readouterr().err
    assert file.read_text() == "my notes"


def test_an_unfinished_extraction_with_other_settings_is_refused(
    backbone: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "features.parquet"
    parts = tmp_path / "features.parquet.parts"
    parts.mkdir()
    (parts / "settings.json").write_text(json.dumps({"feature": "mean"}))
    assert run(backbone, photo_folder, file) == 2
    assert "an unfinished extraction has other settings" in capsys.readouterr().err
    assert run(backbone, photo_folder, file, "--fresh=true") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output=features.csv"], "output='features.csv': name a file that ends in .parquet or .safetensors"),
        (["--output=\udce9.parquet"], "output='\\udce9.parquet': safetensors reads UTF-8 names alone"),
        (["--feature=patch"], "feature='patch'"),
        (["--rows_per_part=0"], "rows_per_part=0: must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert run(backbone, tmp_path, tmp_path / "x.parquet", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_broken_image_has_no_row_and_what_was_done_stays(
    backbone: Path,
    photo_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, path in enumerate(sorted((photo_folder / "disc").iterdir())):
        (folder / path.name).write_bytes(path.read_bytes() if number != 11 else b"broken")
    file = tmp_path / "features.parquet"
    flags = ["--rows_per_part=4", "--batch_size=2"]
    for stop in ("--on_bad_image=raise", "--max_bad_share=0.01"):
        assert run(backbone, folder, file, *flags, stop) == 2
        assert "row 11" in capsys.readouterr().err
        assert len(list((tmp_path / "features.parquet.parts").glob("part-*"))) == 2
    encoded = remember_rows(monkeypatch)
    assert run(backbone, folder, file, *flags) == 0
    assert encoded == list(range(8, 20))
    table = pq.read_table(file)
    good = [row for row in range(20) if row != 11]
    assert table.column("row").to_pylist() == good
    assert [Path(path).name for path in table.column("path").to_pylist()] == [f"{row:02d}.png" for row in good]
    listed = json.loads((tmp_path / "features.bad_images.jsonl").read_text())
    assert (listed["row"], listed["path"]) == (11, str(folder / "11.png"))
    assert "not an image" in listed["reason"]
    assert run(backbone, folder, file, *flags) == 0
    assert "is finished" in capsys.readouterr().out
    assert run(backbone, folder, tmp_path / "features.safetensors", *flags, "--rows_per_part=1") == 0
    found = load_file(tmp_path / "features.safetensors")
    assert found["rows"].tolist() == good
    torch.testing.assert_close(found["embeddings"], embeddings(file))
    torch.testing.assert_close(found["embeddings"], expected(backbone, photo_folder, "cls")[good], rtol=1e-4, atol=1e-5)
