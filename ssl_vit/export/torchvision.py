"""A backbone as the weights of torchvision's VisionTransformer (`vit_b_16` and its relatives)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from ssl_vit.core.writing import save_tensors, write_json
from ssl_vit.models.encoder import Features
from ssl_vit.models.weights.layouts import fold_layer_scale, plain_shape, plain_tensors, to_torchvision
from ssl_vit.runs.trained import Trained

LIBRARY = "torchvision"
# Width, blocks, heads, MLP width and patch size of the architectures that torchvision has a name for.
_NAMED = {
    (768, 12, 12, 3072, 16): "vit_b_16",
    (768, 12, 12, 3072, 32): "vit_b_32",
    (1024, 24, 16, 4096, 16): "vit_l_16",
    (1024, 24, 16, 4096, 32): "vit_l_32",
    (1280, 32, 16, 5120, 14): "vit_h_14",
}
LOADING_CODE = """\
import json

import torch
import torchvision
from safetensors.torch import load_file
from torchvision.models.feature_extraction import create_feature_extractor

with open("config.json") as file:
    settings = json.load(file)
model = torchvision.models.VisionTransformer(**settings["arguments"]).eval()
model.heads = torch.nn.Identity()
model.load_state_dict(load_file("model.safetensors"))
images = torch.randn(1, 3, {height}, {width})  # normalised by settings["mean"] and settings["std"]
with torch.inference_mode():
    tokens = create_feature_extractor(model, ["encoder"])(images)["encoder"]
cls, patches = tokens[:, 0], tokens[:, 1:]
features = {feature}  # one vector an image
"""


def write(trained: Trained, folder: Path) -> str:
    """Write `model.safetensors`, and `config.json` with the constructor's arguments and the normalisation.

    Raises:
        ValueError: torchvision's VisionTransformer has another architecture; names the difference.
    """
    encoder = trained.encoder
    shape = plain_shape(encoder.model)
    reason = None
    if encoder.in_chans != 3:
        reason = f"it takes 3 channels, and this backbone {encoder.in_chans}"
    elif len(set(encoder.image_size)) != 1 or len(set(encoder.stride)) != 1:
        reason = f"it takes square images and patches, and this backbone {encoder.image_size} and {encoder.stride}"
    elif shape.num_registers or shape.has_swiglu:
        reason = "it knows no registers" if shape.num_registers else "it knows no SwiGLU"
    elif shape.eps != 1e-6:
        reason = f"its norms have an epsilon of 1e-6, and this backbone's {shape.eps:g}"
    if reason is not None:
        raise ValueError(f"torchvision's VisionTransformer cannot be this backbone: {reason}; export to timm")
    tensors = plain_tensors(encoder.model)
    tensors = to_torchvision(fold_layer_scale(tensors) if shape.has_layer_scale else tensors)
    save_tensors(tensors, folder / "model.safetensors")
    patch_size = encoder.stride[0]
    described: dict[str, Any] = {
        "architecture": _NAMED.get((shape.width, shape.depth, shape.num_heads, shape.hidden, patch_size)),
        "arguments": {
            "image_size": encoder.image_size[0],
            "patch_size": patch_size,
            "num_layers": shape.depth,
            "num_heads": shape.num_heads,
            "hidden_dim": shape.width,
            "mlp_dim": shape.hidden,
        },
        "mean": list(trained.normalization.mean),
        "std": list(trained.normalization.std),
        "crop_pct": trained.crop_pct,
        "interpolation": "bicubic",
    }
    write_json(folder / "config.json", described)
    return LOADING_CODE


def load(folder: Path) -> Callable[[Tensor], Features]:
    """Load the folder in torchvision."""
    settings = json.loads((folder / "config.json").read_text())
    model: Any
    if settings["architecture"] is not None:
        builder = getattr(torchvision.models, settings["architecture"])
        model = builder(image_size=settings["arguments"]["image_size"])
    else:
        model = torchvision.models.VisionTransformer(**settings["arguments"])
    model.heads = nn.Identity()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.eval()

    extractor = create_feature_extractor(model, ["encoder"])

    def encode(images: Tensor) -> Features:
        tokens = extractor(images)["encoder"]
        assert torch.allclose(model(images), tokens[:, 0], atol=1e-5)  # what its own forward gives
        return Features(tokens[:, 0], tokens[:, 1:])

    return encode
