"""Fine-tuning with a teacher (DeiT), from the command line to classifiers of timm and transformers."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from scripts.finetune import DEFAULTS
from ssl_vit.export.run import export_distilled_run, export_run
from ssl_vit.training.config import parse_run
from tests.classifiers import cnn, write_classifier
from tests.processes import finish, kill_at
from tests.test_resume import losses, same
from tests.training.test_supervised import SMALL, STEPS, call, results

STUDENT = ["--encoder.arch=deit_tiny_distilled_patch16_224", "--encoder.image_size=32", "--encoder.patch_size=8"]
STUDENT += ["--encoder.depth=2", "--encoder.embed_dim=48", "--encoder.num_heads=4"]
PLAIN = ["--objective.mixup=0", "--objective.cutmix=0", "--encoder.drop_path_rate=0"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another size and normalisation than the student's."""
    folder = tmp_path_factory.mktemp("teacher")
    return write_classifier(folder, cnn(2), input_size=[3, 48, 48], label_names=["disc", "square"])


def words(source: Path, run: Path, teacher: Path | str, *flags: str) -> list[str]:
    front = str(Path(__file__).parents[2] / "scripts" / "finetune.py")
    paths = [f"--data.source={source}", f"--output_dir={run}", f"--objective.teacher={teacher}"]
    return [front, *paths, *SMALL, *STUDENT, *flags]


def test_a_run_ends_with_classifiers_that_need_no_teacher(
    teacher: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from transformers import DeiTForImageClassificationWithTeacher

    moved, run = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(teacher, moved)
    assert call(monkeypatch, words(photo_folder, run, moved, "--steps=4", "--objective.model_ema=0.5")) == 0
    assert results(run)["teacher"] == str(moved)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all({"loss_labels", "teacher_agreement"} <= line.keys() for line in logged if "loss" in line)
    checkpoint = run / "checkpoints" / "step-00000004"
    assert not [name for name in load_file(checkpoint / "model.safetensors") if "teacher" in name]
    assert json.loads((checkpoint / "state.json").read_text())["frozen"].keys() == {"teacher"}
    written = (run / "model.safetensors").read_bytes()
    shutil.rmtree(moved)
    assert export_run(run).read_bytes() == written
    timms = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    theirs = DeiTForImageClassificationWithTeacher.from_pretrained(export_distilled_run(run, tmp_path / "deit")).eval()
    assert theirs.config.id2label == {0: "disc", 1: "square"}
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(theirs(images).logits, timms(images), rtol=1e-4, atol=1e-5)


def test_a_killed_run_with_repeated_augmentation_ends_with_the_same_weights_bit_for_bit(
    teacher: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with other loader workers, and the teacher in another place."""
    runs, flags = (tmp_path / "whole", tmp_path / "killed"), ["--checkpoint.every_steps=3", "--batch.repeats=3"]
    assert call(monkeypatch, words(photo_folder, runs[0], teacher, *flags)) == 0
    kill_at(words(photo_folder, runs[1], teacher, *flags, "--data.num_workers=2"), 5)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(teacher, elsewhere)
    assert "Going on from" in finish(words(photo_folder, runs[1], elsewhere, *flags, "--data.num_workers=2"))
    one, two = (load_file(run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors") for run in runs)
    assert same(one, two) == []
    assert losses(runs[0]) == losses(runs[1])


@pytest.mark.parametrize("repeats", [1, 3])
def test_two_processes_learn_as_one(
    repeats: int, teacher: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--steps=4", *PLAIN, f"--batch.repeats={repeats}", "--objective.distillation=soft"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert call(monkeypatch, words(photo_folder, one, teacher, *flags)) == 0
    finish(words(photo_folder, two, teacher, *flags, "--batch.per_device=2"), num_processes=2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


def test_a_run_goes_on_with_the_teacher_it_began_with_alone(
    teacher: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    write_classifier(other, cnn(2, seed=1), label_names=["disc", "square"])
    limited = ["--max_hours=1e-9"]
    assert call(monkeypatch, words(photo_folder, run, teacher, *limited)) == 75
    before = (run / "config.yaml").read_text()
    for changed, said in ((other, "the teacher's weights are not those that"), ("nowhere", "no such file or folder")):
        capsys.readouterr()
        assert call(monkeypatch, words(photo_folder, run, changed)) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"error: objective.teacher='{changed}': ")
        assert said in error
        assert "\n" not in error
        assert (run / "config.yaml").read_text() == before
    assert call(monkeypatch, [word for word in words(photo_folder, run, teacher) if "teacher" not in word]) == 2
    assert call(monkeypatch, words(photo_folder, run, teacher, "--steps=12")) == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_classes": 5}, "knows 5 classes, and the run has 2 (num_classes); name a teacher that was trained on"),
        ({"in_chans": 1, "num_classes": 2}, "takes 1 channels, and encoder.in_chans is 3; name a teacher for such"),
        ({"num_classes": 2, "label_names": ["square", "disc"]}, "its class 0 is 'square', and that of the data is 'di"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_an_image_is_read(
    settings: dict,
    said: str,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    names = {"label_names": settings.pop("label_names", None)}
    folder = write_classifier(tmp_path / "teacher", cnn(**settings), **names)
    monkeypatch.setattr("ssl_vit.data.sources.images.Source.image", lambda *_: pytest.fail("an image was read"))
    assert call(monkeypatch, words(photo_folder, tmp_path / "run", folder)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: objective.teacher='{folder}': ")
    assert said in error
    assert "\n" not in error
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_classifier_of_ours_teaches_and_goes_on_with_its_head_at_another_size(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    alone = [word for word in words(photo_folder, first, "") if "teacher" not in word]
    assert call(monkeypatch, [*alone, "--steps=2", "--objective.head_init=0.5"]) == 0
    trained = timm.create_model(f"local-dir:{first}", pretrained=True).eval()
    going_on = ["--objective.keep_head=true", f"--encoder.pretrained={first}", "--objective.num_classes=2"]
    begun = parse_run(DEFAULTS, [f"--data.source={photo_folder}", *going_on, f"--objective.teacher={first}"])
    objective = begun.build_objective().eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(objective.logits(images)["head"], trained(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(objective.frozen[0](images), trained(images))
    flags = [*going_on, "--encoder.image_size=64", "--steps=2"]
    assert call(monkeypatch, words(photo_folder, second, first, *flags)) == 0
    with pytest.raises(ValueError, match=r"^objective.keep_head=True: .* knows 2 classes, and this run has 3"):
        parse_run(DEFAULTS, ["--data.source=x", *going_on, "--objective.num_classes=3"]).build_objective()
    capsys.readouterr()
    assert call(monkeypatch, [*words(photo_folder, tmp_path / "third", first), "--objective.keep_head=true"]) == 2
    assert "objective.keep_head=True: name the classifier to go on from with encoder.p" in capsys.readouterr().err


def test_a_head_of_one_layer_becomes_both_heads(tmp_path: Path, photo_folder: Path) -> None:
    from ssl_vit.export.classifier import export_classifier
    from ssl_vit.models import EncoderConfig
    from ssl_vit.objectives.finetune import FineTuneConfig
    from tests.conftest import TINY
    from tests.specs import grey

    trained = FineTuneConfig(num_classes=2, head_init=0.5).build(EncoderConfig(image_size=32, **TINY).build()).eval()
    with torch.no_grad():
        trained.classifier.fc_norm.bias.add_(0.3)
    export_classifier(
        trained, tmp_path, class_names=(), normalization=grey(mean=0.5, std=0.5), crop_pct=1.0, provenance={}
    )
    flags = [f"--encoder.pretrained={tmp_path}", "--objective.keep_head=true", "--objective.num_classes=2"]
    objective = parse_run(DEFAULTS, ["--data.source=x", *flags, f"--objective.teacher={tmp_path}"]).build_objective()
    heads = objective.eval().classifier.heads
    assert len(heads) == 2
    assert torch.equal(heads[0].weight, heads[1].weight)
    images = torch.randn(2, 3, 32, 32)
    expected = trained.logits(images)["head"]
    torch.testing.assert_close(objective.logits(images)["head"], expected, rtol=1e-4, atol=1e-5)


def test_a_stream_is_not_repeated() -> None:
    with pytest.raises(ValueError, match=r"^batch.repeats=3: a stream gives each image once; leave this or data"):
        parse_run(DEFAULTS, ["--data.source=x.tar", "--data.streaming=true", "--batch.repeats=3"])
