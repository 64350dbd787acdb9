"""Runs with labels, from the command line to the classifier."""

import importlib
import json
import re
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from scripts import export
from ssl_vit.data.sources.source import DataConfig, open_source
from ssl_vit.export import export_backbone
from ssl_vit.export.run import export_run
from ssl_vit.models.config import EncoderConfig
from ssl_vit.training import supervised
from ssl_vit.training.config import RunConfig, parse_run
from ssl_vit.training.loop import main
from ssl_vit.training.setup import set_up
from tests.conftest import ROOT, TINY
from tests.families import FAMILIES
from tests.processes import Launch, finish, kill_at
from tests.specs import grey
from tests.test_resume import losses, same

STEPS = 12
SMALL = ["--batch.size=8", "--precision=no", "--log_every=1", f"--steps={STEPS}"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    encoder = EncoderConfig(image_size=32, pos_embed="sincos", **TINY).build()
    export_backbone(encoder, folder, normalization=grey(mean=0.4, std=0.3), provenance={})
    return folder


def defaults(script: str) -> RunConfig:
    return importlib.import_module(f"scripts.{script}").DEFAULTS


def words(script: str, backbone: Path, source: Path, run: Path, *flags: str) -> list[str]:
    settings = [f"--encoder.pretrained={backbone}", f"--data.source={source}", f"--output_dir={run}"]
    return [str(ROOT / "scripts" / f"{script}.py"), *settings, *SMALL, *flags]


def call(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> int:
    script = Path(command[0]).stem
    monkeypatch.setattr(sys, "argv", command)
    return main(defaults(script), ending=supervised)


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def test_fine_tuning_ends_with_a_classifier_that_timm_loads(
    backbone: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    easy = ["--objective.rand_augment=null", "--objective.mixup=0", "--objective.cutmix=0", "--optim.base_lr=0.1"]
    steps = [
        "--steps=40",
        "--objective.crop_scale=[0.5,1]",
        "--objective.label_smoothing=0",
        "--evaluation.every_steps=20",
    ]
    command = words("finetune", backbone, photo_folder, tmp_path / "run", *easy, *steps)
    assert call(monkeypatch, command) == 0
    text = capsys.readouterr().out
    assert "objective.num_classes 2: classes of the source" in text
    assert "tested on a held-out 20% of" in text
    found = results(tmp_path / "run")
    assert found["scores"]["fine-tuned"]["test"]["n"] == 8
    assert found["scores"]["fine-tuned"]["test"]["accuracy"] == 1  # red discs and blue squares
    assert [item["name"] for item in found["classes"]] == ["disc", "square"]
    assert any("eval_head" in line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert model.num_classes == 2
    written = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert export_run(tmp_path / "run").read_bytes() == written
    assert call(monkeypatch, command) == 0
    assert "This run is finished" in capsys.readouterr().out
    run = str(tmp_path / "run")
    for flags, message in (
        (["--weights", "best", "--to", "timm"], "--weights best: has no effect on a fine-tuned classifier"),
        (["--license", "mit", "--to", "timm"], "--license mit: has no effect on a fine-tuned classifier"),
        (["--images", "photos", "--to", "timm"], "--images photos: has no effect on a fine-tuned classifier"),
        (["--weights", "best"], "weights='best': RUN is a fine-tuned classifier, whose newest weights leave"),
        (["--to", "timm"], ""),
        (["--to", "timm"], "exported/timm: is there already; choose another --out, or --overwrite it"),
        (["--to", "timm", "--overwrite"], ""),
    ):
        assert export.main([run, *flags]) == (2 if message else 0)
        assert message in capsys.readouterr().err.replace(run, "RUN")
    assert export.main([f"{run}/checkpoints/step-00000040", "--to", "timm"]) == 2
    text = capsys.readouterr().err.replace(run, "RUN")
    assert "step-00000040: is a fine-tuned classifier; `ssl-vit export RUN --to timm` writes its newest" in text


@pytest.mark.parametrize("family", ["distilled", "swin"])
def test_a_run_of_another_family_ends_with_timms_own_classifier(
    family: str, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = FAMILIES[family], tmp_path / "run"
    given = {name: value for name, value in asdict(config).items() if value != getattr(EncoderConfig, name, {})}
    given["model_args"] = json.dumps(config.model_args)
    flags = [f"--encoder.{name}={value}" for name, value in given.items()]
    flags += ["--steps=2", "--objective.model_ema=0.9"]
    command = words("finetune", run, photo_folder, run, *flags)
    assert call(monkeypatch, [word for word in command if "pretrained" not in word]) == 0
    assert results(run)["scores"]["fine-tuned"]["test"]["n"] == 8
    written = (run / "model.safetensors").read_bytes()
    assert export_run(run).read_bytes() == written
    model = timm.create_model(f"local-dir:{run}", pretrained=True)
    assert set(model.state_dict()) == set(load_file(run / "model.safetensors"))
    assert {f"{name}.weight" for name in config.build().head_names} < set(model.state_dict())


def test_an_attentive_probe_picks_its_head_on_images_that_are_not_tested(
    backbone: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    command = words("attentive_probe", backbone, photo_folder, run, "--steps=30", "--optim.base_lr=0.1")
    assert call(monkeypatch, command) == 0
    assert re.search(r"lr_\S+ was picked on 4 held-out training images", capsys.readouterr().out)
    found = results(run)
    assert found["scores"]["attentive"]["test"]["accuracy"] > 0.8
    assert set(found["picked_on_held_out"]) == {"lr_0.1", "lr_0.3", "lr_1", "lr_3"}
    # The encoder stays as it was.
    tensors = load_file(run / "checkpoints" / "step-00000030" / "model.safetensors")
    for name, value in load_file(backbone / "backbone.safetensors").items():
        assert torch.equal(tensors[f"encoder.vit.{name}"], value)
    with pytest.raises(ValueError, match="is an attentive probe"):
        export_run(run)


def test_muon_is_refused_for_a_frozen_encoder_before_the_folder_is_taken(
    backbone: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    command = words("attentive_probe", backbone, photo_folder, run, "--optim.optimizer=muon")
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ValueError, match="no weight matrix of a block is trained"):
        set_up(parse_run(defaults("attentive_probe"), command[1:]), supervised)
    assert not run.exists()


def test_what_is_learned_picked_and_tested_does_not_overlap(backbone: Path, photo_folder: Path) -> None:
    flags = [f"--encoder.pretrained={backbone}", f"--data.source={photo_folder}"]
    config = parse_run(defaults("attentive_probe"), flags)
    source = open_source(DataConfig(source=str(photo_folder)))
    train, eval_data = supervised.prepare(config, source)
    assert eval_data.pick is not None

    def paths(part: Any) -> set[str]:
        return {row["path"] for row in part.rows["image"]}

    parts = [paths(train), paths(eval_data.pick), paths(eval_data.test)]
    assert [len(part) for part in parts] == [28, 4, 8]
    assert len(set.union(*parts)) == 40
    assert np.bincount(eval_data.test.labels).tolist() == [4, 4]


def test_a_killed_fine_tuning_ends_with_the_same_weights_bit_for_bit(
    backbone: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with other loader workers than the run that nobody disturbed."""
    runs, flags = (tmp_path / "whole", tmp_path / "killed"), ["--objective.model_ema=0.9", "--checkpoint.every_steps=3"]
    whole, killed = (words("finetune", backbone, photo_folder, run, *flags) for run in runs)
    assert call(monkeypatch, whole) == 0
    killed.append("--data.num_workers=2")
    kill_at(killed, 5)
    assert "Going on from" in finish(killed)
    one, two = (load_file(run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors") for run in runs)
    assert same(one, two) == []
    assert losses(runs[0]) == losses(runs[1])
    assert results(runs[0]) == results(runs[1])


def test_two_processes_fine_tune_as_one(
    backbone: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for Mixup, which looks at what a device takes at once."""
    flags = ["--steps=5", "--encoder.drop_path_rate=0", "--objective.mixup=0", "--objective.cutmix=0"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert call(monkeypatch, words("finetune", backbone, photo_folder, one, *flags)) == 0
    text = finish(words("finetune", backbone, photo_folder, two, *flags), num_processes=2)
    assert "2 processes on cpu" in text
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert results(one)["scores"] == results(two)["scores"]


def test_settings_of_the_backbone_are_taken_over_unless_others_are_given(backbone: Path) -> None:
    given = [f"--encoder.pretrained={backbone}", "--data.source=x"]
    config = parse_run(defaults("finetune"), given)
    assert (config.encoder.embed_dim, config.encoder.image_size) == (32, 32)
    assert config.encoder.drop_path_rate == 0.1  # the recipe's, not that of pre-training
    assert config.data.mean == (0.4,) * 3
    objective = parse_run(
        defaults("finetune"), [*given, "--encoder.image_size=[48,64]", "--objective.num_classes=2"]
    ).build_objective()
    expected = load_file(backbone / "backbone.safetensors")
    state = objective.encoder.get_submodule("vit").state_dict()
    assert state["pos_embed"].shape == (1, 1 + 6 * 8, 32)
    assert torch.equal(state["pos_embed"][:, 0], expected["pos_embed"][:, 0])
    assert torch.equal(state["blocks.1.mlp.fc1.weight"], expected["blocks.1.mlp.fc1.weight"])


def test_pre_training_goes_on_from_a_backbone(backbone: Path) -> None:
    expected = load_file(backbone / "backbone.safetensors")
    for script in ("pretrain_mae", "pretrain_dino"):
        flags = [f"--encoder.pretrained={backbone}", "--data.source=x", "--steps=10"]
        config, _ = parse_run(defaults(script), flags).resolve(1000)
        objective = config.build_objective()
        for encoder in {objective.encoder, objective.backbone()}:
            state = encoder.get_submodule("vit").state_dict()
            assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--encoder.pretrained=/nowhere"], "encoder.pretrained='/nowhere': /nowhere: no such file"),
        (["--encoder.embed_dim=64"], "of another shape"),
        (["--encoder.image_size=30"], "30 is no multiple of 8, the encoder's stride; the nearest that are: 24 and 32"),
        (["--evaluation.source=x"], "evaluation.source='x': a run with labels learns from data.source"),
        (["--data.label_column=none"], "has no labels"),
        (["--optim.base_lr=auto"], "optim.base_lr='auto': is for learning without labels; give a number"),
        (["--optim.optimizer=auto"], "optim.optimizer='auto': is for learning without labels; give adamw"),
        (["--objective.num_classes=1"], "objective.num_classes=1: the source has 2 classes; give at least that number"),
        (["--evaluation.test_source=/nowhere"], "no such file or folder"),
        (["--evaluation.test_split=train"], "name others with evaluation.test_source or evaluation.test_split"),
    ],
)
def test_what_cannot_work_is_one_line(
    backbone: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert call(monkeypatch, words("finetune", backbone, photo_folder, tmp_path / "run", *flags)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_classes_that_were_never_seen_are_refused(
    backbone: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other"
    shutil.copytree(photo_folder, other)
    (other / "disc").rename(other / "circle")
    flags = [f"--evaluation.test_source={other}"]
    assert call(monkeypatch, words("finetune", backbone, photo_folder, tmp_path / "run", *flags)) == 2
    assert "lacks: 'circle'; there it is 'disc', 'square': rename them" in capsys.readouterr().err


def test_a_test_source_may_lack_classes(backbone: Path, photo_folder: Path, tmp_path: Path) -> None:
    train = tmp_path / "train"
    shutil.copytree(photo_folder, train)
    shutil.copytree(photo_folder / "disc", train / "arc")
    flags = [f"--encoder.pretrained={backbone}", f"--data.source={train}", f"--evaluation.test_source={photo_folder}"]
    _, eval_data = supervised.prepare(
        parse_run(defaults("finetune"), flags), open_source(DataConfig(source=str(train)))
    )
    assert eval_data.test.labels is not None
    assert eval_data.test.labels.tolist() == [1] * 20 + [2] * 20
    assert eval_data.test.class_names == ("arc", "disc", "square")


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_a_run_does_not_go_on_with_other_test_images(
    backbone: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: bool,
    after: bool,
) -> None:
    """Without a test source it would be tested on a part of what it has learned from."""
    command = words("finetune", backbone, photo_folder, tmp_path / "run", "--steps=1", "--evaluation.k=5")
    test = shutil.copytree(photo_folder, tmp_path / "test")
    (test / "disc" / "00.png").unlink()
    flag = [f"--evaluation.test_source={test}"]
    assert call(monkeypatch, command + before * flag) == 0
    capsys.readouterr()
    assert call(monkeypatch, command + after * flag) == 2
    assert "holds a run with other settings: evaluation.test_source" in capsys.readouterr().err
    assert call(monkeypatch, [*command, *before * flag, "--evaluation.k=6"]) == 0


def test_a_signal_saves(backbone: Path, photo_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = words("attentive_probe", backbone, photo_folder, run, "--steps=500")
    with Launch(command) as launched:
        launched.wait_for("step 2/")
        launched.send(signal.SIGTERM)
        assert launched.join() == [143]
        assert "The same command goes on from there" in launched.printed()
