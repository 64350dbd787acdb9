import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from scripts.pretrain_mae import DEFAULTS
from ssl_vit.data.sources.source import Source
from ssl_vit.evaluation import command
from ssl_vit.evaluation.probes import KNNConfig, evaluate_knn
from ssl_vit.export import load_backbone
from ssl_vit.export.run import export_run
from ssl_vit.runs.checkpoint import list_checkpoints
from ssl_vit.training import ending
from ssl_vit.training.config import parse_run
from ssl_vit.training.loop import main, set_up, train
from ssl_vit.training.signals import StopSignal
from tests.conftest import SMALL_RUN, last_weights, losses

pytestmark = pytest.mark.usefixtures("_fresh_state")


def test_a_run_ends_with_everything_it_promises(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--checkpoint.every_steps=4", "--evaluation.every_steps=3", labels=True) == 0
    run, text = tmp_path / "run", capsys.readouterr().out
    assert {path.name for path in run.iterdir()} == {
        ".ssl_vit",
        "backbone.safetensors",
        "checkpoints",
        "config.json",
        "config.yaml",
        "heartbeat.json",
        "metrics.jsonl",
        "provenance.json",
        "reconstructions.png",
        "results.json",
        "run.lock",
    }
    assert [folder.name for folder in list_checkpoints(run)] == ["step-00000004", "step-00000006"]
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {"", ".json", ".jsonl", ".lock", ".png", ".safetensors", ".yaml"}
    assert [path for path in files if path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04")] == []  # pickles
    assert len(losses(run)) == 6
    backbone, weights = load_backbone(run), last_weights(run)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, weights[f"encoder.{name}"]), name
    results = json.loads((run / "results.json").read_text())
    assert set(results["scores"]) == {"raw pixels", "untrained", "trained"}
    assert 0 <= results["scores"]["trained"]["knn"]["accuracy"] <= 1
    assert "lr         1.00e-03 = base_lr x batch / 256, base_lr 0.032" in text
    assert "step 6/6" in text
    assert "trained - untrained" in text
    shares = [results["scores"][name]["linear"]["accuracy"] for name in ("trained", "raw pixels")]
    gain = results["trained_minus_raw_pixels"]["linear"]["difference"]
    assert gain == pytest.approx(shares[0] - shares[1])
    assert f"linear: trained - raw pixels = {100 * gain:+.1f} points" in text
    evaluated = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "eval_knn" in line]
    assert [record["step"] for record in evaluated] == [3]
    provenance = json.loads((run / "config.json").read_text())["ssl_vit"]
    assert (provenance["objective"], provenance["steps"], provenance["num_images"]) == ("MAE", 6, 40)


@pytest.mark.usefixtures("quick_scores")
def test_the_untrained_row_is_the_backbone_of_step_0(start: Callable[..., int], tmp_path: Path) -> None:
    start("--optim.base_lr=1e-12", "--optim.weight_decay=0", steps=1, labels=True)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    scores = results["scores"]
    assert scores["trained"] == scores["untrained"]
    shares = results["untrained_seeds"]["knn"]["accuracies"]
    assert (len(shares), shares[0]) == (3, scores["untrained"]["knn"]["accuracy"])
    difference = results["trained_minus_untrained"]["knn"]["difference"]
    assert difference == pytest.approx(shares[0] - sum(shares) / 3)


@pytest.mark.usefixtures("quick_scores")
def test_a_single_test_image_is_compared(start: Callable[..., int], photo_folder: Path, tmp_path: Path) -> None:
    image, names = min((photo_folder / "disc").iterdir()), ["disc", "square"]
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    file = tmp_path / "one.parquet"
    datasets.Dataset.from_dict(
        {"image": [{"bytes": image.read_bytes(), "path": None}], "label": [0]}, kinds
    ).to_parquet(str(file))
    assert start(f"--evaluation.test_source={file}", steps=1, labels=True) == 0
    gain = json.loads((tmp_path / "run" / "results.json").read_text())["trained_minus_untrained"]["knn"]
    assert gain["low"] <= gain["difference"] <= gain["high"]
    assert gain["high"] - gain["low"] > 1


def test_the_scripts_give_the_scores_that_the_run_gave(start: Callable[..., int], tmp_path: Path) -> None:
    start("--evaluation.crop_pct=1.0", "--evaluation.feature=cls", "--evaluation.k=5", "--seed=4", labels=True)
    scores = json.loads((tmp_path / "run" / "results.json").read_text())["scores"]
    flags = ["--open_source=true", "--ks=[5]", "--precision=no", "--baselines=[pixels,untrained]"]
    assert command.main(evaluate_knn, {"": KNNConfig()}, None, [str(tmp_path / "run"), *flags]) == 0
    found = json.loads((tmp_path / "run" / "knn.json").read_text())
    for ours, theirs in (("raw pixels", "pixels"), ("untrained", "untrained"), ("trained", "backbone")):
        assert scores[ours]["knn"] == found[theirs]["k=5"]


def test_the_written_config_repeats_the_run(start: Callable[..., int], tmp_path: Path) -> None:
    start()
    AcceleratorState._reset_state()
    again = ["--config", str(tmp_path / "run" / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert train(set_up(parse_run(DEFAULTS, again))) == 0
    for name, value in last_weights(tmp_path / "run").items():
        assert torch.equal(value, last_weights(tmp_path / "again")[name]), name


@pytest.mark.parametrize("objective", [pytest.param("mae", marks=pytest.mark.slow), "dino"])
def test_accumulation_is_one_big_batch(start: Callable[..., int], tmp_path: Path, objective: str) -> None:
    start("--encoder.drop_path_rate=0", name="whole", objective=objective)
    start("--encoder.drop_path_rate=0", "--batch.per_device=2", name="cut", objective=objective)
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "cut"), rel=1e-4)
    for name, value in last_weights(tmp_path / "whole").items():
        torch.testing.assert_close(value, last_weights(tmp_path / "cut")[name], rtol=1e-3, atol=1e-4)


def test_a_finished_run_is_not_trained_again(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start()
    before = last_weights(tmp_path / "run")
    capsys.readouterr()
    assert start() == 0
    text = capsys.readouterr().out
    assert "Going on from" in text
    assert "This run is finished" in text
    assert all(torch.equal(value, before[name]) for name, value in last_weights(tmp_path / "run").items())


def test_a_signal_saves_and_the_same_command_goes_on(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(name="whole")
    image = Source.image
    drawn = 0

    def interrupted(self: Source, index: int, num_channels: int):
        nonlocal drawn
        drawn += 1
        if drawn == 20:  # in the third step
            os.kill(os.getpid(), signal.SIGTERM)
        return image(self, index, num_channels)

    with monkeypatch.context() as patched:
        patched.setattr(Source, "image", interrupted)
        assert start() == 143
    run = tmp_path / "run"
    assert [folder.name for folder in list_checkpoints(run)] == ["step-00000003"]
    assert "Stopped by a signal at step 3 of 6 and saved" in capsys.readouterr().out
    assert not (run / "backbone.safetensors").exists()
    assert start() == 0
    assert losses(run) == losses(tmp_path / "whole")
    assert all(torch.equal(value, last_weights(run)[name]) for name, value in last_weights(tmp_path / "whole").items())


@pytest.mark.usefixtures("quick_scores")
@pytest.mark.parametrize("at", ["export_backbone", "compare"])
def test_a_run_that_was_killed_at_its_end_is_not_finished(
    start: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: str,
) -> None:
    """Also where a backbone was exported on the way."""
    run = tmp_path / "run"

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StopSignal, "agreed", lambda _: signal.SIGTERM)
        assert start(labels=True) == 143
    export_run(run)
    with monkeypatch.context() as patched:
        patched.setattr(ending, at, killed)
        with pytest.raises(KeyboardInterrupt):
            start(labels=True)
    assert start(labels=True) == 0
    assert "This run is finished" not in capsys.readouterr().out
    weights = last_weights(run)
    for name, value in load_backbone(run).state_dict().items():
        assert torch.equal(value, weights[f"encoder.{name}"]), name
    assert "trained" in json.loads((run / "results.json").read_text())["scores"]
    assert start(labels=True) == 0
    assert "This run is finished" in capsys.readouterr().out


def test_other_settings_are_refused_in_an_existing_run(start: Callable[..., int], tmp_path: Path) -> None:
    start()
    with pytest.raises(ValueError, match=r"other settings: objective.mask_ratio 0.75 -> 0.5, seed 0 -> 1.*--fresh"):
        start("--seed=1", "--objective.mask_ratio=0.5")
    start("--log_every=3", "--batch.per_device=4", "--checkpoint.keep=5")  # these may change


def test_fresh_moves_the_existing_run_aside(start: Callable[..., int], tmp_path: Path) -> None:
    start()
    before = (tmp_path / "run" / "backbone.safetensors").read_bytes()
    start("--fresh", "--seed=1")
    (aside,) = tmp_path.glob("run-before-*")
    assert (aside / "backbone.safetensors").read_bytes() == before
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 1


def test_a_folder_with_other_files_is_not_touched(start: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds files but no run"):
        start()


def test_an_unlabelled_source_has_no_scores(
    start: Callable[..., int], photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(f"--data.source={photo_folder / 'disc'}", steps=1, labels=True) == 0
    assert "No scores: the source has no labels" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == {"step": 1, "scores": None}
    assert start(f"--data.source={photo_folder / 'disc'}", steps=1, labels=True) == 0
    assert "This run is finished" in capsys.readouterr().out


def test_labels_that_are_identifiers_do_not_judge_a_run(
    start: Callable[..., int], photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [str(path) for path in sorted((photo_folder / "disc").iterdir())]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    numbered = datasets.Dataset.from_dict({"image": images, "label": range(20)}, features)
    numbered.to_parquet(str(tmp_path / "numbered.parquet"))
    trusted = ["--data.allow_outside_paths=true", "--data.label_column=label"]
    assert start(f"--data.source={tmp_path / 'numbered.parquet'}", *trusted, steps=1, labels=True) == 0
    text = capsys.readouterr().out
    assert "note       no scores at the end: " in text
    assert "each of the 20 labelled images has a class of its own" in text
    assert json.loads((tmp_path / "run" / "results.json").read_text())["scores"] is None
    with pytest.raises(ValueError, match=r"has no labels, .*: no column is known to hold classes; there are label"):
        start(f"--evaluation.source={tmp_path / 'numbered.parquet'}", trusted[0], steps=1, labels=True, name="judged")


@pytest.mark.usefixtures("quick_scores")
def test_a_labelled_source_can_judge_an_unlabelled_one(
    start: Callable[..., int], photo_folder: Path, tmp_path: Path
) -> None:
    assert (
        start(f"--data.source={photo_folder / 'disc'}", f"--evaluation.source={photo_folder}", steps=1, labels=True)
        == 0
    )
    assert json.loads((tmp_path / "run" / "results.json").read_text())["scores"]["trained"]["knn"]["n"] == 40


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--evaluation.source=/nowhere", "evaluation.source='/nowhere': no such file"),
        ("--evaluation.source=DISC", r"evaluation.source='.*disc': has no labels"),
        ("--evaluation.test_source=DISC", r"evaluation.test_source='.*disc': has no labels"),
        ("--evaluation.test_split=train", "are learned from.* name others with evaluation.test_source or"),
    ],
)
def test_what_cannot_judge_is_found_before_training(
    start: Callable[..., int], photo_folder: Path, tmp_path: Path, flag: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start(flag.replace("DISC", str(photo_folder / "disc")), labels=True)
    assert not (tmp_path / "run").exists()


def test_the_norm_of_the_gradients_is_logged_clipped_or_not(start: Callable[..., int], tmp_path: Path) -> None:
    start("--optim.clip_grad=0.1", steps=1, name="clipped")
    start(steps=1)
    clipped, free = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("clipped", "run"))
    assert clipped["grad_norm"] == free["grad_norm"] > 0.1


def test_a_run_under_way_can_be_exported(start: Callable[..., int], tmp_path: Path) -> None:
    start()
    run = tmp_path / "run"
    finished = (run / "backbone.safetensors").read_bytes()
    (run / "backbone.safetensors").unlink()
    (run / "config.json").unlink()
    assert export_run(run).read_bytes() == finished
    assert load_backbone(run).embed_dim == 32


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--objective.local_crop_size=20", r"objective.local_crop_size=20: the height 20"),
        ("--encoder.in_chans=5", r"data.mean=.* has 3 values, and encoder.in_chans is 5"),
    ],
)
def test_what_cannot_be_cropped_or_normalised_leaves_no_run_behind(
    start: Callable[..., int], tmp_path: Path, flag: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start(flag, objective="dino")
    assert not (tmp_path / "run").exists()


def test_wrong_settings_end_in_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain_mae.py", "--objective.mask_ratio=1.2"])
    assert main(DEFAULTS, quickstart="quickstart_mae.yaml") == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: objective.mask_ratio=1.2: must lie in (0, 1); the paper's is 0.75"
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_ends_a_run_in_one_line_and_code_1(
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_workers: int,
) -> None:
    shutil.copytree(photo_folder, tmp_path / "photos")
    (tmp_path / "photos" / "square" / "19.png").write_bytes(b"no image")
    flags = [f"--data.source={tmp_path / 'photos'}", f"--output_dir={tmp_path / 'run'}", "--steps=6"]
    more = [f"--data.num_workers={num_workers}", "--checkpoint.every_steps=1", "--data.label_column=none"]
    more.append("--data.on_bad_image=raise")
    monkeypatch.setattr("sys.argv", ["pretrain_mae.py", *SMALL_RUN, *flags, *more])
    assert main(DEFAULTS) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: data.source='{tmp_path / 'photos'}': row 39 (")
    assert line.endswith(". The checkpoints before it are whole.")
    without = [f"--output_dir={tmp_path / 'without'}", "--checkpoint.every_steps=100"]
    monkeypatch.setattr("sys.argv", ["pretrain_mae.py", *SMALL_RUN, *flags, *more, *without])
    assert main(DEFAULTS) == 1
    assert "checkpoints" not in capsys.readouterr().err


@pytest.mark.usefixtures("quick_scores")
def test_a_batch_larger_than_the_data_is_told(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert start("--batch.size=64", steps=1) == 0
    assert "note       40 images are fewer than batch.size 64" in capsys.readouterr().out
    assert parse_run(DEFAULTS, ["--steps=1", "--batch.size=40"]).notes(40) == []


@pytest.mark.parametrize(("objective", "drawn"), [("dino", True), ("mae", False)])
def test_neighbours_are_drawn_where_nothing_is_reconstructed(
    start: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    drawn: bool,
) -> None:
    monkeypatch.setattr("ssl_vit.training.ending.LEAST_GALLERY", 40)
    assert start(objective=objective) == 0
    figure = tmp_path / "run" / "neighbours.png"
    assert figure.is_file() == drawn
    assert (f"figure     {figure}" in capsys.readouterr().out) == drawn


@pytest.mark.parametrize("objective", ["dino", "dinov2"])
def test_the_teacher_is_what_is_exported_and_drawn(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    assert start(objective=objective) == 0
    run, weights = tmp_path / "run", last_weights(tmp_path / "run")
    for name, value in load_backbone(run).state_dict().items():
        assert torch.equal(value, weights[f"teacher_encoder.{name}"]), name
        assert name.endswith(("mask_token", "k_norm")) or value.shape == weights[f"encoder.{name}"].shape
    assert (run / "attention.png").stat().st_size > 1000
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    signs = {"teacher_entropy", "kl", "feature_std", "rankme", "prototypes_used", "below_ln_k", "ema_momentum"}
    assert signs <= set(record)
    finished = (run / "backbone.safetensors").read_bytes()
    assert export_run(run).read_bytes() == finished
    text = capsys.readouterr().out
    assert "auto       objective.num_prototypes 256: about one for 16 images" in text
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["objective"]["num_prototypes"] == 256
    assert config["objective"]["ema_momentum"] == 0.9


def test_what_auto_became_stays_when_the_run_goes_on(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start("--optim.base_lr=auto", objective="dino")
    assert "a peak rate of 3.5e-04, for fresh weights and 8 images" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["optim"]["base_lr"] == pytest.approx(
        1e-3 * 32 / 8**0.5
    )
    monkeypatch.setattr("ssl_vit.objectives.recipes.choose_num_prototypes", lambda *_: 512)  # another version's rule
    assert start("--optim.base_lr=auto", objective="dino") == 0
    with pytest.raises(ValueError, match=r"objective.num_prototypes 256 -> 128"):
        start("--objective.num_prototypes=128", objective="dino")
    with pytest.raises(ValueError, match=r"steps 6 -> 12"):
        start(objective="dino", steps=12)
