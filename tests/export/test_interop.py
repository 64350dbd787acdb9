import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed import resample_abs_pos_embed

from ssl_vit.export.interop import load_reference
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.vit import ViT
from ssl_vit.objectives.dino import DINO, DINOConfig
from ssl_vit.objectives.dinov2 import DINOv2, DINOv2Config
from ssl_vit.objectives.mae import MAE, MAEConfig
from tests.conftest import GOLDEN, TINY

OFFICIAL = {
    name.removeprefix("model."): value
    for name, value in load_file(GOLDEN / "mae_reference.safetensors").items()
    if name.startswith("model.")
}


@pytest.fixture
def objective(tiny_encoder: ViT) -> MAE:
    return MAEConfig(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2).build(tiny_encoder)


def test_the_official_pickle_layout_is_read(objective: MAE, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-799.pth"
    torch.save({"model": OFFICIAL, "epoch": 799, "args": argparse.Namespace(lr=1e-3)}, path)
    load_reference(objective, path)
    assert torch.equal(objective.encoder.vit.norm.weight, OFFICIAL["norm.weight"])
    assert torch.equal(objective.decoder_blocks[0].mlp.fc2.weight, OFFICIAL["decoder_blocks.0.mlp.fc2.weight"])


def test_an_encoder_without_its_decoder_is_refused(objective: MAE, tmp_path: Path) -> None:
    path = tmp_path / "encoder_only.safetensors"
    save_file({name: value for name, value in OFFICIAL.items() if "decoder" not in name}, path)
    before = objective.encoder.vit.norm.weight.clone()
    with pytest.raises(ValueError, match=r"encoder_only.safetensors: does not fit MAE: 19 missing: decoder_blocks.0"):
        load_reference(objective, path)
    assert torch.equal(objective.encoder.vit.norm.weight, before)


def test_another_width_is_refused(tiny_encoder: ViT) -> None:
    wider = MAEConfig(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2).build(tiny_encoder)
    with pytest.raises(ValueError, match="of another shape"):
        load_reference(wider, GOLDEN / "mae_reference.safetensors")


class _Harmful:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("harm"),))


def test_a_pickle_with_code_in_it_is_refused(objective: MAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": OFFICIAL, "args": _Harmful()}, "harmful.pth")
    with pytest.raises(ValueError, match=r"harmful.pth: holds more than tensors"):
        load_reference(objective, "harmful.pth")
    assert not Path("harm").exists()


DINO_FILE = GOLDEN / "dino_reference.safetensors"
SMALL_HEAD = {"num_prototypes": 64, "hidden_dim": 48, "bottleneck_dim": 16, "local_crop_size": 16}


def official_dino() -> dict[str, dict[str, torch.Tensor]]:
    """The golden weights in the layout of DINO's own checkpoints."""
    tensors = load_file(DINO_FILE)
    layout: dict[str, dict[str, torch.Tensor]] = {"student": {}, "teacher": {}}
    for name, value in tensors.items():
        role, _, rest = name.partition(".")
        if role in layout:
            layout[role][f"module.{rest}" if role == "student" else rest] = value
    return {**layout, "dino_loss": {"center": tensors["center"]}}


def build_dino(**settings) -> DINO:
    encoder = EncoderConfig(image_size=settings.pop("image_size", 32), **TINY).build()
    return DINOConfig(**SMALL_HEAD).build(encoder)


def test_dinos_pickle_layout_gives_student_teacher_and_centre(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    content = official_dino()
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save({**content, "epoch": 100, "optimizer": optimizer, "args": argparse.Namespace(arch="vit_small")}, path)
    objective, reference = build_dino(), build_dino()
    load_reference(objective, path)
    load_reference(reference, DINO_FILE)
    for name, value in reference.state_dict().items():
        assert torch.equal(objective.state_dict()[name], value), name
    assert torch.equal(objective.center, content["dino_loss"]["center"])
    assert torch.equal(objective.head.last_layer.weight_v, content["student"]["module.head.last_layer.weight_v"])
    assert torch.equal(objective.teacher_encoder.vit.norm.weight, content["teacher"]["backbone.norm.weight"])


def test_a_dino_teacher_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pth"
    torch.save({"teacher": official_dino()["teacher"]}, path)
    with pytest.raises(ValueError, match=r"does not fit DINO: \d+ missing: center, encoder.vit"):
        load_reference(build_dino(), path)


def test_positions_are_resized_to_the_encoders_grid() -> None:
    objective = build_dino(image_size=48)
    load_reference(objective, DINO_FILE)
    official = load_file(DINO_FILE)["teacher.backbone.pos_embed"]
    assert objective.teacher_encoder.vit.pos_embed.shape == (1, 37, 32)
    # As DINO's code resizes them, but for its offset of a tenth of a patch.
    expected = resample_abs_pos_embed(official, [6, 6], [4, 4], num_prefix_tokens=1, antialias=False)
    assert torch.equal(objective.teacher_encoder.vit.pos_embed, expected)


def official_dinov2(objective: DINOv2, *, registers: bool) -> dict[str, torch.Tensor]:
    """An objective's weights under the names of DINOv2's code: chunks of blocks, its SwiGLU, its register tokens."""
    renamed = {}
    for name, value in objective.state_dict().items():
        role = "teacher" if name.startswith("teacher_") else "student"
        rest = name.removeprefix("teacher_")
        for own, official in (("encoder.vit.", "backbone."), ("patch_head.", "ibot_head."), ("head.", "dino_head.")):
            if rest.startswith(own):
                rest = official + rest.removeprefix(own)
                break
        else:
            continue
        rest = rest.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.0.1.")
        rest = rest.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3").replace("reg_token", "register_tokens")
        renamed[f"{role}.{rest}"] = value.clone()
    for role in ("student", "teacher"):
        renamed[f"{role}.backbone.mask_token"] = torch.full((1, objective.encoder.embed_dim), 0.5)
        if registers:
            positions = renamed[f"{role}.backbone.pos_embed"]
            first = torch.full_like(positions[:, :1], 0.25)
            renamed[f"{role}.backbone.pos_embed"] = torch.cat([first, positions], dim=1)
            renamed[f"{role}.backbone.cls_token"] -= first
    return renamed


@pytest.mark.parametrize("arch", ["vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"])
def test_dinov2s_layout_is_read(tmp_path: Path, arch: str) -> None:
    def build() -> DINOv2:
        encoder = EncoderConfig(arch=arch, image_size=42, depth=2, embed_dim=96, num_heads=4).build()
        return DINOv2Config(**{**SMALL_HEAD, "local_crop_size": 14}, ibot_separate_head=True).build(encoder)

    original, objective = build(), build()
    names = official_dinov2(original, registers="reg4" in arch)
    path = tmp_path / "model.pth"
    torch.save({"model": {**names, "dino_loss.center": torch.ones(1, 64)}, "iteration": 3}, path)
    load_reference(objective, path)
    for name, value in original.state_dict().items():
        if name not in ("mask_token", "center"):
            torch.testing.assert_close(objective.state_dict()[name], value, rtol=1e-6, atol=1e-6)
    assert torch.equal(objective.mask_token, torch.full((1, 96), 0.5))
    assert torch.equal(objective.center, torch.ones(1, 64))

    teacher = {name.removeprefix("teacher."): value for name, value in names.items() if name.startswith("teacher.")}
    torch.save({"teacher": teacher}, path)
    load_reference(objective, path)
    assert torch.equal(objective.encoder.vit.norm.weight, original.teacher_encoder.vit.norm.weight)

    torch.save({"teacher": {name: value for name, value in teacher.items() if "head" not in name}}, path)
    with pytest.raises(ValueError, match=r"does not fit DINOv2: \d+ missing: head.last_layer"):
        load_reference(objective, path)
