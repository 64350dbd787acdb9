"""Every YAML in configs/ is loaded and built."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import (
    attentive_probe,
    distill,
    finetune,
    pretrain_dino,
    pretrain_dinov2,
    pretrain_fcmae,
    pretrain_lejepa,
    pretrain_mae,
    pretrain_simmim,
)
from ssl_vit.evaluation import command
from ssl_vit.evaluation.linear_probe import PRESETS
from ssl_vit.evaluation.probes import KNNConfig, LinearConfig
from ssl_vit.training.config import RunConfig, parse_run

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
DEFAULTS = {
    "mae": pretrain_mae.DEFAULTS,
    "dino": pretrain_dino.DEFAULTS,
    "dinov2": pretrain_dinov2.DEFAULTS,
    "simmim": pretrain_simmim.DEFAULTS,
    "fcmae": pretrain_fcmae.DEFAULTS,
    "lejepa": pretrain_lejepa.DEFAULTS,
    "simdino": pretrain_dino.DEFAULTS,
    "simdinov2": pretrain_dinov2.DEFAULTS,
    "distill": distill.DEFAULTS,
    "finetune": finetune.DEFAULTS,
    "deit": finetune.DEFAULTS,
    "attentive": attentive_probe.DEFAULTS,
}
SCRIPTS = {
    "distill": "distill",
    "finetune": "finetune",
    "deit": "finetune",
    "attentive": "attentive_probe",
    "simdino": "pretrain_dino",
    "simdinov2": "pretrain_dinov2",
}


def objective_of(path: Path) -> str:
    return path.stem.split("_")[1 if path.stem.startswith("quickstart") else 0]


def load(path: Path) -> RunConfig:
    return parse_run(DEFAULTS[objective_of(path)], ["--config", str(path)])


def header_of(path: Path) -> str:
    return "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))


def commands_of(path: Path) -> dict[str, list[str]]:
    """The words after each script that the header calls, by the script's name."""
    lines = re.findall(r"^# +(?:accelerate launch|python) .*?scripts/(\w+)\.py (.*)$", header_of(path), re.MULTILINE)
    return {script: shlex.split(words) for script, words in lines}


def settings_of(script: str, words: list[str]) -> Any:
    """The settings that a command of a header gives; a backbone to start or learn from need not be there."""
    if script in ("evaluate_knn", "linear_probe"):
        found = []
        protocol = words[words.index("--protocol") + 1] if "--protocol" in words else "dinov2"
        rest = [word for word in words if word not in ("--protocol", protocol)]
        configs = {"evaluate_knn": {"": KNNConfig()}, "linear_probe": {"": LinearConfig(), "probe": PRESETS[protocol]}}
        assert command.main(lambda *_, **settings: found.append(settings), configs[script], None, rest) == 0, words
        return found[0]["config"]
    for flag in ("--encoder.pretrained", "--objective.teacher"):
        if flag in words:
            start = words.index(flag)
            words = words[:start] + words[start + 2 :]
    pretraining = ("mae", "dino", "dinov2", "simmim", "fcmae", "lejepa")
    names = {f"pretrain_{name}": name for name in pretraining} | {"attentive_probe": "attentive"}
    return parse_run(DEFAULTS[names.get(script, script)], words)


def by_name(name: str) -> RunConfig:
    return load(CONFIGS[0].with_name(f"{name}.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_command_of_a_header_is_understood_and_built(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parents[1])
    name = objective_of(path)
    script = SCRIPTS.get(name, f"pretrain_{name}")
    config, _ = settings_of(script, commands_of(path)[script]).resolve(num_samples=1_281_167, num_classes=1000)
    assert config.num_steps(1_281_167) > 0
    assert config.batch.num_micro(8) >= 1
    with torch.device("meta"):
        encoder = config.encoder.build()
        objective = config.objective.build(encoder)
    config.build_transform(encoder)
    assert sum(parameter.numel() for parameter in objective.parameters()) > 1e5
    assert len(config.data.mean) == encoder.in_chans


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_gives_command_hardware_and_what_to_expect(path: Path) -> None:
    header = header_of(path)
    name = objective_of(path)
    assert f"scripts/{SCRIPTS.get(name, f'pretrain_{name}')}.py --config configs/{path.name}" in header
    assert re.search(r"Hardware:", header)
    assert re.search(r"Expect:", header)


MEASURED_BY = {"k-NN": "evaluate_knn", "linear": "linear_probe", "fine-tuned": "finetune"}


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if "Not run here" in header_of(path)], ids=lambda path: path.stem
)
def test_a_published_figure_stands_beside_the_command_that_measures_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the whole validation split, from all training images and of the folder that the config's own run writes."""
    monkeypatch.chdir(path.parents[1])
    expected = re.search(r"Expect:(.*?)(?:MAE's k-NN|Not run here|Measured by)", header_of(path).replace("\n#", ""))
    assert expected is not None
    figures = [name for name in MEASURED_BY if re.search(rf"[0-9.]+ %? ?{name}", expected[1])]
    commands, own = commands_of(path), load(path)
    if own.objective.__class__.__name__ == "FineTuneConfig":
        figures = ["fine-tuned"]
    assert figures
    assert own.evaluation.test_split == "validation"
    for figure in figures:
        script = MEASURED_BY[figure]
        settings = settings_of(script, commands[script])
        judged = settings.evaluation if script == "finetune" else settings
        source = settings.data.source if script == "finetune" else settings.source
        assert source == own.data.source == "ILSVRC/imagenet-1k"
        assert (judged.test_split, judged.max_images, judged.test_source) == ("validation", None, None)
        if SCRIPTS.get(objective_of(path)) != "finetune":
            assert own.output_dir in commands[script]
    is_supervised = SCRIPTS.get(objective_of(path)) == "finetune"
    assert is_supervised or "10,000 training images" in header_of(path)
    assert is_supervised or own.evaluation.max_images == 10_000


def test_the_imagenet_configs_of_mae_are_the_papers() -> None:
    for name, (arch, dim) in {
        "mae_vits16_imagenet1k": ("vit_small_patch16_224", 384),
        "mae_vitb16_imagenet1k": ("vit_base_patch16_224", 768),
        "mae_vitl16_imagenet1k": ("vit_large_patch16_224", 1024),
    }.items():
        config = by_name(name)
        assert (config.encoder.arch, config.encoder.pos_embed) == (arch, "sincos")
        assert config.optim.peak_lr(config.batch.size) == pytest.approx(2.4e-3)
        assert (config.batch.size, config.epochs, config.optim.warmup) == (4096, 800, 0.05)
        assert (config.optim.betas, config.optim.weight_decay) == ((0.9, 0.95), 0.05)
        objective = config.objective
        assert (objective.mask_ratio, objective.norm_pix_loss, objective.crop_scale) == (0.75, True, (0.2, 1.0))
        assert (objective.decoder_embed_dim, objective.decoder_depth, objective.decoder_num_heads) == (512, 8, 16)
        with torch.device("meta"):
            assert config.encoder.build().embed_dim == dim


@pytest.mark.parametrize(
    ("name", "batch", "epochs", "peak", "clip", "crops", "freeze"),
    [
        ("dino_vits16_imagenet1k", 512, 100, 1e-3, 3.0, (8, (0.4, 1.0), (0.05, 0.4)), 1),
        ("dino_vitb16_imagenet1k", 1024, 400, 3e-3, 0.3, (10, (0.25, 1.0), (0.05, 0.25)), 3),
    ],
)
def test_the_imagenet_configs_of_dino_are_the_papers(
    name: str, batch: int, epochs: int, peak: float, clip: float, crops: tuple, freeze: int
) -> None:
    config = by_name(name)
    objective, optim = config.objective, config.optim
    assert (config.batch.size, config.epochs) == (batch, epochs)
    assert optim.peak_lr(batch) == pytest.approx(peak)
    assert optim.warmup == pytest.approx(10 / epochs)
    assert (optim.weight_decay, optim.weight_decay_end, optim.betas) == (0.04, 0.4, (0.9, 0.999))
    assert (optim.clip_grad, optim.clip_over) == (clip, "parameter")
    assert (objective.num_local_crops, objective.global_crop_scale, objective.local_crop_scale) == crops
    assert (objective.num_prototypes, objective.ema_momentum, objective.center_momentum) == (65536, 0.996, 0.9)
    assert objective.freeze_last_layer == pytest.approx(freeze / epochs)
    assert (objective.hidden_dim, objective.bottleneck_dim, objective.student_temp) == (2048, 256, 0.1)
    assert (config.encoder.drop_path_rate, objective.norm_last_layer) == (0.1, True)


def test_the_imagenet_configs_of_simdino_are_the_papers_code() -> None:
    for name, batch, local, clip_over in (
        ("simdino_vitb16_imagenet1k", 512, 0.1, "parameter"),
        ("simdinov2_vitb16_imagenet1k", 1024, 0.2, "module"),
    ):
        config, _ = by_name(name).resolve(1_281_167)
        objective, optim = config.objective, config.optim
        assert (objective.loss, objective.coding_eps, objective.coding_coeff) == ("coding_rate", 0.05, 1.0)
        assert (objective.coding_features, objective.bottleneck_dim, objective.hidden_dim) == ("average", 256, 2048)
        assert (config.batch.size, config.epochs, config.encoder.drop_path_rate) == (batch, 100, local)
        assert optim.peak_lr(batch) == pytest.approx(1e-3 if batch == 512 else 4e-3)
        assert (optim.weight_decay, optim.weight_decay_end, optim.warmup, optim.min_lr) == (0.04, 0.4, 0.1, 1e-6)
        assert (optim.clip_grad, optim.clip_over) == (3.0, clip_over)
        assert (objective.num_local_crops, objective.global_crop_scale, objective.local_crop_scale) == (
            10,
            (0.4, 1.0),
            (0.05, 0.4),
        )
        assert (objective.ema_momentum, objective.ema_momentum_end) == (0.996 if batch == 512 else 0.9, 1.0)
    assert (objective.ibot_weight, objective.ibot_separate_head, objective.koleo_weight) == (1.0, False, 0.0)
    assert (objective.layer_decay, objective.patch_embed_lr, config.encoder.layer_scale) == (0.9, 0.2, 0.1)


def test_the_imagenet_config_of_dinov2_is_the_papers_code() -> None:
    config = by_name("dinov2_vitl16_imagenet1k")
    objective, optim = config.objective, config.optim
    assert (config.batch.size, config.steps) == (2048, 125_000)
    assert optim.peak_lr(2048) == pytest.approx(4e-3 * 2**0.5)
    assert (optim.warmup, objective.teacher_temp_warmup, objective.freeze_last_layer) == (0.1, 0.3, 0.01)
    assert (objective.warmup_teacher_temp, objective.teacher_temp, objective.ema_momentum) == (0.04, 0.07, 0.992)
    assert (objective.layer_decay, objective.patch_embed_lr, optim.clip_grad, optim.clip_over) == (
        0.9,
        0.2,
        3.0,
        "module",
    )
    assert (objective.num_prototypes, objective.ibot_separate_head, objective.centering) == (65536, False, "center")
    assert (objective.koleo_weight, objective.ibot_weight, objective.blur_prob) == (0.1, 1.0, "dinov2")
    encoder = config.encoder
    assert (encoder.drop_path_rate, encoder.drop_path_schedule, encoder.layer_scale) == (0.3, "uniform", 1e-5)


@pytest.mark.parametrize(
    ("name", "epochs", "peak", "layer_decay", "drop_path"),
    [("finetune_vitb16_imagenet1k", 100, 2e-3, 0.65, 0.1), ("finetune_vitl16_imagenet1k", 50, 4e-3, 0.75, 0.2)],
)
def test_the_configs_of_fine_tuning_are_the_papers(
    name: str, epochs: int, peak: float, layer_decay: float, drop_path: float
) -> None:
    config = by_name(name)
    objective, optim = config.objective, config.optim
    assert (config.batch.size, config.epochs) == (1024, epochs)
    assert optim.peak_lr(1024) == pytest.approx(peak)
    assert optim.warmup == pytest.approx(5 / epochs)
    assert (optim.min_lr, optim.weight_decay, optim.betas, optim.clip_grad) == (1e-6, 0.05, (0.9, 0.999), None)
    assert (objective.layer_decay, config.encoder.drop_path_rate) == (layer_decay, drop_path)
    assert (objective.mixup, objective.cutmix, objective.label_smoothing) == (0.8, 1.0, 0.1)
    assert (objective.rand_augment, objective.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (objective.pool, objective.model_ema) == ("mean", None)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_configs_of_deit_are_the_papers(size: str) -> None:
    config = by_name(f"deit_{size}_imagenet1k")
    objective, optim = config.objective, config.optim
    assert config.encoder.arch == f"deit_{size}_distilled_patch16_224"
    assert (config.batch.size, config.batch.repeats, config.epochs) == (1024, 3, 300)
    assert optim.peak_lr(1024) == pytest.approx(1e-3)
    assert optim.warmup == pytest.approx(5 / 300, rel=0.01)
    assert (optim.min_lr, optim.weight_decay, optim.betas, optim.clip_grad) == (1e-5, 0.05, (0.9, 0.999), None)
    assert (objective.layer_decay, objective.model_ema, config.encoder.drop_path_rate) == (1.0, 0.99996, 0.1)
    assert (objective.mixup, objective.cutmix, objective.label_smoothing) == (0.8, 1.0, 0.1)
    assert (objective.rand_augment, objective.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (objective.teacher, objective.distillation) == ("regnety_160.deit_in1k", "hard")
    assert (objective.distillation_alpha, objective.distillation_tau) == (0.5, 1.0)
    assert config.evaluation.crop_pct == 0.875


def test_the_config_of_deit_at_384_pixels_is_the_papers() -> None:
    config = by_name("deit_base_384_imagenet1k")
    assert (config.encoder.image_size, config.epochs, config.objective.keep_head) == (384, 30, True)
    assert config.optim.peak_lr(config.batch.size) == pytest.approx(5e-6)
    assert config.optim.weight_decay == 1e-8
