"""A backbone as a folder that `timm.create_model("local-dir:...")` reads, laid out as timm's models on the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from ssl_vit.core.writing import save_tensors, write_json
from ssl_vit.export.graph import timm_features
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
    outputs = model.forward_features(images)
    {timm_code}
    features = {timm_feature}  # one vector an image
"""


def write(trained: Trained, folder: Path) -> str:
    """Write `model.safetensors` and `config.json`."""
    file = folder / "model.safetensors"
    save_tensors(trained.encoder.model.state_dict(), file)
    write_json(folder / "config.json", trained.described(file))
    return LOADING_CODE


def load(folder: Path) -> Callable[[Tensor], Features]:
    """Load the folder in timm."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    set_fused_attention(model, True)
    return lambda images: timm_features(model, model.forward_features(images))
