import tarfile
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from ssl_vit.data.config import DataConfig
from ssl_vit.data.sources import tables
from ssl_vit.data.sources.source import open_source
from ssl_vit.data.sources.stream import open_images, open_stream
from tests.data.shards import number_of, numbered_png, write_tars


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def write(path: Path, number: int = 0, **columns: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = max((len(values) for values in columns.values()), default=1)
    pq.write_table(pa.table({"image": [numbered_png(number)] * count, **columns}), path)
    return str(path)


@pytest.mark.parametrize(
    "name",
    [
        "a[0]",
        "[!b]",
        "a*",
        "a?",
        "{x}",
        "{a,b}",
        "a::b",
        "http:",
        "a#b",
        "a%20b",
        " a b",
        "~",
        "~x",
        "$HOME",
        "é",
        "a\nb",
    ],
)
def test_a_path_that_exists_is_a_path(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for decoy in ("a0", "ab", "b", "root", "x"):
        write(tmp_path / decoy / "x.parquet", 9)
        write(tmp_path / f"{decoy}.parquet", 9)
    rows = datasets.Dataset.from_dict({"image": [{"bytes": numbered_png(7), "path": None}]})
    rows.save_to_disk(str(tmp_path / "plain"))
    (tmp_path / "plain").rename(tmp_path / f"{name}.saved")
    write_tars(tmp_path / name, [1])
    monkeypatch.chdir(tmp_path)
    written = [write(tmp_path / f"{name}.parquet", 5), write(tmp_path / name / "x.parquet", 6), f"{name}.parquet"]
    for source, number in zip(written, (5, 6, 5), strict=True):
        assert number_of(open_source(DataConfig(source=source)).image(0, 3)) == number
        stream = open_stream(DataConfig(source=source, streaming=True))
        assert number_of(stream.decode(0, *next(stream.read(0)), 3)) == number
    assert number_of(open_source(DataConfig(source=f"{name}.saved")).image(0, 3)) == 7
    stream = open_stream(DataConfig(source=f"{name}/part-00.tar", streaming=True))
    assert number_of(stream.decode(0, *next(stream.read(0)), 3)) == 0


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("x.zip", "unpack it and name the folder"),
        ("x.TAR.ZST", "unpack it and name the folder"),
        ("x.csv", "write a parquet file with the bytes of the images"),
        ("x.json", "write a parquet file"),
        ("x.npz", "save each image as a .npy file"),
        ("x.mp4", "write its frames into a folder"),
        ("x.jpg", "is one image: name its folder"),
        ("x.arrow", "name the folder that save_to_disk wrote it into"),
        ("x.dat", "data.source may be 'openmoji'"),
        ("folder.parquet", "is not a readable parquet file"),
    ],
)
def test_what_is_no_source_says_what_to_do(tmp_path: Path, name: str, advice: str, streaming: bool) -> None:
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(ValueError, match=rf"^data.source='.*': .*{name}.*{advice}") as caught:
        open_images(DataConfig(source=str(tmp_path / name), streaming=streaming))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^data.source='.*': no such file or folder"):
        open_images(DataConfig(source=f"missing_{name}", streaming=streaming))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that the hub was asked for; it has none of them."""
    found: list[str] = []

    def ask(self: Any, name: str, **_: Any) -> None:
        found.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", ask)
    for name in ("load_dataset", "load_dataset_builder"):
        monkeypatch.setattr(datasets, name, lambda *_, **__: pytest.fail("tried once more"))
    return found


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("my_imgaes", "no such file or folder; did you mean 'my_images'"),
        ("My_Images2", "no such file or folder; did you mean 'my_images'"),
        ("my_images/tarin", "no such file or folder; did you mean 'my_images/train'"),
        ("my_images/other", "no such file or folder; 'my_images' is a folder here"),
        ("deep/my_images/x", "no such file or folder$"),
        ("./my_imgaes", "no such file or folder; did you mean 'my_images'"),
        ("photo.parqet.parquet", "no such file or folder$"),
        ("imagefolder", "no such file or folder; a data set of the hub is OWNER/NAME"),
    ],
)
def test_a_mistyped_path_is_refused_at_once(
    tmp_path: Path, source: str, told: str, streaming: bool, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_images/train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^data.source='{source}': {told}"):
        open_images(DataConfig(source=source, streaming=streaming))
    assert asked == []


@pytest.mark.parametrize("streaming", [False, True])
def test_the_hub_is_asked_once(asked: list[str], streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(source="someone/flowers", streaming=streaming)
    told = r"^data.source='someone/flowers': no such file or folder here, and the Hugging Face hub "
    with pytest.raises(ValueError, match=told + "cannot be asked for it: no network. data.source may be"):
        open_images(config)
    assert asked == ["someone/flowers"]

    def refuse(self: Any, name: str, **_: Any) -> None:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(ValueError, match=told + "has no data set of this name, or not for you"):
        open_images(config)


def test_a_copy_of_a_hub_data_set_is_found_without_a_network(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(datasets.config.HF_DATASETS_CACHE) / "someone___many_flowers").mkdir()
    rows = datasets.Dataset.from_dict({"image": [{"bytes": numbered_png(1), "path": None}]})
    monkeypatch.setattr(tables, "load_split", lambda name, split: rows)
    assert len(open_source(DataConfig(source="someone/ManyFlowers"))) == 1


def test_rows_of_the_hub_open_what_was_downloaded_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    blob, link = tmp_path / "hub/datasets--me--mine/blobs/0", tmp_path / "hub/datasets--me--mine/snapshots/1/0.png"
    other = tmp_path / "hub/datasets--me--other/0.png"
    for path in (blob, link, other):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(numbered_png(3))
    link.symlink_to(blob)
    other.write_bytes(numbered_png(4))
    rows = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(path)} for path in (link, other)]})
    monkeypatch.setattr(tables, "load_split", lambda name, split: rows)
    source = open_source(DataConfig(source="me/mine"))
    assert number_of(source.image(0, 3)) == 3
    with pytest.raises(ValueError, match=r"lies outside .*datasets--me--mine, .*allow_outside_paths"):
        source.image(1, 3)


@pytest.mark.parametrize("variable", ["HF_DATASETS_CACHE", "HF_HOME"])
@pytest.mark.parametrize("kind", ["parquet", "hub", "openmoji"])
def test_a_cache_that_cannot_be_written_names_its_variable(
    tmp_path: Path, kind: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for name in ("HF_DATASETS_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "file/here"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file/here/datasets")
    source = {"parquet": write(tmp_path / "x.parquet"), "hub": "someone/flowers", "openmoji": "openmoji"}[kind]
    with pytest.raises(
        ValueError, match=rf"^{variable}='{tmp_path}/file/here': .* cannot be written \(Not a d"
    ) as caught:
        open_source(DataConfig(source=source))
    assert f"set {variable} to a folder that can be written" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_one_pattern_have_the_same_columns_and_classes(tmp_path: Path, streaming: bool) -> None:
    config = DataConfig(source=f"{tmp_path}/*.parquet", streaming=streaming)
    write(tmp_path / "a.parquet", label=[0, 1], text=pa.array([None, None]))
    write(tmp_path / "b.parquet", label=[1, 1], text=["x", "y"])
    assert open_images(config).num_samples == 4
    write(tmp_path / "c.parquet", label=[1, 1])
    with pytest.raises(ValueError, match=r"a.parquet and .*c.parquet have other columns \(only one has text\); name"):
        open_images(config)
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        kinds = datasets.Features({"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=classes)})
        datasets.Dataset.from_dict({"image": [numbered_png(0)], "label": [0]}, kinds).to_parquet(
            tmp_path / f"{name}.parquet"
        )
    with pytest.raises(ValueError, match=r"differ in the classes of column 'label': 2 \(cat, dog\) and 2 \(dog, cat\)"):
        open_images(config)
    mixed = open_source(DataConfig(source={f"{tmp_path}/{name}.parquet": 1.0 for name in "ab"}))
    assert mixed.labels is not None
    assert [mixed.class_names[label] for label in mixed.labels] == ["cat", "dog"]


def test_a_parquet_stream_begins_at_any_row(tmp_path: Path) -> None:
    rows = [{"bytes": numbered_png(number), "path": None} for number in range(11)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet", row_group_size=4)
    stream = open_stream(DataConfig(source=str(tmp_path / "x.parquet"), streaming=True))
    for start in range(12):
        found = [number_of(stream.decode(0, row, stored, 3)) for row, stored in stream.read(0, start)]
        assert found == list(range(start, 11))
    assert [row for row, _ in stream.read(0, 1, 9, 3)] == [1, 4, 7]


def test_a_compressed_tar_under_a_plain_name_is_read(tmp_path: Path) -> None:
    write_tars(tmp_path, [3])
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(tmp_path / "part-00.tar", "0.txt")
        for number in range(2):
            (tmp_path / f"{number}.png").write_bytes(numbered_png(number))
            tar.add(tmp_path / f"{number}.png", f"{number}.png")
    (tmp_path / "part-00.tar").unlink()
    stream = open_stream(DataConfig(source=str(tmp_path / "packed.tar"), streaming=True))
    assert [number_of(stream.decode(0, row, stored, 3)) for row, stored in stream.read(0)] == [0, 1]
