"""Encoders and objectives that cannot work together are refused in one line, before any image is read."""

import re
from pathlib import Path

import pytest
import yaml

from ssl_vit.training.config import parse_run, write_config
from ssl_vit.training.loop import main
from tests.conftest import OBJECTIVES
from tests.doctor.conftest import look_at
from tests.families import FAMILIES, flags_of

SWIN = "--encoder.arch=swin_tiny_patch4_window7_224"
CONVNEXT = "--encoder.arch=convnext_atto"
REFUSED = [
    ("mae", [CONVNEXT], "encoder.arch='convnext_atto': MAE drops tokens before .*; use a Vision Transformer"),
    (
        "mae",
        ["--encoder.arch=vit_tiny_r_s16_p8_224"],
        "encoder.arch='vit_tiny_r_s16_p8_224': MAE drops tokens before .* cannot; use",
    ),
    ("dinov2", ["--encoder.arch=vit_tiny_r_s16_p8_224"], "objective.ibot_weight=1.0: .* vit_tiny_r.* cannot, .*; use"),
    ("dinov2", ["--encoder.arch=convnext_atto_ols"], "objective.ibot_weight=1.0: .* convnext_atto_ols cannot, .*; use"),
    ("dino", ["--encoder.arch=resnet50"], "encoder.arch='resnet50': has BatchNorm, .*; use convnext_tiny$"),
    ("dino", ["--encoder.arch=hiera_tiny_224"], "encoder.arch='hiera_tiny_224': .* not supported; use swin_tiny"),
    ("dino", [CONVNEXT, "--encoder.image_size=100"], r"encoder.image_size=\(100, 100\): .* 32, .*: 96 and 128$"),
    ("dino", [CONVNEXT, "--objective.local_crop_size=48"], "objective.local_crop_size=48: .* 32, .*: 32 and 64$"),
    ("dino", [CONVNEXT, "--objective.local_crop_size=256"], "objective.local_crop_size=256: larger than .*96, 96"),
    ("dino", [CONVNEXT, "--encoder.pos_embed=sincos"], "encoder.pos_embed='sincos': convnext_atto .*; leave it out"),
    ("dino", [CONVNEXT, "--encoder.patch_size=4"], "encoder.patch_size=4: .* leave it out; .* model_args, such as"),
    ("dino", [CONVNEXT, "--encoder.drop_path_schedule=uniform"], "encoder.drop_path_schedule='uniform': .* 'linear'$"),
    ("mae", ["--encoder.arch=vit_small_patch16_dinov3", "--encoder.pos_embed=sincos"], ".*; use pos_embed='learned'$"),
    ("dino", [CONVNEXT, "--encoder.model_args={dim: 3}"], "encoder.arch='convnext_atto', dim=3: .*argument 'dim'"),
    (
        "dino",
        [CONVNEXT, "--encoder.model_args={dim:3}"],
        "encoder.model_args={dim:3}: expected a mapping, with a space",
    ),
    (
        "dino",
        [CONVNEXT, "--encoder.model_args.checkpoint_path=x"],
        "encoder.model_args=.* is set by encoder.pretrained",
    ),
    ("dino", [CONVNEXT, "--encoder.model_args.a.b=1"], "--encoder.model_args.a.b: no such flag; did you mean"),
    ("dino", [CONVNEXT, "--encoder.model_args={a: {b: 1}}"], "encoder.model_args=.*: must be a number, a word, "),
    ("dino", [SWIN, "--encoder.model_args.strict_img_size=true"], "encoder.model_args=.* the same in all encoders"),
    ("dino", [SWIN, "--encoder.model_args.num_heads=[0,1,1,1]"], "encoder.arch='swin_.*, num_heads=.*: timm cannot"),
    (
        "dino",
        [SWIN, "--encoder.model_arg.window_size=4"],
        "--encoder.model_arg.window_size: no such flag; did you mean",
    ),
]


@pytest.mark.parametrize(("objective", "flags", "said"), REFUSED, ids=[" ".join([o, *f]) for o, f, _ in REFUSED])
def test_what_does_not_fit_is_refused_in_one_line_before_images_are_read(
    objective: str,
    flags: list[str],
    said: str,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ssl_vit.training.setup.open_images", lambda config: pytest.fail("images were opened"))
    words = [f"--data.source={photo_folder}", f"--output_dir={tmp_path / 'run'}", "--steps=2", *flags]
    if "drop_path_schedule" in flags[-1]:
        words.append("--encoder.drop_path_rate=0.1")
    monkeypatch.setattr("sys.argv", [f"pretrain_{objective}.py", *words])
    assert main(OBJECTIVES[objective][0]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.match(said, line.removeprefix("error: "))
    assert not (tmp_path / "run").exists()


def test_defaults_that_suit_other_families_are_left_out() -> None:
    """MAE's fixed positions and DINOv2's LayerScale and drop path are for plain Vision Transformers."""
    plain = parse_run(OBJECTIVES["dinov2"][0], ["--encoder.arch=vit_tiny_patch16_224"]).encoder
    assert (plain.layer_scale, plain.drop_path_schedule) == (1e-5, "uniform")
    swin = parse_run(OBJECTIVES["dinov2"][0], [SWIN]).encoder
    assert (swin.layer_scale, swin.drop_path_schedule, swin.drop_path_rate) == (None, "linear", 0.1)
    rotated = parse_run(OBJECTIVES["mae"][0], ["--encoder.arch=vit_small_patch16_dinov3"]).encoder
    assert rotated.pos_embed == "learned"
    assert (
        parse_run(OBJECTIVES["mae"][0], ["--encoder.arch=deit_tiny_distilled_patch16_224"]).encoder.pos_embed
        == "sincos"
    )


def test_arguments_of_the_architecture_come_from_files_and_flags_and_stay_with_the_run(tmp_path: Path) -> None:
    file = tmp_path / "swin.yaml"
    stages = {"depths": [1, 1, 2], "embed_dim": 16, "num_heads": [1, 2, 4]}
    file.write_text(yaml.safe_dump({"encoder": {"arch": FAMILIES["swin"].arch, "model_args": stages}}))
    defaults = OBJECTIVES["dino"][0]
    given = parse_run(defaults, ["--config", str(file), "--encoder.model_args.window_size", "4"]).encoder.model_args
    assert given == {**stages, "window_size": 4}
    whole = parse_run(defaults, ["--config", str(file), "--encoder.model_args", "{depths: [1, 1]}"]).encoder.model_args
    assert whole == {"depths": [1, 1]}
    config = parse_run(defaults, ["--config", str(file), *flags_of("dino", "swin")])
    write_config(config, tmp_path / "config.yaml")
    assert parse_run(defaults, ["--config", str(tmp_path / "config.yaml")]).encoder == config.encoder


def test_the_doctor_says_which_pair_cannot_work_and_what_would_suit_the_images(photo_folder: Path) -> None:
    swin = flags_of("mae", "swin")
    assert look_at(photo_folder, *swin).problems == [
        "encoder.arch='swin_tiny_patch4_window7_224': MAE drops tokens before the first block, which this backbone "
        "cannot; use a Vision Transformer (vit_*, deit_*), or SimMIM or DINO"
    ]
    large = ["--encoder.image_size=192", "--objective.local_crop_size=96"]
    [few, quadratic] = backbones(look_at(photo_folder, *large, objective="dino").warnings)
    assert re.search("40 images are few .*: --encoder.arch convnext_tiny or vit_small_r26_s32_224$", few)
    assert re.search("attention among 576 tokens takes 75% .* swin_tiny_patch4_window7_224$", quadratic)
    assert re.search("vit_small_r26_s32_224, with LeJEPA$", *backbones(look_at(photo_folder, large[0]).warnings))
    for name in ("convnext", "hybrid"):
        assert backbones(look_at(photo_folder, *flags_of("dino", name), objective="dino").warnings) == []


def backbones(warnings: list[str]) -> list[str]:
    return [text for text in warnings if text.startswith("backbone: ")]
