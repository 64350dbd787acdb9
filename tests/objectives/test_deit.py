"""DeiT's distillation: losses of the paper's code, and teachers of any kind."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.data.augment.supervised import OtherInput, as_taken_by
from ssl_vit.data.transform import InputSpec, Normalization
from ssl_vit.models import EncoderConfig
from ssl_vit.models.weights.classifier import open_classifier
from ssl_vit.objectives.deit import check_class_names, distillation_loss
from ssl_vit.objectives.finetune import FineTune, FineTuneConfig
from tests.classifiers import cnn, write_classifier
from tests.conftest import GOLDEN, TINY
from tests.families import FAMILIES
from tests.specs import grey

FILE = GOLDEN / "deit_distillation_reference.safetensors"
ENCODER = EncoderConfig("deit_tiny_distilled_patch16_224", 32, 8, embed_dim=32, depth=2, num_heads=4)


@pytest.fixture
def golden() -> dict[str, Tensor]:
    return load_file(FILE)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return write_classifier(tmp_path / "teacher", cnn())


def det(shape: tuple[int, ...], frequency: float, phase: float) -> Tensor:
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(frequency * count + phase).float().reshape(shape)


class TestAgainstThePapersCode:
    @pytest.mark.parametrize(("alpha", "tau"), [(0.5, 1.0), (0.1, 3.0)])
    @pytest.mark.parametrize("kind", ["none", "soft", "hard"])
    @pytest.mark.parametrize("base", ["ce", "smooth", "soft_targets"])
    def test_losses(self, golden: dict[str, Tensor], base: str, kind: str, alpha: float, tau: float) -> None:
        labels, soft = golden["labels"], golden["soft_labels"]
        on_labels = {
            "ce": lambda logits: F.cross_entropy(logits, labels),
            "smooth": lambda logits: LabelSmoothingCrossEntropy(0.1)(logits, labels),
            "soft_targets": lambda logits: SoftTargetCrossEntropy()(logits, soft),
        }[base]
        logits, logits_kd = golden["logits"], golden["logits_kd"].requires_grad_()
        name = f"{base}.{kind}" + ("" if kind == "none" else f".alpha_{alpha}_tau_{tau}")
        loss = distillation_loss(logits, logits_kd, golden["teacher_logits"], on_labels, kind, alpha, tau)
        assert loss.item() == pytest.approx(golden[f"loss.{name}"].item(), rel=1e-5)
        same = distillation_loss(logits, logits_kd, golden["teacher_logits"], on_labels(logits), kind, alpha, tau)
        assert torch.equal(loss, same)
        if f"grad_logits_kd.{name}" in golden:
            loss.backward()
            torch.testing.assert_close(logits_kd.grad, golden[f"grad_logits_kd.{name}"], rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize(
        ("kind", "alpha", "tau", "expected"),
        [("hard", 0.5, 1.0, 2.787163), ("soft", 0.5, 1.0, 1.770296), ("soft", 0.9, 3.0, 0.584459)],
    )
    def test_values_of_the_sheet(self, kind: str, alpha: float, tau: float, expected: float) -> None:
        logits, logits_kd = 2 * det((4, 7), 0.59, 0.7), 2 * det((4, 7), 0.41, 1.1)
        base = F.cross_entropy(logits, torch.tensor([0, 2, 4, 6]))
        loss = distillation_loss(logits, logits_kd, 3 * det((4, 7), 0.83, 0.3), base, kind, alpha, tau)
        assert loss.item() == pytest.approx(expected, abs=5e-7)

    @pytest.mark.parametrize("kind", ["soft", "hard"])
    def test_losses_and_gradients_through_the_model(self, golden: dict[str, Tensor], kind: str, teacher: Path) -> None:
        settings = {"distillation": kind, "distillation_alpha": 0.1, "distillation_tau": 3.0, "num_classes": 10}
        objective = self.objective(golden, **settings, teacher=str(write_classifier(teacher, cnn(10))))
        objective.frozen = (lambda images: golden["teacher_logits"],)
        batch = {"images": golden["images"], "targets": torch.eye(10)[golden["labels"]]}
        loss = objective(batch, 0.5)["loss"]
        assert loss.item() == pytest.approx(golden[f"model_loss.{kind}"].item(), rel=1e-5)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in objective.parameters() if p.grad is not None])
        assert norm.item() == pytest.approx(golden[f"model_grad_norm.{kind}"].item(), rel=1e-5)

    def test_evaluation_averages_the_logits(self, golden: dict[str, Tensor]) -> None:
        objective = self.objective(golden, num_classes=10).eval()
        logits = objective.logits(golden["images"])["head"]
        torch.testing.assert_close(logits, golden["eval_logits"], rtol=1e-5, atol=1e-5)
        of_labels, of_teacher = objective.classifier.each(objective.encoder.head_inputs(golden["images"]))
        torch.testing.assert_close(of_labels, golden["head_logits"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(of_teacher, golden["head_dist_logits"], rtol=1e-5, atol=1e-5)

    @staticmethod
    def objective(golden: dict[str, Tensor], **settings) -> FineTune:
        objective = FineTuneConfig(pool="cls", **settings).build(ENCODER.build())
        weights = {k.removeprefix("model."): value for k, value in golden.items() if k.startswith("model.")}
        heads = {name: weights.pop(name) for name in list(weights) if name.startswith("head")}
        objective.encoder.model.load_state_dict(weights)
        objective.classifier.load_state_dict(heads)
        return objective


@pytest.mark.parametrize("family", ["vit", *FAMILIES])
def test_every_backbone_learns_from_a_teacher_through_a_head_of_its_own(family: str, tmp_path: Path) -> None:
    encoder = {"vit": EncoderConfig(image_size=32, **TINY), **FAMILIES}[family].build()
    teacher = write_classifier(tmp_path, cnn(in_chans=encoder.in_chans))
    config = FineTuneConfig(num_classes=3, teacher=str(teacher), head_init=0.5, rand_augment=None)
    objective = config.build(encoder).train()
    images, targets = torch.randn(2, encoder.in_chans, *encoder.image_size), torch.eye(3)[:2]
    losses = objective({"images": images, "targets": targets}, 0.5)
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.classifier.parameters())
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
    # Each head has its own loss alone.
    of_labels, of_teacher = objective.eval().classifier.each(objective._pool(encoder, images))
    answers = cnn(in_chans=encoder.in_chans)(images).argmax(dim=1)
    base = -(targets * of_labels.log_softmax(dim=1)).sum(dim=1).mean()
    expected = 0.5 * base + 0.5 * F.cross_entropy(of_teacher, answers)
    torch.testing.assert_close(objective({"images": images, "targets": targets}, 0.5)["loss"], expected)
    torch.testing.assert_close(objective.logits(images)["head"], (of_labels + of_teacher) / 2)


def test_the_teacher_stays_as_it_is_and_outside(teacher: Path) -> None:
    objective = FineTuneConfig(num_classes=3, teacher=str(teacher)).build(EncoderConfig(image_size=32, **TINY).build())
    before = objective.frozen[0].sha256
    names = [name for name, _ in objective.named_parameters()] + list(objective.state_dict())
    assert not [name for name in names if "teacher" in name or "frozen" in name]
    model = objective.train().frozen[0].on(torch.device("cpu"))
    assert not model.training
    objective({"images": torch.randn(4, 3, 32, 32), "targets": torch.eye(3)[[0, 1, 2, 0]]}, 0.5)["loss"].backward()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    again = FineTuneConfig(num_classes=3, teacher=str(teacher)).build(EncoderConfig(image_size=32, **TINY).build())
    assert again.frozen[0].sha256 == before  # its running averages did not move


def test_without_a_teacher_nothing_changes(teacher: Path) -> None:
    """Also where `distillation` leaves it out: the same weights, heads and loss."""
    batch = {"images": torch.randn(4, 3, 32, 32), "targets": torch.eye(3)[[0, 1, 2, 0]]}
    found = []
    for settings in ({}, {"teacher": str(teacher), "distillation": "none"}):
        torch.manual_seed(0)
        objective = FineTuneConfig(num_classes=3, head_init=0.5, **settings).build(ENCODER.build())
        assert objective.frozen == ()
        found.append(objective(batch, 0.5))
    assert found[0].keys() == found[1].keys() == {"loss"}
    assert torch.equal(found[0]["loss"], found[1]["loss"])


def test_what_the_teacher_draws_does_not_change_the_student(teacher: Path) -> None:
    weights = []
    for settings in ({}, {"teacher": str(teacher)}):
        torch.manual_seed(0)
        objective = FineTuneConfig(num_classes=3, **settings).build(ENCODER.build())
        weights.append((objective.state_dict(), torch.rand(1)))
    (one, after_one), (two, after_two) = weights
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(after_one, after_two)


class TestTheTeachersImages:
    def test_are_the_mixed_images_with_its_own_normalisation_and_size(self, tmp_path: Path) -> None:
        folder = write_classifier(tmp_path, cnn(), input_size=[3, 48, 40], mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
        config = FineTuneConfig(num_classes=3, teacher=str(folder), rand_augment=None)
        spec = InputSpec((32, 32), (16, 16), grey(mean=0.7, std=0.2))
        transform = config.build_transform(spec)
        pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        samples = [
            transform(image, np.random.default_rng(seed)) | {"label": torch.tensor(1)}
            for seed, image in enumerate(pixels)
        ]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        found = transform.on_device(batch, torch.device("cpu"))
        raw = found["images"] * 0.2 + 0.7
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
        expected = F.interpolate((raw - mean) / std, (48, 40), mode="bicubic", antialias=True)
        torch.testing.assert_close(found["teacher_images"], expected)
        alone = FineTuneConfig(num_classes=3, rand_augment=None).build_transform(spec)
        assert torch.equal(alone.on_device(batch, torch.device("cpu"))["images"], found["images"])
        encoder = EncoderConfig(image_size=32, **TINY).build()
        objective = config.build(encoder).eval()
        agreement = objective.classifier.each([encoder(found["images"]).patches.mean(dim=1)])[1].argmax(dim=1) == cnn()(
            expected
        ).argmax(dim=1)
        torch.testing.assert_close(objective(found, 0.5)["teacher_agreement"], agreement.float().mean())

    def test_are_those_of_the_student_where_it_takes_the_same(self, teacher: Path) -> None:
        config = FineTuneConfig(num_classes=3, teacher=str(teacher))
        transform = config.build_transform(InputSpec((32, 32), (16, 16), grey(mean=0.5, std=0.5)))
        assert transform.teacher is None
        images = torch.randn(2, 3, 32, 32)
        same = as_taken_by(OtherInput((32, 32), Normalization((0.5,) * 3, (0.5,) * 3)), images, grey(mean=0.5, std=0.5))
        torch.testing.assert_close(same, images)


class TestNamedClassifiers:
    def test_a_folder_gives_the_logits_of_the_model_that_was_written(self, teacher: Path) -> None:
        images = torch.randn(2, 3, 32, 32)
        for name in (teacher, teacher / "model.safetensors"):
            torch.testing.assert_close(open_classifier(str(name)).read().eval()(images), cnn()(images))
        timms = timm.create_model(f"local-dir:{teacher}", pretrained=True).eval()
        torch.testing.assert_close(timms(images), cnn()(images))

    def test_a_name_of_timm_is_known_before_its_weights_are_fetched(self) -> None:
        found = open_classifier("regnety_160.deit_in1k")
        assert (found.num_classes, found.in_chans, found.image_size) == (1000, 3, (224, 224))
        assert found.normalization == Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def test_a_file_of_settings_names_no_other_weights(self, teacher: Path) -> None:
        file = teacher / "config.json"
        described = json.loads(file.read_text())
        described["model_args"] |= {"pretrained": True, "checkpoint_path": "/etc/passwd", "num_classes": 7}
        file.write_text(json.dumps(described))
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(open_classifier(str(teacher)).read().eval()(images), cnn()(images))

    def test_classes_of_the_same_names_in_another_order_are_refused(self, tmp_path: Path) -> None:
        folder = str(write_classifier(tmp_path, cnn(), label_names=["cat", "dog", "owl"]))
        check_class_names(folder, ("cat", "dog", "owl"))
        check_class_names(folder, ("0", "1", "2"))
        check_class_names(folder, ())
        with pytest.raises(
            ValueError, match=r"teacher=.*: its class 1 is 'dog', and that of the data is 'owl'; name a"
        ):
            check_class_names(folder, ("cat", "owl", "dog"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("nowhere", "no such file or folder, and no timm model has this name"),
            ("resnet18.a1_in1", "timm has no weights of this name; it has resnet18.a1_in1k"),
            ("vit_small_patch16_dinov3.lvd1689m", "is a backbone without a classifier"),
            ("resnet18.a1_in1k", "knows 1000 classes, and the run has 3 .num_classes.; name a teacher that was"),
        ],
    )
    def test_names(self, name: str, said: str) -> None:
        self.refused(name, said)

    def test_weights_that_cannot_be_fetched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        create = timm.create_model

        def unreachable(*names: object, pretrained: bool = False, **settings: object) -> nn.Module:
            if pretrained:
                raise OSError("no route\nto host")
            return create(*names, **settings)

        monkeypatch.setattr(timm, "create_model", unreachable)
        self.refused("resnet18.a1_in1k", "timm cannot fetch its weights; name a folder .*: no route to host", 1000)

    def test_folders(self, teacher: Path, tmp_path: Path) -> None:
        self.refused(write_classifier(tmp_path / "five", cnn(5)), "knows 5 classes, and the run has 3")
        self.refused(write_classifier(tmp_path / "one", cnn(in_chans=1)), "takes 1 channels, and encoder.in_chans is 3")
        (tmp_path / "run").mkdir()
        self.refused(tmp_path / "run", "config.json is missing; a classifier is both files, in timm's layout")
        (tmp_path / "run" / "config.yaml").write_text("")
        self.refused(tmp_path / "run", "holds no classifier yet; `ssl-vit export .*` writes that of a fine")
        (tmp_path / "weights.pth").write_bytes(b"")
        self.refused(tmp_path / "weights.pth", "is no .safetensors file, and others are not unpickled")
        tensors = load_file(teacher / "model.safetensors")
        save_file({**tensors, "fc.bias": torch.full((3,), torch.nan)}, teacher / "model.safetensors")
        self.refused(teacher, "fc.bias holds NaN")
        del tensors["fc.bias"]
        save_file(tensors, teacher / "model.safetensors")
        self.refused(teacher, "does not fit ResNet: 1 missing: fc.bias")
        described = json.loads((teacher / "config.json").read_text())
        (teacher / "config.json").write_text(json.dumps({**described, "architecture": "resnet1"}))
        self.refused(teacher, "architecture='resnet1': timm .* has no model of that name")
        (teacher / "config.json").write_text(json.dumps({**described, "num_classes": 0}))
        self.refused(teacher, "is a backbone without a classifier; fine-tune it first")

    @staticmethod
    def refused(name: object, said: str, num_classes: int = 3) -> None:
        config = FineTuneConfig(num_classes=num_classes, teacher=str(name))
        with pytest.raises(ValueError, match=f"^teacher='{name}': .*{said}") as raised:
            config.build(EncoderConfig(image_size=32, **TINY).build())
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(("setting", "value"), [("distillation_alpha", 1.5), ("distillation_tau", 0.0)])
    def test_settings_out_of_range(self, setting: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"^{setting}="):
            FineTuneConfig(**{setting: value})
