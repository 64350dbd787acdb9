"""Distillation: the losses beside published numbers, the view, the queue, and what is refused."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from scripts import distill
from scripts.doctor import main as examine
from ssl_vit.core.manifest import hash_tensors
from ssl_vit.data.augment.device import normalize, renormalize
from ssl_vit.data.transform import InputSpec, Normalization
from ssl_vit.evaluation.untrained import untrained_encoder
from ssl_vit.export import load_backbone
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.weights.pretrained import load_pretrained
from ssl_vit.objectives.distill import (
    Distill,
    DistillConfig,
    draw_share,
    entropy_share,
    mix_neighbours,
    queue_loss,
    relation_loss,
    resample,
    without_common,
)
from ssl_vit.objectives.frozen_teacher import find_teacher
from ssl_vit.objectives.objective import RunSize
from ssl_vit.runs.trained import open_trained
from ssl_vit.training.loop import main
from tests.backbones import teacher_folder, write_backbone
from tests.conftest import OBJECTIVES, TINY, last_weights
from tests.families import CONVOLUTIONS, FAMILIES

GREY = Normalization((0.5,) * 3, (0.5,) * 3)
TEACHERS = Normalization((0.4,) * 3, (0.3,) * 3)  # of `teacher_folder`


def wave(*shape: int, f: float, p: float) -> Tensor:
    index = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return F.normalize(torch.sin(f * index + p).float().reshape(shape), dim=-1)


def student(**settings: Any) -> Encoder:
    torch.manual_seed(3)
    return EncoderConfig(image_size=32, **TINY, **settings).build()


def config(**settings: Any) -> DistillConfig:
    return DistillConfig(**{"teacher": str(teacher_folder()), "queue_size": 8, **settings})


def batch(size: int = 4, seed: int = 0) -> dict[str, Tensor]:
    images = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"images": images, "teacher_images": renormalize(images, GREY, TEACHERS)}


def read_teacher() -> Encoder:
    encoder = EncoderConfig("vit_tiny_patch16_224", 32, patch_size=8, embed_dim=24, depth=2, num_heads=2).build()
    load_pretrained(encoder, str(teacher_folder()))
    return encoder.eval()


def test_losses_are_those_of_the_reference() -> None:
    teacher, learner = wave(4, 5, f=0.31, p=0.2), wave(4, 5, f=0.77, p=0.6)
    queue = torch.cat([teacher, wave(4, 5, f=0.11, p=0.3)])
    assert queue_loss(learner, teacher, queue, 0.07).item() == pytest.approx(9.098548, rel=1e-6)
    teacher, learner = wave(2, 6, 5, f=0.53, p=0.8), wave(2, 6, 5, f=0.29, p=0.4)
    assert relation_loss(learner, teacher, 0.07).item() == pytest.approx(0.325016, rel=2e-6)
    assert relation_loss(3 * learner, 5 * teacher, 0.07).item() == pytest.approx(0.325016, rel=2e-6)
    assert queue_loss(teacher[0], teacher[0], queue, 0.07).item() == pytest.approx(0, abs=1e-6)


def test_the_entropy_of_targets_is_1_where_all_images_are_alike_and_0_where_one_is() -> None:
    alike, apart = torch.eye(6)[[0] * 6], torch.eye(6)
    assert entropy_share(alike, alike, 0.07).item() == pytest.approx(1)
    assert entropy_share(apart, apart, 0.07).item() == pytest.approx(0, abs=1e-4)
    assert 0.1 < entropy_share(apart, apart, 0.5).item() < 0.9


@pytest.mark.parametrize("center", [False, True])
def test_the_objective_compares_with_the_batch_and_the_queue(center: bool) -> None:
    """What forward returns, computed again from the encoders' own outputs."""
    objective = config(mixup=False, local_weight=0.5, center=center).build(student()).train()
    objective.queue.copy_(F.normalize(torch.randn(8, 24), dim=-1))
    given = batch()
    found = objective(given, 0.3)
    with torch.no_grad():
        features, wanted = objective.encoder(given["images"]), read_teacher()(given["teacher_images"])
        cls = F.normalize(wanted.cls, dim=-1)
        guess = F.normalize(objective.head(features.cls), dim=-1)
        bank = torch.cat([cls, objective.queue])
        bank, target = without_common(bank, cls) if center else (bank, cls)
        image = queue_loss(guess, target, bank, 0.07)
        local = relation_loss(objective.local_head(features.patches), wanted.patches, 0.07)
    assert found["loss_image"].item() == pytest.approx(image.item(), rel=1e-5)
    assert found["loss_local"].item() == pytest.approx(local.item(), rel=1e-5)
    assert found["loss"].item() == pytest.approx((image + 0.5 * local).item(), rel=1e-5)
    nearest = (guess @ bank.T).argmax(dim=-1)
    assert found["own_found"].item() == pytest.approx((nearest == torch.arange(4)).float().mean().item())


def test_tokens_are_resampled_to_the_grid_of_the_teacher(tmp_path: Path) -> None:
    ramp = torch.arange(4.0).repeat(4)[None, :, None]  # rises from column to column
    expected = torch.tensor([0.5, 2.5]).repeat(2)
    torch.testing.assert_close(resample(ramp, (4, 4), (2, 2))[0, :, 0], expected)
    assert resample(ramp, (4, 4), (4, 4)) is ramp
    assert resample(ramp.expand(2, 16, 5), (4, 4), (3, 7)).shape == (2, 21, 5)
    teacher = write_backbone(tmp_path / "coarse", EncoderConfig("convnext_atto", 64, model_args=CONVOLUTIONS))
    objective = config(teacher=str(teacher), teacher_size=64).build(student())
    seen = F.interpolate(batch()["images"], (64, 64))
    objective({"images": batch()["images"], "teacher_images": seen}, 0.5)["loss"].backward()  # 4 x 4 to 2 x 2
    assert objective.local_head is not None
    assert objective.local_head.weight.grad is not None
    assert objective.local_head.weight.grad.abs().sum() > 0


def test_the_queue_holds_the_newest_features_first_in_the_order_of_the_samples() -> None:
    objective = config(queue_size=6, mixup=False).build(student())
    first, second = batch(4, seed=1), batch(4, seed=2)
    model = read_teacher()
    with torch.no_grad():
        cls = [F.normalize(model(each["teacher_images"]).cls, dim=-1) for each in (first, second)]
    assert not objective.queue.any()
    objective(first, 0.1)
    objective.after_step(0.1)
    torch.testing.assert_close(objective.queue, torch.cat([cls[0], torch.zeros(2, 24)]))
    for part in (slice(0, 2), slice(2, 4)):  # a step of two micro-batches
        objective({name: value[part] for name, value in second.items()}, 0.2)
    objective.after_step(0.2, torch.tensor(True))
    torch.testing.assert_close(objective.queue, torch.cat([cls[1], cls[0][:2]]))


def test_a_step_that_is_skipped_or_never_taken_leaves_the_queue() -> None:
    objective = config().build(student())
    objective(batch(seed=1), 0.1)
    objective.after_step(0.1)
    before = objective.queue.clone()
    objective({name: value * float("nan") for name, value in batch(seed=2).items()}, 0.2)
    objective.after_step(0.2, torch.tensor(False))
    assert torch.equal(objective.queue, before)
    objective(batch(seed=3), 0.3)  # a spike: the run goes back and past this step
    objective(batch(seed=4), 0.4)
    objective.after_step(0.4)
    expected = config().build(student())
    expected.queue.copy_(before)
    expected(batch(seed=4), 0.4)
    expected.after_step(0.4)
    assert torch.equal(objective.queue, expected.queue)


def test_the_teacher_is_neither_state_nor_learned(tmp_path: Path) -> None:
    objective = config().build(student())
    names = set(objective.state_dict())
    assert {name.split(".")[0] for name in names} == {"encoder", "head", "local_head", "queue"}
    sha256 = objective.frozen[0].sha256
    objective.train()(batch(), 0.5)["loss"].backward()
    assert copy.deepcopy(objective).frozen[0].sha256 == sha256
    deeper = replace(read_teacher().config, depth=3)
    folder = write_backbone(tmp_path / "deeper", deeper)
    other, again = (config(teacher=str(path)).build(student()) for path in (folder, teacher_folder()))
    assert torch.equal(other.head.weight, again.head.weight)  # what is drawn for a teacher changes nothing else
    assert other.frozen[0].sha256 != sha256
    fitted = config(teacher_size=48).build(student())  # with other positions
    assert fitted.frozen[0].sha256 == sha256 == teacher_hash()


def test_both_networks_see_the_same_view_each_normalised_as_it_was_trained() -> None:
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (3, 50, 60), dtype=np.uint8))
    spec = InputSpec((32, 32), (8, 8), GREY)
    transform = config(color_jitter_prob=0.0, grey_prob=0.0, flip_prob=0.0).build_transform(spec)
    sample = {name: value[None] for name, value in transform(image, np.random.default_rng(1)).items()}
    found = transform.on_device(sample, torch.device("cpu"))
    pixels = sample["global_crops"][:, 0]
    torch.testing.assert_close(found["images"], normalize(pixels, GREY))
    torch.testing.assert_close(found["teacher_images"], normalize(pixels, TEACHERS), rtol=1e-5, atol=1e-5)
    larger = config(teacher_size=48, color_jitter_prob=0.0, grey_prob=0.0, flip_prob=0.0).build_transform(spec)
    resized = larger.on_device(sample, torch.device("cpu"))["teacher_images"]
    expected = F.interpolate(normalize(pixels, TEACHERS), (48, 48), mode="bicubic", antialias=True)
    torch.testing.assert_close(resized, expected, rtol=1e-4, atol=1e-4)
    alike = config().build_transform(spec._replace(normalization=TEACHERS))
    same = alike.on_device(sample, torch.device("cpu"))
    assert same["images"] is same["teacher_images"]


@pytest.mark.parametrize(
    ("size", "stride", "wanted"),
    [((64, 64), (8, 8), (112, 112)), ((224, 224), (16, 16), (224, 224)), ((224, 224), (32, 32), (224, 224)),
     ((32, 32), (4, 4), (112, 112)), ((16, 48), (8, 8), (28, 84)), ((100, 150), (10, 10), (140, 210))],
)  # fmt: skip
def test_the_teacher_sees_as_many_tokens_or_pixels_as_the_student(
    size: tuple[int, int], stride: tuple[int, int], wanted: tuple[int, int]
) -> None:
    found = find_teacher("vit_small_patch14_dinov2.lvd142m", None, "auto", size, stride)
    assert found.image_size == wanted
    assert found.normalization == Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_images_are_mixed_with_their_neighbours_by_the_share_of_the_step() -> None:
    images = torch.arange(5.0)[:, None, None, None]
    assert mix_neighbours(images, 0.75).flatten().tolist() == [0.25, 0.75, 2.25, 2.75, 4.0]
    whole = torch.arange(8.0)[:, None, None, None]
    parts = torch.cat([mix_neighbours(part, 0.3) for part in whole.split(4)])
    assert torch.equal(parts, mix_neighbours(whole, 0.3))
    shares = [draw_share(step / 1000) for step in range(1000)]
    assert shares == [draw_share(step / 1000) for step in range(1000)]
    assert np.histogram(shares, bins=4, range=(0, 1))[0].min() > 200
    objective = config().build(student())
    given, share = batch(), draw_share(0.5)
    mixed = {name: mix_neighbours(images, share) for name, images in given.items()}
    plain = Distill(replace(objective.config, mixup=False), objective.encoder, objective.frozen[0])
    plain.load_state_dict(objective.state_dict())
    assert torch.equal(objective(given, 0.5)["loss"], plain(mixed, 0.5)["loss"])


@pytest.mark.parametrize(
    ("images", "queue"),
    [(50, 16), (51, 32), (250, 64), (500, 128), (1000, 256), (2000, 512), (4000, 1024), (10_000, 2048), (20_000, 4096),
     (20_001, 8192)],
)  # fmt: skip
def test_the_queue_follows_from_the_number_of_images(images: int, queue: int) -> None:
    found = DistillConfig().resolve(RunSize(images, 128, 1000))
    assert found["queue_size"].value == queue
    assert DistillConfig(queue_size=7).resolve(RunSize(images, 128, 1000)) == {}


def weights_of(folder: Path, file: Path) -> str:
    save_file(load_file(folder / "model.safetensors"), file)
    return str(file)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"teacher": None}, "teacher=None: name the frozen backbone to learn from, such as"),
    "missing": ({"teacher": "/absent/run"}, "teacher='/absent/run': /absent/run: no such file or folder"),
    "BatchNorm": (
        {"teacher": "resnet50.a1_in1k"},
        "teacher=.*: arch='resnet50.a1_in1k': has BatchNorm",
    ),
    "another family": ({"teacher": "hiera_tiny_224.mae"}, "teacher='hiera_tiny_224.mae': arch=.*not supported"),
    "no download": (
        {"teacher": "vit_small_patch14_dinov2.lvd142m"},
        "teacher='vit_small_patch14_dinov2.lvd142m': timm cannot load its weights: ",
    ),
    "no such tag": ({"teacher": "vit_tiny_patch16_224.none"}, "teacher='vit_tiny_patch16_224.none': .*no pre-trained"),
    "size": ({"teacher_size": 50}, "teacher_size=50: the height 50 is no multiple of 8, .*: 48 and 56$"),
    "proportions": ({"teacher_size": (32, 64)}, r"teacher_size=\(32, 64\): would distort views"),
    "one patch": ({"teacher_size": 8}, "local_weight=1.0: compares patches, .* teacher has a single one; use 0, or"),
    "auto": ({"queue_size": "auto"}, "queue_size='auto': follows from the number of images"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("default")
def test_what_cannot_work_is_refused_in_one_line(name: str) -> None:
    settings, said = REFUSED[name]
    with pytest.raises(ValueError, match=f"^{said}") as raised:
        config(**settings).build(student())
    assert "\n" not in str(raised.value)


def test_other_channels_a_single_patch_and_unknown_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^teacher=.*: takes 3 channels, and encoder.in_chans is 1: give both"):
        config().build(student(in_chans=1))
    coarse = EncoderConfig("convnext_atto", 32, model_args=CONVOLUTIONS).build()
    with pytest.raises(ValueError, match=r"^local_weight=1.0: compares patches, .* the student has a single one"):
        config().build(coarse)
    config(local_weight=0).build(coarse)
    file = weights_of(teacher_folder(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"^teacher=.*do not tell their architecture; .* objective.teacher_arch"):
        config(teacher=file).build(student())
    with pytest.raises(ValueError, match=r"^teacher=.*weights.safetensors.*name theirs with --objective.teacher_arch"):
        config(teacher=file, teacher_arch="vit_tiny_patch16_224", teacher_size=32).build(student())


@pytest.mark.parametrize("name", FAMILIES)
def test_any_family_teaches(name: str, tmp_path: Path) -> None:
    """A Vision Transformer learns from it; its features are those of the teacher's own forward."""
    given, size = FAMILIES[name], {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    folder = write_backbone(tmp_path / name.replace(" ", "-"), given)
    pupil = EncoderConfig("vit_tiny_patch16_224", 64, in_chans=given.in_chans, **size)
    objective = config(teacher=str(folder), mixup=False, color_jitter_prob=0.0).build(pupil.build())
    spec = InputSpec((64, 64), (8, 8), Normalization((0.5,) * given.in_chans, (0.5,) * given.in_chans))
    transform = objective.config.build_transform(spec)
    image = torch.randint(0, 256, (given.in_chans, 70, 70), dtype=torch.uint8)
    samples = [transform(image, np.random.default_rng(seed)) for seed in range(2)]
    views = transform.on_device(
        {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}, torch.device("cpu")
    )
    teacher = replace(given, image_size=tuple(views["teacher_images"].shape[-2:]), drop_path_rate=0.0).build().eval()
    load_pretrained(teacher, str(folder))
    with torch.no_grad():
        expected = teacher(views["teacher_images"])
    found = objective.teach(views["teacher_images"])
    torch.testing.assert_close(found.cls, F.normalize(expected.cls, dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.patches, expected.patches, rtol=1e-4, atol=1e-5)
    losses = objective(views, 0.5)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())


def test_the_untrained_baseline_needs_no_teacher() -> None:
    encoder = EncoderConfig(image_size=32, **TINY)
    without = untrained_encoder(encoder, DistillConfig(teacher="/absent"), seed=4)
    objective = config()
    torch.manual_seed(4)
    with_teacher = objective.build(encoder.build()).backbone()
    assert all(torch.equal(a, b) for a, b in zip(without.parameters(), with_teacher.parameters(), strict=True))


def test_a_run_goes_on_with_the_same_teacher_wherever_it_lies_and_with_no_other(
    start: Callable[..., int], photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    moved, other = tmp_path / "moved", tmp_path / "other"
    for folder in (moved, other):
        folder.mkdir()
        for file in teacher_folder().iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "model.safetensors")
    tensors["norm.bias"] += 1e-6
    save_file(tensors, other / "model.safetensors")
    save = ["--checkpoint.every_steps=2", "--max_hours=1e-9"]
    assert start(*save, objective="distill") == 75
    run = tmp_path / "run"
    assert not [name for name in last_weights(run) if "teacher" in name]
    assert last_weights(run)["queue"].any()
    words = [*OBJECTIVES["distill"][1], f"--data.source={photo_folder}", f"--output_dir={run}", "--steps=6"]
    words += ["--data.label_column=none", f"--objective.teacher={other}"]
    monkeypatch.setattr("sys.argv", ["distill.py", *words])
    settings = (run / "config.yaml").read_bytes()
    assert main(distill.DEFAULTS) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.match(rf"error: objective.teacher='{other}': the teacher's weights are not those that .*step-", line)
    assert (run / "config.yaml").read_bytes() == settings
    assert start("--checkpoint.every_steps=2", f"--objective.teacher={moved}", objective="distill") == 0
    assert start("--checkpoint.every_steps=2", objective="distill", name="whole") == 0
    assert all(torch.equal(value, last_weights(tmp_path / "whole")[name]) for name, value in last_weights(run).items())
    shutil.rmtree(moved)  # the backbone is the student's: nothing that follows needs the teacher
    trained = open_trained(run)
    assert (trained.pooled, trained.provenance["objective"]) == ("cls", "Distill")
    assert json.loads((run / "config.json").read_text())["ssl_vit"]["frozen"]["teacher"] == teacher_hash()
    assert load_backbone(run).embed_dim == 32
    assert (run / "attention.png").stat().st_size > 0


def teacher_hash() -> str:
    return hash_tensors(load_file(teacher_folder() / "model.safetensors"))


def test_the_doctor_counts_the_teacher_and_writes_a_config_for_the_script(
    photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    words = [str(photo_folder), "--objective=distill", *OBJECTIVES["distill"][1], "--steps=4", "--json", "--sample=4"]
    assert examine([*words, "--step=true", f"--write_config={file}"]) == 0
    run = json.loads(capsys.readouterr().out)["run"]
    assert run["objective"] == "Distill"
    assert run["step"]["rate"] > 0
    held = sum(parameter.nbytes for parameter in read_teacher().parameters())
    assert run["memory_mib"]["teacher"] == pytest.approx(held / 2**20)
    assert file.read_text().startswith("# accelerate launch scripts/distill.py --config")


def test_without_what_all_features_share_the_targets_differ() -> None:
    torch.manual_seed(0)
    common = F.normalize(torch.randn(16), dim=0)
    features = F.normalize(common + 0.05 * torch.randn(12, 16), dim=-1)
    bank = torch.cat([features, torch.zeros(4, 16)])
    centred, targets = without_common(bank, features)
    torch.testing.assert_close(targets, centred[:12])
    torch.testing.assert_close(centred.norm(dim=-1), torch.cat([torch.ones(12), torch.zeros(4)]))
    assert entropy_share(features, features, 0.07) > 0.99
    assert entropy_share(targets, targets, 0.07) < 0.5
