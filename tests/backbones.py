"""Small backbones on disk, in timm's layout, for runs that learn from one."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from ssl_vit.models.config import EncoderConfig


def write_backbone(folder: Path, config: EncoderConfig, *, mean: float = 0.4, std: float = 0.3) -> Path:
    """A backbone of random weights whose features differ from image to image.

    Args:
        mean, std: of every channel, in its config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        encoder = config.build()
        for parameter in encoder.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    size = config.image_size if isinstance(config.image_size, tuple) else (config.image_size,) * 2
    described = {
        "architecture": config.arch,
        "model_args": config.timm_overrides,
        "pretrained_cfg": {
            "input_size": [config.in_chans, *size],
            "mean": [mean] * config.in_chans,
            "std": [std] * config.in_chans,
        },
    }
    (folder / "config.json").write_text(json.dumps(described))
    save_file(dict(encoder.model.state_dict()), folder / "model.safetensors")
    return folder


@functools.cache
def teacher_folder(in_chans: int = 3) -> Path:
    """A Vision Transformer with patches of 8 pixels; the same weights in every process, in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="ssl_vit-teacher-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    size = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return write_backbone(folder, EncoderConfig("vit_tiny_patch16_224", 32, in_chans=in_chans, **size))
