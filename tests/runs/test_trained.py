"""What leaves a run: teacher, student, averages; and what its card says."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from scripts import export as script
from scripts import pretrain_dino, pretrain_mae
from ssl_vit.evaluation.command import Backbone
from ssl_vit.evaluation.command import main as evaluate
from ssl_vit.evaluation.probes import KNNConfig, evaluate_knn
from ssl_vit.export import load_backbone
from ssl_vit.export.run import export_run
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.weights.backbone import backbone_file
from ssl_vit.models.weights.pretrained import Pretrained
from ssl_vit.runs import trained
from ssl_vit.runs.trained import open_trained
from ssl_vit.training.loop import main
from tests.conftest import SMALL_DINO, SMALL_RUN, nearest_mean

LONG = ["--steps=6", "--checkpoint.every_steps=2", "--checkpoint.keep=3", "--evaluation.max_images=16"]


def train(defaults: object, flags: list[str], source: Path, folder: Path, *more: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *flags, *LONG, *more, f"--data.source={source}", f"--output_dir={folder}"])
        patch.setattr("ssl_vit.evaluation.evaluate.logistic_predict", nearest_mean)
        assert main(defaults) == 0
    return folder


@pytest.fixture(scope="module")
def dino_run(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> Path:
    return train(pretrain_dino.DEFAULTS, SMALL_DINO, photo_folder, tmp_path_factory.mktemp("runs") / "dino")


@pytest.fixture(scope="module")
def mae_run(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> Path:
    return train(pretrain_mae.DEFAULTS, SMALL_RUN, photo_folder, tmp_path_factory.mktemp("runs") / "mae")


def saved(run: Path, step: int, prefix: str) -> dict[str, torch.Tensor]:
    tensors = load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def test_teacher_student_and_a_checkpoint_can_be_chosen(dino_run: Path) -> None:
    for path, weights, step, prefix in (
        (dino_run, None, 6, "teacher_encoder."),
        (dino_run, "teacher", 6, "teacher_encoder."),
        (dino_run, "student", 6, "encoder."),
        (dino_run / "checkpoints" / "step-00000004", "student", 4, "encoder."),
    ):
        trained = open_trained(path, weights)
        expected = saved(dino_run, step, prefix)
        assert all(torch.equal(value, expected[name]) for name, value in trained.encoder.state_dict().items())
        assert trained.provenance["steps"] == step
        assert trained.provenance.get("weights") == weights
    assert not torch.equal(saved(dino_run, 6, "encoder.")["vit.norm.weight"], expected["vit.norm.weight"])


def test_checkpoints_are_averaged(dino_run: Path) -> None:
    trained = open_trained(dino_run, "average-last-3")
    parts = [saved(dino_run, step, "teacher_encoder.") for step in (2, 4, 6)]
    for name, value in trained.encoder.state_dict().items():
        torch.testing.assert_close(value, sum(part[name].double() for part in parts).div(3).float(), rtol=0, atol=1e-7)
    assert trained.provenance["averaged_steps"] == [2, 4, 6]
    assert not torch.equal(trained.encoder.vit.norm.weight, parts[-1]["vit.norm.weight"])
    with pytest.raises(ValueError, match=r"weights='average-last-4': .* has 3 complete checkpoints"):
        open_trained(dino_run, "average-last-4")


@pytest.mark.parametrize("weights", ["average-last-", "average-last-0", "average-last-two", "ema"])
def test_other_weights_are_refused(dino_run: Path, weights: str) -> None:
    with pytest.raises(ValueError, match=f"weights='{weights}'"):
        open_trained(dino_run, weights)


def test_mae_has_no_teacher_and_leaves_with_its_decoder(mae_run: Path) -> None:
    with pytest.raises(ValueError, match=r"weights='student': MAE in .* has no teacher"):
        open_trained(mae_run, "student")
    trained = open_trained(mae_run)
    assert trained.objective is not None
    expected = saved(mae_run, 6, "")
    assert all(torch.equal(value, expected[name]) for name, value in trained.objective.state_dict().items())
    averaged = open_trained(mae_run, "average-last-2").objective
    assert averaged is not None
    assert not torch.equal(averaged.decoder_pred.weight, expected["decoder_pred.weight"])


def test_an_objective_of_another_name_is_pooled_as_its_checkpoint_says(dino_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(dino_run, tmp_path / "run")
    for file in run.glob("checkpoints/*/manifest.json"):
        file.unlink()
    state_file = run / "checkpoints" / "step-00000006" / "state.json"
    state = json.loads(state_file.read_text())
    assert state["pooled"] == "cls"
    state_file.write_text(json.dumps({**state, "objective": "SomethingNew", "pooled": "mean"}))
    export_run(run)
    described = json.loads((run / "config.json").read_text())
    assert (described["global_pool"], described["ssl_vit"]["pooled"]) == ("avg", "mean")
    assert open_trained(run / "backbone.safetensors").pooled == "mean"


def test_an_exported_backbone_leaves_again(dino_run: Path) -> None:
    trained = open_trained(dino_run / "backbone.safetensors")
    expected = saved(dino_run, 6, "teacher_encoder.")
    assert all(torch.equal(value, expected[name]) for name, value in trained.encoder.state_dict().items())
    with pytest.raises(ValueError, match=r"weights='student': .* is one backbone; name the folder of the run"):
        open_trained(dino_run / "backbone.safetensors", "student")


def test_an_export_to_timm_leaves_and_is_read_as_the_backbone(mae_run: Path, tmp_path: Path) -> None:
    assert script.main([str(mae_run), "--to", "timm", "--out", str(tmp_path)]) == 0
    folder = tmp_path / "timm"
    for path in (folder, folder / "model.safetensors"):
        assert script.main([str(path), "--to", "timm", "--out", str(tmp_path / "again"), "--overwrite"]) == 0
        first, again = (json.loads((at / "timm" / "config.json").read_text()) for at in (tmp_path, tmp_path / "again"))
        assert again["global_pool"] == first["global_pool"] == "avg"
        assert again["ssl_vit"] == first["ssl_vit"]
    assert backbone_file(folder) == folder / "model.safetensors"
    encoder = load_backbone(folder)
    assert all(torch.equal(value, load_backbone(mae_run).state_dict()[n]) for n, value in encoder.state_dict().items())
    assert Backbone.load(folder, KNNConfig()).feature == Backbone.load(mae_run, KNNConfig()).feature  # as probes do
    with pytest.raises(ValueError, match=r"backbone.safetensors: no such file; name .*model.safetensors, which holds"):
        load_backbone(folder / "backbone.safetensors")


@pytest.mark.parametrize(("tag", "pooled"), [("mae", "mean"), ("dino", "cls")])
def test_published_weights_of_mae_are_pooled_by_the_mean(
    monkeypatch: pytest.MonkeyPatch, tag: str, pooled: str
) -> None:
    config = EncoderConfig(arch="vit_tiny_patch16_224", image_size=32, depth=1)
    monkeypatch.setattr(trained, "open_pretrained", lambda name: Pretrained(name, config, dict))
    monkeypatch.setattr(trained, "load_pretrained", lambda encoder, name: None)
    assert open_trained(f"vit_base_patch16_224.{tag}").feature == pooled


def test_a_damaged_checkpoint_that_is_named_is_refused(mae_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000006"
    folder.mkdir(parents=True)
    (tmp_path / "config.yaml").write_bytes((mae_run / "config.yaml").read_bytes())
    for file in (mae_run / "checkpoints" / "step-00000006").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"step-00000006: is damaged"):
        open_trained(folder)
    with pytest.raises(ValueError, match="has no complete checkpoint yet"):
        open_trained(tmp_path)


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = script.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.filterwarnings("default")
def test_the_script_writes_every_library_with_a_card(
    mae_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mae_run / "knn.json").write_text(
        json.dumps({"backbone": {"k=20": {"accuracy": 0.5, "low": 0.25, "high": 0.75, "n": 40}}})
    )
    code, text = call(
        capsys,
        mae_run,
        "--to",
        "timm",
        "transformers",
        "torchvision",
        "--out",
        tmp_path,
        "--license",
        "apache-2.0",
        "--open_source",
    )
    assert code == 0
    folders = ["timm", "torchvision", "transformers", "transformers_mae"]
    assert sorted(path.name for path in tmp_path.iterdir()) == folders
    assert "Comparing on 3 images of" in text
    for name in folders:
        assert re.search(rf"{name} .*largest difference \d\.\de[-+]\d\d", text)
        card = (tmp_path / name / "README.md").read_text()
        header = yaml.safe_load(card.split("---")[1])
        assert header["license"] == "apache-2.0"
        assert header["library_name"] == name.removesuffix("_mae")
        for words in (
            "arXiv:2111.06377",
            "40 images",
            "6 steps of 8 images",
            "mask_ratio 0.75",
            "base_lr 0.032",
            "CPU",
            "hours",
            "| knn.json | backbone | k=20 | 50.0 % | 25.0 to 75.0, n 40 |",
            "| results.json | trained | knn |",
        ):
            assert words in card, words
    (mae_run / "knn.json").unlink()


def test_the_script_goes_on_after_a_refusal(
    tmp_path: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SMALL_RUN, "--encoder.image_size=[16,32]"]
    run = train(pretrain_mae.DEFAULTS, flags, photo_folder, tmp_path / "run", "--steps=1")
    code, text = call(capsys, run, "--to", "torchvision", "timm")
    assert code == 2
    assert "error: --to torchvision: torchvision's VisionTransformer cannot be this backbone: it takes square" in text
    assert [path.name for path in (run / "exported").iterdir()] == ["timm"]


def test_transformers_without_a_decoder_is_no_error(
    tmp_path: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SMALL_RUN, "--encoder.image_size=[16,32]"]
    run = train(pretrain_mae.DEFAULTS, flags, photo_folder, tmp_path / "run", "--steps=1")
    code, text = call(capsys, run / "checkpoints" / "step-00000001", "--to", "transformers")
    assert code == 0
    assert "note       without its decoder: transformers' ViTMAEForPreTraining cannot be this MAE" in text
    assert [path.name for path in (run / "exported").iterdir()] == ["transformers"]  # no checkpoint's, which may go
    code, text = call(capsys, run, "--to", "transformers_mae")
    assert (code, "error: --to transformers_mae" in text) == (2, True)


def test_the_script_without_a_library_writes_the_backbone(dino_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = call(capsys, dino_run, "--weights", "student")
    assert code == 0
    assert "backbone.safetensors (+ config.json)" in text
    expected = saved(dino_run, 6, "encoder.")
    assert torch.equal(load_backbone(dino_run).state_dict()["vit.norm.weight"], expected["vit.norm.weight"])
    export_run(dino_run)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "tensorflow"], "--to tensorflow: no such library; choose of timm"),
        (["--license", "mit"], "--license mit: has no effect without --to; leave it out"),
        (["--images", "photos"], "--images photos: has no effect without --to; leave it out"),
        (["--push_to_hub", "me/mine"], "--push_to_hub me/mine: name the library with --to"),
        (["--to", "timm", "onnx", "--push_to_hub", "me/mine"], "takes one library, not timm onnx"),
    ],
)
def test_the_script_refuses_what_does_not_go_together(
    dino_run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    code, text = call(capsys, dino_run, *words)
    assert code == 2
    assert message in text


@pytest.mark.filterwarnings("default")
def test_published_weights_are_converted_and_can_be_judged(
    tmp_path: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("knn.json").write_text(json.dumps({"other": {"k=20": {"accuracy": 0.5, "low": 0, "high": 1, "n": 4}}}))
    original = EncoderConfig(arch="vit_tiny_patch16_224", image_size=32, depth=2).build()
    torch.save({"model": original.vit.state_dict()}, tmp_path / "official.pth")
    code, text = call(capsys, tmp_path / "official.pth", "--out", tmp_path / "public")
    assert (code, "backbone.safetensors" in text) == (0, True)
    assert torch.equal(load_backbone(tmp_path / "public").state_dict()["vit.norm.weight"], original.vit.norm.weight)
    flags = [str(tmp_path / "public"), f"--source={photo_folder}", "--ks=[5]"]
    assert evaluate(evaluate_knn, {"": KNNConfig()}, None, flags) == 0
    code, text = call(
        capsys, tmp_path / "official.pth", "--to", "transformers", "--out", tmp_path, "--images", photo_folder
    )
    assert code == 0
    card = (tmp_path / "transformers" / "README.md").read_text()
    assert "A Vision Transformer, converted" in card
    assert "None were found beside it." in card  # those of the present folder are another's
    assert "| weights of | `official.pth` |" in card
    assert str(tmp_path) not in card
    code, text = call(capsys, tmp_path / "nothing")
    assert (code, "holds no run (config.yaml is missing); name the folder to write to with --out" in text) == (2, True)
    code, text = call(capsys, tmp_path / "nothing", "--to", "timm", "--out", tmp_path)
    assert (code, "no such file or folder" in text) == (2, True)
