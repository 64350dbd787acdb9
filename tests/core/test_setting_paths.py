"""A run's config.yaml from other folders, and runs whose folders or images were moved."""

import shutil
from pathlib import Path

import pytest
import yaml

from ssl_vit.core.paths import absolute, is_same
from ssl_vit.core.settings import as_plain
from ssl_vit.data.config import DataConfig
from ssl_vit.data.transform import Normalization
from ssl_vit.evaluation.evaluate import EvaluationConfig
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.weights.backbone import export_backbone
from ssl_vit.objectives.mae import MAEConfig
from ssl_vit.training.config import RunConfig, parse_run, write_config
from ssl_vit.training.continuing import check_run_folder, open_run_folder
from tests.conftest import TINY

DEFAULTS = RunConfig(objective=MAEConfig())
Patch = pytest.MonkeyPatch


@pytest.fixture
def project(tmp_path: Path, monkeypatch: Patch) -> Path:
    """The working folder, with some images in it, and another one beside it."""
    for name in ("project/photos", "project/more [2024]/tables", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "project" / "one.parquet").touch()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("photos", "{}/photos"),
        ("./photos/", "{}/photos"),
        ("../project/photos", "{}/photos"),
        ("one.parquet", "{}/one.parquet"),
        ("*.parquet", "{}/*.parquet"),
        ("photos/**/*.tar", "{}/photos/**/*.tar"),
        ("more [2024]", "{}/more [2024]"),
        ("more [2024]/tables/*.parquet", "{}/more [2024]/tables/*.parquet"),
        ({"photos": 0.7, "openmoji": 0.3}, {"{}/photos": 0.7, "openmoji": 0.3}),
        ("openmoji", "openmoji"),
        ("cifar10", "cifar10"),
        ("somebody/photos", "somebody/photos"),
        ("vit_small_patch16_224.dino", "vit_small_patch16_224.dino"),
        ("nowhere/*.parquet", "nowhere/*.parquet"),
        ("hf://datasets/somebody/*.parquet", "hf://datasets/somebody/*.parquet"),
        ("", ""),
        (None, None),
    ],
)
def test_what_is_a_path_becomes_absolute(project: Path, given: object, wanted: object) -> None:
    if isinstance(wanted, dict):
        wanted = {name.format(project): weight for name, weight in wanted.items()}
    assert absolute(given) == (wanted.format(project) if isinstance(wanted, str) else wanted)
    assert is_same(given, absolute(given))
    assert is_same(absolute(given), given)


def test_a_home_folder_is_spelt_out(project: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", str(project))
    assert absolute("~/photos") == f"{project}/photos"


def test_places_that_are_the_same_and_that_are_not(project: Path) -> None:
    (project / "link").symlink_to(project / "photos")
    assert is_same("link", "photos")
    assert not is_same("photos", "more [2024]")
    assert not is_same("photos", None)
    assert not is_same({"photos": 0.5, "openmoji": 0.5}, {"photos": 0.6, "openmoji": 0.4})
    assert not is_same("photos", {"photos": 1.0})
    assert is_same("/gone/photos", "photos")  # as on another machine
    assert not is_same("/gone/pictures", "photos")
    (project.parent / "elsewhere" / "photos").mkdir()
    assert not is_same("../elsewhere/photos", "photos")  # both are there


def test_a_written_config_means_the_same_from_another_folder(project: Path, monkeypatch: Patch) -> None:
    config = RunConfig(
        objective=MAEConfig(),
        output_dir="runs/mine",
        steps=3,
        data=DataConfig(source="photos", cache="disk", cache_dir="photos"),
        evaluation=EvaluationConfig(source="more [2024]", test_source="*.parquet"),
    )
    open_run_folder(config)
    monkeypatch.chdir(project.parent / "elsewhere")
    again = parse_run(DEFAULTS, ["--config", "../project/runs/mine/config.yaml"])
    assert Path(again.output_dir).resolve() == project / "runs" / "mine"
    assert again.data.source == str(project / "photos") == again.data.cache_dir
    assert again.evaluation.source == str(project / "more [2024]")
    assert again.evaluation.test_source == str(project / "*.parquet")
    check_run_folder(again)  # and goes on
    elsewhere = parse_run(DEFAULTS, ["--config", "../project/runs/mine/config.yaml", "--output_dir=repeated"])
    assert (elsewhere.output_dir, elsewhere.data.source) == ("repeated", str(project / "photos"))


def test_a_run_that_was_moved_goes_on_where_it_is(project: Path, monkeypatch: Patch) -> None:
    config = RunConfig(objective=MAEConfig(), output_dir="runs/mine", steps=3, data=DataConfig(source="photos"))
    open_run_folder(config)
    other = project.parent / "other machine"
    project.rename(other)
    monkeypatch.chdir(other)
    check_run_folder(config)  # the same command
    moved = parse_run(DEFAULTS, ["--config", "runs/mine/config.yaml", "--data.source", "photos"])
    assert moved.output_dir == "runs/mine"
    check_run_folder(moved)
    shutil.copytree("runs/mine", "runs/copy")
    assert parse_run(DEFAULTS, ["--config", "runs/copy/config.yaml"]).output_dir == "runs/copy"
    shutil.copy("runs/mine/config.yaml", "config.yaml")  # no run's folder
    assert parse_run(DEFAULTS, ["--config", "config.yaml"]).output_dir == "runs/mine"
    with pytest.raises(ValueError, match=r"other settings: data.source .* -> 'more \[2024\]'"):
        check_run_folder(parse_run(DEFAULTS, ["--config", "runs/mine/config.yaml", "--data.source=more [2024]"]))


def test_an_older_config_with_relative_paths_still_goes_on(project: Path) -> None:
    config = RunConfig(objective=MAEConfig(), output_dir="run", steps=3, data=DataConfig(source="photos"))
    open_run_folder(config)
    file = project / "run" / "config.yaml"
    values = yaml.safe_load(file.read_text()) | {"data": as_plain(config)["data"]}
    values.pop("extended")
    file.write_text(yaml.safe_dump(values))
    check_run_folder(config)


def test_print_config_shows_what_the_weights_decide(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = EncoderConfig(image_size=32, in_chans=5, **TINY).build()
    mean, std = (0.1,) * 5, (0.2,) * 5
    export_backbone(
        encoder, project / "mine", normalization=Normalization(mean, std), provenance={"objective": "MAE"}, crop_pct=1.0
    )
    for depth, words in ((2, ["--print_config"]), (1, ["--print_config", "--encoder.depth=1"])):
        with pytest.raises(SystemExit):
            parse_run(DEFAULTS, ["--encoder.pretrained=mine", *words])
        shown = yaml.safe_load(capsys.readouterr().out)
        assert (shown["encoder"]["in_chans"], shown["encoder"]["image_size"]) == (5, 32)
        assert (shown["encoder"]["pretrained"], shown["encoder"]["depth"]) == ("mine", depth)
        assert (shown["data"]["mean"], shown["data"]["std"]) == (list(mean), list(std))


def test_a_written_config_is_the_same_wherever_it_is_written_from(project: Path, monkeypatch: Patch) -> None:
    config = RunConfig(objective=MAEConfig(), output_dir="run", steps=3, data=DataConfig(source="photos"))
    write_config(config, project / "one.yaml")
    monkeypatch.chdir(project.parent)
    other = RunConfig(objective=MAEConfig(), output_dir="run", steps=3, data=DataConfig(source="project/photos"))
    write_config(other, project / "other.yaml")
    assert (project / "one.yaml").read_text() == (project / "other.yaml").read_text()
    assert yaml.safe_load((project / "one.yaml").read_text())["data"]["source"] == str(project / "photos")


def test_what_exists_is_no_address_and_no_text_is_lost(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("hf:/photos", "a[1]", "~", "caf\udce9"):
        (tmp_path / name).mkdir(parents=True)
    assert absolute("hf://photos") == f"{tmp_path}/hf:/photos"
    assert absolute("hf://absent") == "hf://absent"
    assert absolute("a[1]") == f"{tmp_path}/a[1]"
    assert absolute("~") == f"{tmp_path}/~"
    written = as_plain(DataConfig(absolute("caf\udce9")))["source"]
    assert written == f"{tmp_path}/caf\\xe9"
    assert absolute(written) == f"{tmp_path}/caf\udce9"
