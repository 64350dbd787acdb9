"""A backbone as a folder that `timm.create_model("local-dir:...")` reads, laid out as timm's models on the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from ssl_vit.core.writing import save_tensors, write_json
from ssl_vit.models.encoder import Features
from ssl_vit.models.vit import set_fused_attention
from ssl_vit.runs.trained import Trained

LIBRARY = "timm"
LOADING_CODE = """\
import timm
import torch

model = timm.create_model("local-dir:.", pretrained=True).eval()  # "." is this folder; or "hf-hub:NAMESPACE/NAME"
settings = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**settings, is_training=False)  # of a PIL image
images = torch.randn(1, {in_chans}, {height}, {width})
with torch.inference_mode():
    tokens = model.forward_features(images)
    cls, patches = tokens[:, 0], tokens[:, {num_prefix}:]
    features = {timm_feature}  # one vector an image
"""


def write(trained: Trained, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`."""
    file = folder / "model.safetensors"
    save_tensors(trained.encoder.vit.state_dict(), file)
    write_json(folder / "config.json", trained.described(file))


def load(folder: Path) -> Callable[[Tensor], Features]:
    """Load the folder in timm."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    set_fused_attention(model, True)

    def encode(images: Tensor) -> Features:
        tokens = model.forward_features(images)
        patches = tokens[:, model.num_prefix_tokens :]
        return Features(tokens[:, 0] if model.has_class_token else patches.mean(dim=1), patches)

    return encode
