"""The evaluation scripts, from the command line to table and JSON."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from PIL import Image

from ssl_vit.evaluation import command, task
from ssl_vit.evaluation.linear_probe import PRESETS
from ssl_vit.evaluation.probes import (
    KNNConfig,
    LinearConfig,
    RetrievalConfig,
    evaluate_knn,
    evaluate_linear,
    evaluate_retrieval,
)
from ssl_vit.export import export_backbone
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.vit import ViT
from tests.conftest import TINY
from tests.processes import finish
from tests.specs import GREY, grey

SCRIPTS: dict[str, tuple[Callable[..., None], dict]] = {
    "knn": (evaluate_knn, {"": KNNConfig()}),
    "retrieval": (evaluate_retrieval, {"": RetrievalConfig()}),
    "linear": (evaluate_linear, {"": LinearConfig(), "probe": replace(PRESETS["dinov2"], epochs=5)}),
}


def run(name: str, *args: object) -> int:
    evaluate, configs = SCRIPTS[name]
    return command.main(evaluate, configs, None, [str(arg) for arg in args])


@pytest.fixture
def backbone(tiny_encoder: ViT, tmp_path: Path) -> Path:
    export_backbone(tiny_encoder, tmp_path / "backbone", normalization=GREY, provenance={})
    return tmp_path / "backbone"


@pytest.mark.parametrize(
    ("name", "flags", "heading"),
    [
        ("knn", ["--ks=[3,5]"], "k=3"),
        ("retrieval", ["--ks=[1,2]"], "recall@2"),
        ("linear", ["--folds=2", "--shots=[1,3]", "--draws=2", "--probe.base_lrs=[0.001,0.01]"], "linear"),
        ("linear", ["--folds=2", "--logistic=true", "--probe.epochs=100", "--shots=[]"], "linear"),
        pytest.param(
            "linear",
            ["--folds=2", "--probe.views=2", "--probe.features=[cls4+mean]", "--shots=[]"],
            "linear",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_table_is_printed_and_written_and_repeats_itself(
    backbone: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str], name: str, flags: list[str], heading: str
) -> None:
    given = ["--source", photo_folder, "--baselines=[pixels,untrained]", *flags]
    assert run(name, backbone, *given) == 0
    text = capsys.readouterr().out
    note, *table = text.splitlines()
    assert note == "note       classes are the folders disc, square"
    assert heading in table[0]
    assert [line.split()[0] for line in table[2:5]] == ["pixels", "untrained", "backbone"]
    result = json.loads((backbone / f"{name}.json").read_text())
    assert (result["num_train"], result["num_test"], result["num_classes"]) == (40, 40, 2)
    assert list((backbone / "features").iterdir())
    # Again with kept features, from the file itself, and without any kept ones.
    assert run(name, backbone / "backbone.safetensors", *given) == 0
    assert capsys.readouterr().out == text
    assert run(name, backbone, *given, "--cache=false") == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("name", ["knn", "retrieval"])
def test_images_are_encoded_once_for_a_backbone(
    backbone: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    given = [backbone, f"--source={photo_folder}", "--baselines=[]"]
    assert run(name, *given) == 0

    def fail(*args: object, **settings: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(task, "extract_features", fail)
    assert run(name, *given) == 0
    # The same weights in another architecture give other features.
    config = json.loads((backbone / "config.json").read_text())
    config["ssl_vit"]["encoder"]["num_heads"] = 2
    (backbone / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError, match="encoded again"):
        run(name, *given)


def test_red_discs_and_blue_squares_are_told_apart(backbone: Path, photo_folder: Path, tmp_path: Path) -> None:
    test = shutil.copytree(photo_folder, tmp_path / "test")
    (test / "disc" / "00.png").unlink()
    assert run("linear", backbone, f"--source={photo_folder}", f"--test_source={test}") == 0
    result = json.loads((backbone / "linear.json").read_text())
    assert result["test_source"] == str(test)
    assert result["pixels"]["linear"]["accuracy"] > 0.9
    assert result["classes"][1]["name"] == "square"
    assert len(result["heads"]["backbone"]["held_out"]) == 65
    assert [item["shots"] for item in result["few_shot"]["backbone"]] == [1, 5, 10]
    assert run("knn", backbone, f"--source={photo_folder}", "--feature=mean") == 0
    result = json.loads((backbone / "knn.json").read_text())
    assert set(result["pixels"]) == {"k=10", "k=20", "k=100", "k=200"}
    assert result["pixels"]["k=10"]["accuracy"] > 0.9
    assert run("retrieval", backbone, f"--source={photo_folder}") == 0
    result = json.loads((backbone / "retrieval.json").read_text())
    assert result["pixels"]["recall"]["1"] > 0.9


def test_another_split_of_a_folder_is_tested_on(
    backbone: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / split).symlink_to(shutil.copytree(photo_folder, tmp_path / split))
    (tmp_path / "val" / "disc" / "00.png").unlink()
    source = tmp_path / "photos"
    assert run("knn", backbone, f"--source={source}", "--test_split=val", "--ks=[3]") == 0
    assert "note       splits are the folders train, val; images of train are used" in capsys.readouterr().out
    result = json.loads((backbone / "knn.json").read_text())
    assert (result["num_train"], result["num_test"], result["num_classes"]) == (40, 39, 2)


@pytest.mark.parametrize(
    ("known", "feature"),
    [
        ({"objective": "SomethingNew", "pooled": "mean"}, "mean"),
        ({"objective": "SomethingNew", "pooled": "mean", "feature": "cls"}, "cls"),  # what its run was scored by
        ({"objective": "MAE"}, "mean"),  # of versions that stored the name alone
        ({"objective": "DINO"}, "cls"),
    ],
)
def test_the_feature_follows_from_the_objective(
    tiny_encoder: ViT, photo_folder: Path, tmp_path: Path, known: dict, feature: str
) -> None:
    export_backbone(tiny_encoder, tmp_path, normalization=GREY, provenance=known)
    assert run("knn", tmp_path, f"--source={photo_folder}", "--baselines=[]") == 0
    assert json.loads((tmp_path / "knn.json").read_text())["feature"] == feature


def test_another_size(backbone: Path, photo_folder: Path) -> None:
    for flags, size in ((["48"], [48, 48]), (["[24,40]"], [24, 40]), (["30", "--indivisible=resize"], [32, 32])):
        assert run("knn", backbone, f"--source={photo_folder}", "--baselines=[]", "--image_size", *flags) == 0
        assert json.loads((backbone / "knn.json").read_text())["image_size"] == size


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("knn", ["--temperature=0.1"]),
        ("retrieval", []),
        ("linear", ["--logistic=true", "--probe.epochs=100", "--shots=[]", "--folds=3"]),
    ],
)
def test_a_result_has_its_settings_and_can_go_to_a_file_of_its_own(
    backbone: Path, photo_folder: Path, tmp_path: Path, name: str, flags: list[str]
) -> None:
    output = tmp_path / "results" / "b.json"
    given = [f"--source={photo_folder}", "--baselines=[]", "--crop_pct=0.9", "--precision=no", *flags]
    assert run(name, backbone, *given) == 0
    written = (backbone / f"{name}.json").read_text()
    assert run(name, backbone, *given, f"--output={output}", "--max_images=30") == 0
    assert (backbone / f"{name}.json").read_text() == written
    first, second = json.loads(written), json.loads(output.read_text())
    assert (first["num_train"], second["num_train"]) == (40, 30)
    assert first["weights"] == str(backbone / "backbone.safetensors")
    assert isinstance(first["backbone"], dict)
    assert (first["settings"]["output"], second["settings"]["output"]) == (None, str(output))
    known = {"split": "train", "crop_pct": 0.9, "precision": "no", "max_images": 30, "seed": 0, "baselines": []}
    known |= {flag[2:].split("=")[0]: json.loads(flag.split("=")[1]) for flag in flags if "probe" not in flag}
    assert known.items() <= second["settings"].items()
    assert second["feature"] == "cls"


def test_a_result_that_cannot_be_written_ends_in_one_line(
    backbone: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for output, reason in (("file/knn.json", ""), (".", "Is a directory")):
        file = tmp_path / output
        assert run("knn", backbone, f"--source={photo_folder}", "--baselines=[]", f"--output={file}") == 2
        captured = capsys.readouterr()
        assert "k=10" in captured.out
        message = captured.err.splitlines()[-1]
        assert message.startswith(f"error: {file}: the result cannot be written ({reason}")
        assert message.endswith("name another file with --output")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--source: name the images"),
        (["--source=/nowhere"], "--source='/nowhere': no such file or folder"),
        (["--source=PHOTOS", "--ks=[0]"], "ks=(0,): must be at least 1"),
        (["--source=PHOTOS", "--feature=patch"], "feature='patch': no such feature; choose one of cls, mean"),
        (["--source=PHOTOS", "--baselines=[random]"], "no 'random'; choose of pixels, untrained"),
        (
            ["--source=PHOTOS", "--image_size=30"],
            "the height 30 is no multiple of 8, the encoder's stride; the nearest that are: 24 and 32. indiv",
        ),
        (["--source=PHOTOS", "--crop_pct=0"], "crop_pct=0"),
        (["--source=PHOTOS", "--split=test"], "--split='test'"),
        (["--source=PHOTOS", "--test_source=/nowhere"], "--test_source='/nowhere': no such file or folder"),
        (["--source=PARQUET", "--test_split=test"], "--test_split='test'"),
        (["--source={PHOTOS: 1}"], "a mixture has at least two sources"),
        (["--source=TAR"], "not here: streams are for training"),
        (["--max_bad_share=2"], "--max_bad_share=2.0: must lie in [0, 1]"),
        (["--source=PHOTOS/disc"], "has no labels, and evaluating needs them: images lie in "),
        (["--source=ONE_CLASS"], "all 2 labelled images are of class 'disc': an evaluation needs at least two"),
        (
            ["--source=PARQUET", "--label_column=lable"],
            "label_column='lable': no such column; did you mean 'label'",
        ),
        (["--source=PARQUET", "--label_column=image"], "--label_column='image': holds Image; labels are classes"),
        (["--source=PHOTOS", "--test_source=THREE"], "lacks: 'triangle'; there it is 'disc', 'square'"),
        (["--source=PARQUET", "--test_source=MORE"], "the test set has classes that the training set lacks: 'ring'"),
        (["--sauce=x"], "--sauce"),
    ],
)
def test_what_cannot_be_used_ends_in_one_line(
    backbone: Path,
    photo_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    (tmp_path / "x.tar").write_bytes(bytes(1024))
    shutil.copytree(photo_folder, tmp_path / "three")
    shutil.copytree(photo_folder / "disc", tmp_path / "three" / "triangle")
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    named = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["disc", "square", "ring"])}
    )
    for name, labels in {"parquet": [0, 1], "more": [0, 2], "one_class": [0, 0]}.items():
        rows = {"image": images[:2], "label": labels}
        datasets.Dataset.from_dict(rows, named).to_parquet(str(tmp_path / f"{name}.parquet"))
    names = {
        "PHOTOS": str(photo_folder),
        "ONE_CLASS": str(tmp_path / "one_class.parquet"),
        "PARQUET": str(tmp_path / "parquet.parquet"),
        "MORE": str(tmp_path / "more.parquet"),
        "THREE": str(tmp_path / "three"),
        "TAR": str(tmp_path / "x.tar"),
    }
    for key, value in names.items():
        flags = [flag.replace(key, value) for flag in flags]
    capsys.readouterr()
    assert run("knn", backbone, *flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "examples" not in line]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("baselines", ["[]", "[pixels]"])
def test_images_of_other_channels_than_the_backbones_are_refused(
    photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_workers: int, baselines: str
) -> None:
    encoder = EncoderConfig(image_size=32, in_chans=5, **TINY).build()
    export_backbone(encoder, tmp_path / "five", normalization=grey(5), provenance={})
    flags = [f"--source={photo_folder}", f"--num_workers={num_workers}", f"--baselines={baselines}"]
    assert run("knn", tmp_path / "five", *flags) == 2
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1
    assert text.startswith("error: --max_bad_share=0.05: ")
    assert f"the first: --source='{photo_folder}': row 0 (" in text
    assert "5 channels" in text


def test_a_folder_without_a_backbone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("knn", tmp_path) == 2
    assert "backbone.safetensors: no such file" in capsys.readouterr().err


def test_two_processes_share_the_encoding_and_find_what_one_finds(
    backbone: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """37 images, which neither the batch nor the processes divide."""
    flags = [f"--source={photo_folder}", "--max_images=37", "--batch_size=5", "--precision=no", "--cache=false"]
    assert run("knn", backbone, *flags) == 0
    text, one = capsys.readouterr().out, json.loads((backbone / "knn.json").read_text())
    (backbone / "knn.json").unlink()
    script = backbone / "evaluate.py"
    script.write_text(
        "from accelerate import PartialState\n"
        "from ssl_vit.evaluation.command import main\n"
        "from ssl_vit.evaluation.probes import KNNConfig, evaluate_knn\n"
        "def evaluate(*args, **settings):\n"
        "    evaluate_knn(*args, **settings)\n"
        "    PartialState().print(PartialState().num_processes, 'processes')\n"
        "main(evaluate, {'': KNNConfig()}, None)\n"
    )
    printed = finish([str(script), str(backbone), *flags], num_processes=2)
    assert printed == f"{text}2 processes\n"
    assert json.loads((backbone / "knn.json").read_text()) == one


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("knn", ["--baselines=[pixels,untrained]"]),
        ("retrieval", ["--baselines=[]"]),
        ("linear", ["--baselines=[pixels]", "--folds=2", "--shots=[2]", "--probe.features=[cls]"]),
    ],
)
def test_bad_images_are_left_out_as_if_they_were_not_there(
    backbone: Path,
    photo_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    flags: list[str],
) -> None:
    source, test = tmp_path / "source", tmp_path / "test"
    for folder in (source, test):
        shutil.copytree(photo_folder, folder)
    bad = [source / "disc" / "07.png", test / "square" / "00.png"]
    for file in bad:
        file.unlink()
    given = [f"--source={source}", f"--test_source={test}", "--precision=no", *flags]
    assert run(name, backbone, *given) == 0
    without = json.loads((backbone / f"{name}.json").read_text())
    assert not list(backbone.glob("*.bad_images.jsonl"))
    bad[0].write_bytes(b"broken")
    bad[1].write_bytes((photo_folder / "square" / "00.png").read_bytes()[:200])
    for _ in range(2):  # the second time from kept features
        assert run(name, backbone, *given) == 0
        found = json.loads((backbone / f"{name}.json").read_text())
        assert found == without | {"num_bad": 2}
        listed = list(map(json.loads, (backbone / f"{name}.bad_images.jsonl").read_text().splitlines()))
        assert sorted(item["path"] for item in listed) == sorted(map(str, bad))
        assert sorted(item["row"] for item in listed) == [7, 20]
        assert "left out, since it cannot be decoded: 2 images" in capsys.readouterr().out
    for stop in ("--max_bad_share=0.01", "--on_bad_image=raise"):
        assert run(name, backbone, *given, stop) == 2
        assert f"--test_source='{test}': row 20 ({bad[1]})" in capsys.readouterr().err


def test_a_mixture_is_taken_as_in_training(backbone: Path, photo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disc").mkdir()
    (tmp_path / "disc" / "0.png").write_bytes((photo_folder / "disc" / "03.png").read_bytes())
    given = [f"--source={{{photo_folder}: 3, {tmp_path}: 1}}", f"--test_source={{{tmp_path}: 1, {photo_folder}: 1}}"]
    shutil.copytree(photo_folder / "square", tmp_path / "square")
    assert run("knn", backbone, *given, "--baselines=[]") == 0
    found = json.loads((backbone / "knn.json").read_text())
    assert (found["num_train"], found["num_test"], found["num_classes"]) == (61, 61, 2)


@pytest.mark.parametrize("flags", [[], ["--image_size=24"]])
def test_the_crop_is_the_exports_unless_it_is_given(
    tiny_encoder: ViT, photo_folder: Path, tmp_path: Path, flags: list[str]
) -> None:
    export_backbone(tiny_encoder, tmp_path / "b", normalization=GREY, provenance={}, crop_pct=0.6)
    for crop, expected, num_kept in (([], 0.6, 1), (["--crop_pct=0.6"], 0.6, 1), (["--crop_pct=1"], 1.0, 2)):
        assert run("knn", tmp_path / "b", f"--source={photo_folder}", "--baselines=[]", *flags, *crop) == 0
        assert json.loads((tmp_path / "b" / "knn.json").read_text())["crop_pct"] == expected
        assert len(list((tmp_path / "b" / "features").iterdir())) == num_kept  # one for each crop


def test_no_more_shots_are_shown_than_the_smallest_class_has(
    backbone: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, number in (("disc", 8), ("square", 4)):
        (tmp_path / "few" / name).mkdir(parents=True)
        for file in sorted((photo_folder / name).iterdir())[:number]:
            shutil.copy(file, tmp_path / "few" / name)
    given = [f"--source={tmp_path / 'few'}", "--baselines=[]", "--folds=2", "--logistic=true", "--probe.epochs=100"]
    assert run("linear", backbone, *given, "--shots=[1,3,4,5]") == 0
    assert "not from 4, 5 of each class: the smallest class has 3 to give" in capsys.readouterr().out
    result = json.loads((backbone / "linear.json").read_text())
    assert [item["shots"] for item in result["few_shot"]["backbone"]] == [1, 3]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(name, "--help-all")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Labelled images to test on" in text  # of a setting that is inherited
    assert "Keep features beside the backbone" in text
