"""Weights of every family to start from, in timm's, transformers' and the papers' layouts."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from timm.models import save_for_hf
from torch import Tensor

from scripts import pretrain_dino
from ssl_vit.export import export_backbone, load_backbone
from ssl_vit.export.graph import timm_features
from ssl_vit.export.targets import export_to, proof_images
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.weights.pretrained import load_pretrained, open_pretrained
from ssl_vit.objectives.dino import DINOConfig
from ssl_vit.training.config import parse_run
from tests.export.test_targets import build
from tests.families import CONVOLUTIONS, FAMILIES, SMALL, STAGES
from tests.specs import GREY

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own

SWIN = FAMILIES["swin"]
every_family = pytest.mark.parametrize("name", list(FAMILIES))


def perturbed(config: EncoderConfig) -> Encoder:
    return build(config, "DINO").encoder


def assert_same_features(found: Encoder, expected: Encoder) -> None:
    images = torch.randn(2, expected.in_chans, *expected.image_size)
    with torch.inference_mode():
        for mine, other in zip(found.eval()(images), expected(images), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def assert_same_weights(found: Encoder, expected: Encoder) -> None:
    tensors = found.model.state_dict()
    assert tensors.keys() == expected.model.state_dict().keys()
    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(tensors[name], value, rtol=0, atol=1e-6, msg=name)


@every_family
@pytest.mark.parametrize("target", ["timm", "transformers", "our own"])
def test_what_was_exported_is_read_back(tmp_path: Path, target: str, name: str) -> None:
    config = FAMILIES[name]
    trained = build(config, "DINO")
    if target == "our own":
        normalization = trained.normalization
        export_backbone(trained.encoder, tmp_path / target, normalization=normalization, provenance={})
        assert_same_features(load_backbone(tmp_path / target), trained.encoder)
    else:
        export_to(trained, target, tmp_path, proof_images(trained))
    found = open_pretrained(str(tmp_path / target))
    assert found.config is not None
    assert found.normalization == trained.normalization
    if target != "transformers":
        assert found.config == config
    for settings in (config, found.config):
        encoder = settings.build()
        load_pretrained(encoder, str(tmp_path / target))
        assert encoder.is_pretrained
        assert_same_features(encoder, trained.encoder)


@every_family
def test_a_folder_of_timms_own_is_read(tmp_path: Path, name: str) -> None:
    config = FAMILIES[name]
    arguments = {"num_classes": 7, **config.timm_overrides}
    if not name.startswith("convnext"):
        arguments["img_size"] = config.image_size
    model: Any = timm.create_model(config.arch, in_chans=config.in_chans, **arguments).eval()
    described = {"input_size": (config.in_chans, 64, 64), "mean": GREY.mean[:1] * config.in_chans}
    model.pretrained_cfg |= described | {"std": GREY.std[:1] * config.in_chans}
    save_for_hf(model, str(tmp_path), model_args=arguments, safe_serialization=True)
    settings = open_pretrained(str(tmp_path)).config
    assert settings is not None
    sides = {"image_size": 64} if name.startswith("convnext") else {}  # which any size fits
    assert replace(settings, drop_path_rate=config.drop_path_rate, in_chans=config.in_chans) == replace(config, **sides)
    encoder = settings.build()
    load_pretrained(encoder, str(tmp_path))
    if name == "eva02":  # its classifier pools, then normalises
        assert torch.equal(encoder.model.get_parameter("norm.weight"), model.fc_norm.weight)
        return
    images = torch.randn(1, encoder.in_chans, *encoder.image_size)
    with torch.inference_mode():
        for mine, other in zip(
            encoder.eval()(images), timm_features(model, model.forward_features(images)), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def official_swin() -> tuple[Encoder, dict[str, Tensor]]:
    """As `swin_*_patch4_window*.pth`, where a stage ends with downsampling, with buffers and a classifier."""
    encoder = perturbed(SWIN)
    tensors = {
        re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", key): value
        for key, value in encoder.model.state_dict().items()
    }
    tensors["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    tensors["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    return encoder, {**tensors, "head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)}


def official_swinv2() -> tuple[Encoder, dict[str, Tensor]]:
    encoder = perturbed(EncoderConfig("swinv2_tiny_window8_256", 64, model_args=STAGES))
    tensors = {
        re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", key): value
        for key, value in encoder.model.state_dict().items()
    }
    return encoder, {**tensors, "layers.0.blocks.0.attn.relative_coords_table": torch.zeros(1, 7, 7, 2)}


def official_convnext(name: str) -> tuple[Encoder, dict[str, Tensor]]:
    encoder = perturbed(
        EncoderConfig("convnext_tiny" if name == "ConvNeXt" else "convnextv2_atto", 64, model_args=CONVOLUTIONS)
    )
    tensors = {}
    for key, value in encoder.model.state_dict().items():
        own = re.sub(r"^stem\.", "downsample_layers.0.", key)
        own = re.sub(r"stages\.(\d)\.downsample\.", r"downsample_layers.\1.", own)
        own = re.sub(r"stages\.(\d)\.blocks\.", r"stages.\1.", own).replace("conv_dw", "dwconv")
        own = own.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta")
        own = own.replace("mlp.fc", "pwconv").replace("head.norm.", "norm.")
        if "grn" in own:
            value = value.reshape(1, 1, 1, -1)
        tensors[own] = value.flatten(1) if "pwconv" in own and value.ndim == 4 else value
    return encoder, {**tensors, "head.weight": torch.zeros(7, 40), "head.bias": torch.zeros(7)}


def official_dinov3(arch: str) -> tuple[Encoder, dict[str, Tensor]]:
    """As `dinov3_vit*_pretrain_*.pth`, with masked biases of keys."""
    encoder = perturbed(EncoderConfig(arch, 64, **SMALL))
    tensors = {}
    biases = {}
    for key, value in encoder.model.state_dict().items():
        if key.endswith(("q_bias", "v_bias")):
            biases[key] = value
            continue
        own = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma").replace("reg_token", "storage_tokens")
        tensors[own] = value
    for block in range(2):
        part, zeros = f"blocks.{block}.attn", torch.zeros(48)
        parts = biases.get(f"{part}.q_bias", zeros), torch.ones(48), biases.get(f"{part}.v_bias", zeros)
        tensors |= {f"{part}.qkv.bias": torch.cat(parts), f"{part}.qkv.bias_mask": torch.full((144,), float("nan"))}
    return encoder, {**tensors, "mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.ones(3)}


def official_eva02() -> tuple[Encoder, dict[str, Tensor]]:
    """As `eva02_*_pt_*.pt`: a gated MLP of layers w1, w2 and w3, RoPE's tables, and a head of masked modelling."""
    encoder = perturbed(FAMILIES["eva02"])
    swaps = {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3", "mlp.norm": "mlp.ffn_ln"}
    tensors = {}
    for key, value in encoder.model.state_dict().items():
        for ours, theirs in swaps.items():
            key = key.replace(ours, theirs)
        tensors[key.replace("q_proj.bias", "q_bias").replace("v_proj.bias", "v_bias")] = value
    own = {
        "mask_token": torch.zeros(1, 1, 48),
        "rope.freqs_cos": torch.zeros(16, 12),
        "lm_head.weight": torch.zeros(8, 48),
    }
    return encoder, {**tensors, **own}


@pytest.mark.parametrize(
    ("encoder", "tensors"),
    [
        pytest.param(*official, id=name)
        for name, official in {
            "Swin": official_swin(),
            "Swin V2": official_swinv2(),
            "ConvNeXt": official_convnext("ConvNeXt"),
            "ConvNeXt V2": official_convnext("ConvNeXt V2"),
            "DINOv3": official_dinov3("vit_small_patch16_dinov3"),
            "DINOv3 with biases": official_dinov3("vit_small_patch16_dinov3_qkvb"),
            "EVA-02": official_eva02(),
            "hybrid": (perturbed(FAMILIES["hybrid"]), None),
            "distilled": (perturbed(FAMILIES["distilled"]), None),
        }.items()
    ],
)
def test_the_papers_files_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoder: Encoder, tensors: dict[str, Tensor] | None
) -> None:
    path = tmp_path / "official.pth"
    torch.save({"model": encoder.model.state_dict() if tensors is None else tensors}, path)
    found = encoder.config.build()
    load_pretrained(found, str(path))
    assert_same_weights(found, encoder)
    assert capsys.readouterr().out == ""  # timm's renaming says nothing of its own


def test_biases_that_an_architecture_lacks_are_named(tmp_path: Path) -> None:
    save_file(official_dinov3("vit_small_patch16_dinov3_qkvb")[1], tmp_path / "biased.safetensors")
    encoder = FAMILIES["dinov3"].build()
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.bias is not 0.*--encoder.arch vit_..._dinov3_qkvb"):
        load_pretrained(encoder, str(tmp_path / "biased.safetensors"))


@pytest.mark.parametrize("name", ["swin", "hybrid", "dinov3", "eva02", "convnext", "distilled"])
@pytest.mark.parametrize("in_chans", [1, 4])
def test_the_first_convolution_takes_other_channels_as_in_timm(tmp_path: Path, name: str, in_chans: int) -> None:
    trained = build(FAMILIES[name], "DINO")
    folder = export_to(trained, "timm", tmp_path, proof_images(trained)).folder
    encoder = replace(FAMILIES[name], in_chans=in_chans).build()
    load_pretrained(encoder, str(folder))
    arguments = json.loads((folder / "config.json").read_text())["model_args"] | {"in_chans": in_chans}
    expected: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(encoder.model.state_dict()[key], value, msg=key)


@pytest.mark.parametrize("image_size", [32, (64, 32), 96])
def test_swins_tables_are_resized_to_other_windows_as_in_timm(tmp_path: Path, image_size: Any) -> None:
    config = replace(SWIN, model_args={**STAGES, "window_size": 8})
    trained = build(config, "DINO")
    folder = export_to(trained, "timm", tmp_path, proof_images(trained)).folder
    encoder = replace(config, image_size=image_size).build()
    load_pretrained(encoder, str(folder))
    size = encoder.model_args["img_size"]
    arguments = json.loads((folder / "config.json").read_text())["model_args"] | {"img_size": size}
    expected: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments)
    changed = 0
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(encoder.model.state_dict()[key], value, msg=key)
        changed += value.shape != trained.encoder.model.state_dict()[key].shape
    assert changed == {32: 3, (64, 32): 3, 96: 2}[image_size]


def test_tables_of_windows_that_are_not_square_are_resized_from_their_own(tmp_path: Path) -> None:
    """Windows of 1 x 5 have tables as long as those of 2 x 2; timm cannot tell them apart."""
    wide = replace(SWIN, image_size=(16, 80), model_args={**STAGES, "window_size": [4, 5]})
    trained, folder = perturbed(wide), tmp_path / "wide"
    export_backbone(trained, folder, normalization=GREY, provenance={})
    last = "layers.2.blocks.0.attn.relative_position_bias_table"
    given = load_file(folder / "backbone.safetensors")[last]
    assert given.shape == (9, 4)
    same = wide.build()
    load_pretrained(same, str(folder))
    assert torch.equal(same.model.state_dict()[last], given)
    wider = replace(wide, image_size=(32, 80)).build()
    load_pretrained(wider, str(folder))
    sizes = {"new_window_size": (2, 5), "new_bias_shape": (27, 4)}
    found, expected = wider.model.state_dict()[last], resize_rel_pos_bias_table(given, **sizes, old_window_size=(1, 5))
    torch.testing.assert_close(found, expected)
    assert (found - resize_rel_pos_bias_table(given, **sizes)).abs().max() > 0.01


def test_position_tables_of_hybrids_and_eva_are_resized(tmp_path: Path) -> None:
    for name, size in (("hybrid", 96), ("eva02", 84), ("distilled", 96)):
        trained = build(FAMILIES[name], "DINO")
        export_to(trained, "timm", tmp_path / name, proof_images(trained))
        encoder = replace(FAMILIES[name], image_size=size).build()
        load_pretrained(encoder, str(tmp_path / name / "timm"))
        arguments = {**encoder.model_args, "global_pool": "token"}
        expected: Any = timm.create_model(f"local-dir:{tmp_path / name / 'timm'}", pretrained=True, **arguments)
        torch.testing.assert_close(encoder.model.get_parameter("pos_embed"), expected.pos_embed)


def test_weights_that_do_not_tell_their_architecture_say_how_to_name_it(tmp_path: Path) -> None:
    for number, name in enumerate(FAMILIES):
        path = tmp_path / f"{number}.safetensors"
        save_file(FAMILIES[name].build().model.state_dict(), path)
        assert open_pretrained(str(path)).config is None
        with pytest.raises(ValueError, match=r"safetensors: does not fit .* name theirs with --encoder.arch") as error:
            load_pretrained(EncoderConfig("vit_tiny_patch16_224", 64, depth=1).build(), str(path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"architecture": "resnet50"}, r"config.json: arch='resnet50': has BatchNorm"),
        (
            {"architecture": "swin_tiny_patch4_window7_224", "input_size": [3, 224]},
            "must be channels, height and width",
        ),
        (
            {"architecture": "swin_tiny_patch4_window7_224", "model_args": {"depths": [9000]}},
            r"config.json: model_args=.*depths.*is larger than that of any backbone",
        ),
        ({"model_type": "timm_wrapper", "architecture": "no_such"}, "timm .* has no model of that name"),
        ({"model_type": "swin", "depths": "two"}, r"config.json: depths='two': expected"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    save_file(FAMILIES["swin"].build().model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"input_size": [3, 224, 224], **content}))
    with pytest.raises(ValueError, match=message) as error:
        open_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arch", ["eva02_tiny_patch14_224", "vit_tiny_r_s16_p8_224", "deit_tiny_distilled_patch16_224"])
def test_no_plain_vit_is_inferred_from_what_is_as_wide(tmp_path: Path, arch: str) -> None:
    encoder = EncoderConfig(arch, 224, depth=1).build()
    save_file(encoder.model.state_dict(), tmp_path / "bare.safetensors")
    assert open_pretrained(str(tmp_path / "bare.safetensors")).config is None


@pytest.mark.parametrize(("name", "target"), [("swin", "timm"), ("dinov3", "transformers"), ("hybrid", "transformers")])
def test_a_run_takes_its_settings_from_the_weights(tmp_path: Path, name: str, target: str) -> None:
    trained = build(FAMILIES[name], "DINO")
    folder = export_to(trained, target, tmp_path, proof_images(trained)).folder
    config = parse_run(pretrain_dino.DEFAULTS, [f"--encoder.pretrained={folder}", "--data.source=x"])
    assert config.data.normalization == trained.normalization
    head = DINOConfig(num_prototypes=8, hidden_dim=8, bottleneck_dim=4)
    objective = replace(config, objective=head).build_objective()
    assert objective.encoder.is_pretrained
    assert objective.encoder.image_size == trained.encoder.image_size
    assert_same_features(objective.backbone(), trained.encoder)


def test_one_line_names_the_weights_and_what_does_not_fit(tmp_path: Path) -> None:
    trained = build(FAMILIES["convnext"], "DINO")
    folder = export_to(trained, "timm", tmp_path, proof_images(trained)).folder
    flags = [f"--encoder.pretrained={folder}", "--data.source=x", "--encoder.arch=convnextv2_tiny"]
    config = parse_run(pretrain_dino.DEFAULTS, flags)
    with pytest.raises(
        ValueError, match=rf"^encoder.pretrained='{folder}': {folder}: does not fit ConvNeXt: \d+ missing"
    ):
        config.build_objective()
