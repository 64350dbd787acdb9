"""Every YAML in configs/ is loaded and built."""

import re
from pathlib import Path

import pytest
import torch

from scripts.pretrain_mae import DEFAULTS
from ssl_vit.config import parse_run

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_loaded_and_built(path: Path) -> None:
    config = parse_run(DEFAULTS, ["--config", str(path)])
    assert config.num_steps(1_281_167) > 0
    assert config.batch.num_micro(8) >= 1
    with torch.device("meta"):
        encoder = config.encoder.build()
        objective = config.objective.build(encoder)
    config.objective.build_transform(encoder.image_size, encoder.patch_size, config.data.mean, config.data.std)
    assert sum(parameter.numel() for parameter in objective.parameters()) > 1e6
    assert len(config.data.mean) == encoder.in_chans


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_gives_command_hardware_and_what_to_expect(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"scripts/pretrain_mae.py --config configs/{path.name}" in header
    assert re.search(r"Hardware:", header)
    assert re.search(r"Expect:", header)


def test_the_imagenet_configs_are_the_papers() -> None:
    for name, (arch, dim) in {
        "mae_vits16_imagenet1k": ("vit_small_patch16_224", 384),
        "mae_vitb16_imagenet1k": ("vit_base_patch16_224", 768),
        "mae_vitl16_imagenet1k": ("vit_large_patch16_224", 1024),
    }.items():
        config = parse_run(DEFAULTS, ["--config", str(CONFIGS[0].with_name(f"{name}.yaml"))])
        assert (config.encoder.arch, config.encoder.pos_embed) == (arch, "sincos")
        assert config.optim.peak_lr(config.batch.size) == pytest.approx(2.4e-3)
        assert (config.batch.size, config.epochs, config.optim.warmup) == (4096, 800, 0.05)
        assert (config.optim.betas, config.optim.weight_decay) == ((0.9, 0.95), 0.05)
        objective = config.objective
        assert (objective.mask_ratio, objective.norm_pix_loss, objective.crop_scale) == (0.75, True, (0.2, 1.0))
        assert (objective.decoder_embed_dim, objective.decoder_depth, objective.decoder_num_heads) == (512, 8, 16)
        with torch.device("meta"):
            assert config.encoder.build().embed_dim == dim
