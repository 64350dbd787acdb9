"""A small CNN with BatchNorm as a folder of timm's layout: a teacher that no encoder of ours is."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

ARGUMENTS: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}


def cnn(num_classes: int = 3, in_chans: int = 3, seed: int = 0) -> nn.Module:
    """With running averages that say something."""
    torch.manual_seed(seed)
    model = timm.create_model("resnet18", num_classes=num_classes, in_chans=in_chans, **ARGUMENTS).train()
    for _ in range(3):
        model(torch.randn(8, in_chans, 32, 32))
    return model.eval()


def write_classifier(folder: Path, model: nn.Module, **pretrained_cfg: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    channels = model.conv1.in_channels  # pyright: ignore
    cfg = {"input_size": [channels, 32, 32], "mean": [0.5] * channels, "std": [0.5] * channels, **pretrained_cfg}
    described = {
        "architecture": "resnet18",
        "num_classes": model.num_classes,
        "model_args": {**ARGUMENTS, "in_chans": channels},
        "pretrained_cfg": cfg,
    }
    described["label_names"] = cfg.pop("label_names", None)
    (folder / "config.json").write_text(json.dumps(described))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder
