"""A backbone as a transformers folder: of its own class, else of TimmWrapperModel; MAE with its decoder too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_vit.core.writing import save_tensors, write_json
from ssl_vit.export.graph import timm_code, timm_features
from ssl_vit.models.encoder import Encoder, Features
from ssl_vit.models.weights.exchange import timm_to_transformers
from ssl_vit.models.weights.layouts import (
    Shape,
    Tensors,
    decoder_to_transformers,
    fold_layer_scale,
    plain_shape,
    plain_tensors,
    to_transformers,
)
from ssl_vit.objectives.mae import MAE
from ssl_vit.runs.trained import Trained

LIBRARY = "transformers"
LOADING_CODE = """\
import torch
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained(".")  # "." is this folder, or NAMESPACE/NAME of the hub
model = AutoModel.from_pretrained(".").eval()
images = torch.randn(1, {in_chans}, {height}, {width})  # processor(photos, return_tensors="pt")["pixel_values"]
with torch.inference_mode():
    outputs = model(images){reading}
features = {feature}  # one vector an image
"""
_TOKENS = "cls, patches = outputs.pooler_output, outputs.last_hidden_state[:, {num_prefix}:]"
_WINDOWS = "\n    cls, patches = outputs.pooler_output, outputs.last_hidden_state"
_MAPS = (
    "cls = outputs.pooler_output\n    patches = model.layernorm(outputs.last_hidden_state.flatten(2).transpose(1, 2))"
)
# Python that reads the outputs, by model_type.
_READING = {
    "vit": f"\n    {_TOKENS}",
    "dinov2": f"\n    {_TOKENS}",
    "dinov2_with_registers": f"\n    {_TOKENS}",
    "dinov3_vit": f"\n    {_TOKENS}",
    "deit": f"\n    {_TOKENS}",
    # A call with another size changes SwinModel's windows and shifts, smaller ones for good.
    "swin": f"  # of this size alone: another changes the features, also those of later images{_WINDOWS}",
    "swinv2": _WINDOWS,
    "convnext": f"\n    {_MAPS}",
    "convnextv2": f"\n    {_MAPS}",
}
MAE_LOADING_CODE = """\
import torch
from transformers import ViTMAEForPreTraining

model = ViTMAEForPreTraining.from_pretrained(".").eval()  # "." is this folder, or NAMESPACE/NAME of the hub
images = torch.randn(1, {in_chans}, {height}, {width})
with torch.inference_mode():
    outputs = model(images)
patches = outputs.logits  # predicted for every patch; outputs.mask is 1 where it was removed
"""


def write(trained: Trained, folder: Path) -> str:
    """Write `model.safetensors`, `config.json` and `preprocessor_config.json`.

    A plain ViT with LayerScale or registers becomes a Dinov2Model, others a ViTModel. One with LayerScale whose images
    are not square, or whose MLP's width is no whole multiple, becomes a ViTModel with LayerScale folded into the layers
    before it. Other families become the class of their name. What transformers has no class for becomes a
    TimmWrapperModel, which needs timm.
    """
    encoder = trained.encoder
    try:
        config, tensors = _of_own_class(encoder)
    except ValueError:
        described = trained.described()
        config = {"architectures": ["TimmWrapperModel"], "model_type": "timm_wrapper", "dtype": "float32"}
        config |= {name: described[name] for name in ("architecture", "num_classes", "model_args", "pretrained_cfg")}
        tensors = {f"timm_model.{name}": value.detach().cpu() for name, value in encoder.model.state_dict().items()}
        lines = ["", "outputs = outputs.last_hidden_state", *timm_code(encoder, "model.timm_model")]
        reading = "\n    ".join(lines)
    else:
        reading = _READING[config["model_type"]]
    write_folder(folder, trained, config, tensors)
    return LOADING_CODE.replace("{reading}", reading)


def _of_own_class(encoder: Encoder) -> tuple[dict[str, Any], Tensors]:
    """Configuration and weights for the class of the architecture.

    Raises:
        ValueError: transformers has none; says why.
    """
    try:
        shape = plain_shape(encoder.model)
    except ValueError:
        return timm_to_transformers(encoder.model, encoder.image_size)
    tensors = plain_tensors(encoder.model)
    if shape.num_registers or shape.has_swiglu or (shape.has_layer_scale and _fits_dinov2(encoder, shape)):
        if not _fits_dinov2(encoder, shape):
            raise ValueError(
                "transformers' Dinov2Model cannot be this backbone: it takes square images and patches, and an MLP "
                f"whose width is a whole multiple; this one has {encoder.image_size}, {encoder.stride} and "
                f"{shape.hidden / shape.width:g}; export to timm"
            )
        return _dinov2(encoder, shape, tensors)
    config = {"architectures": ["ViTModel"], "model_type": "vit", **_vit_settings(encoder, shape)}
    # An identity as pooling layer, so that the pooled output is the class token.
    config |= {"pooler_act": "linear", "pooler_output_size": shape.width}
    renamed = to_transformers(fold_layer_scale(tensors))
    renamed |= {"pooler.dense.weight": torch.eye(shape.width), "pooler.dense.bias": torch.zeros(shape.width)}
    return config, renamed


def write_mae(trained: Trained, folder: Path) -> str:
    """Write an MAE with its decoder as a ViTMAEForPreTraining, to reconstruct images or to train on.

    Raises:
        ValueError: this is no run of MAE, or ViTMAEForPreTraining has no such architecture.
    """
    encoder = trained.encoder
    mae, shape = check_mae(trained)
    config = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        **_vit_settings(encoder, shape),
        "decoder_hidden_size": mae.config.decoder_embed_dim,
        "decoder_num_hidden_layers": mae.config.decoder_depth,
        "decoder_num_attention_heads": mae.config.decoder_num_heads,
        "decoder_intermediate_size": 4 * mae.config.decoder_embed_dim,
        "mask_ratio": mae.config.mask_ratio,
        "norm_pix_loss": mae.config.norm_pix_loss,
    }
    backbone = to_transformers(fold_layer_scale(plain_tensors(encoder.model)))
    decoder = {
        name: value.detach().float().cpu()
        for name, value in mae.state_dict().items()
        if not name.startswith("encoder.")
    }
    renamed = {f"vit.{name}": value for name, value in backbone.items()} | decoder_to_transformers(decoder)
    write_folder(folder, trained, config, renamed)
    return MAE_LOADING_CODE


def check_mae(trained: Trained) -> tuple[MAE, Shape]:
    """The objective and the shape of an MAE that ViTMAEForPreTraining can be.

    Raises:
        ValueError: this is no run of MAE, or ViTMAEForPreTraining has no such architecture.
    """
    mae, encoder = trained.objective, trained.encoder
    if not isinstance(mae, MAE):
        raise ValueError(f"{trained.folder}: only a run of MAE has a decoder to export; use --to transformers")
    shape = plain_shape(encoder.model)
    if shape.num_registers or shape.has_swiglu or not _is_square(encoder) or mae.config.decoder != "self":
        raise ValueError(
            "transformers' ViTMAEForPreTraining cannot be this MAE: it takes square images and patches, a ViT "
            "without registers or SwiGLU, and a decoder of self-attention"
        )
    return mae, shape


def load(folder: Path) -> Callable[[Tensor], Features]:
    """Load the folder in transformers.

    Raises:
        RuntimeError: transformers initialised a parameter itself, or did not use one of the file.
    """
    from transformers import AutoModel

    model: Any = load_strictly(AutoModel, folder)
    kind = model.config.model_type
    num_prefix = 2 if kind == "deit" else 0 if "swin" in kind else 1 + getattr(model.config, "num_register_tokens", 0)

    def encode(images: Tensor) -> Features:
        outputs = model(pixel_values=images)
        tokens = outputs.last_hidden_state
        if kind == "timm_wrapper":
            return timm_features(model.timm_model, tokens)
        if tokens.ndim == 4:  # ConvNeXt's map
            return Features(outputs.pooler_output, model.layernorm(tokens.flatten(2).transpose(1, 2)))
        return Features(outputs.pooler_output, tokens[:, num_prefix:])

    return encode


def load_mae(folder: Path) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Load an MAE's folder in transformers: a function of images and noise to predicted patches and the drawn mask."""
    from transformers import ViTMAEForPreTraining

    model: Any = load_strictly(ViTMAEForPreTraining, folder)

    def reconstruct(images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model(pixel_values=images, noise=noise)
        return outputs.logits, outputs.mask.bool()

    return reconstruct


def load_strictly(kind: Any, folder: Path) -> Any:
    """A folder as a class of transformers, in eval mode.

    Raises:
        RuntimeError: transformers initialised a parameter itself, or did not use one of the file.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    wrong = {name: sorted(map(str, keys)) for name, keys in report.items() if keys and name != "error_msgs"}
    if wrong:
        raise RuntimeError(f"{folder}: transformers does not load it as it is: {wrong}")
    return model.eval()


def _fits_dinov2(encoder: Encoder, shape: Shape) -> bool:
    return _is_square(encoder) and _dinov2_mlp_ratio(shape) is not None


def _is_square(encoder: Encoder) -> bool:
    return len(set(encoder.image_size)) == 1 and len(set(encoder.stride)) == 1


def _dinov2_mlp_ratio(shape: Shape) -> int | None:
    """The integer from which Dinov2Model computes the width of its MLP; None where none gives this width."""
    for ratio in range(1, 17):
        hidden = ratio * shape.width
        if shape.has_swiglu:
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        if hidden == shape.hidden:
            return ratio
    return None


def _dinov2(encoder: Encoder, shape: Shape, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    if not shape.has_layer_scale:
        ones = torch.ones(shape.width)
        tensors |= {f"blocks.{i}.{name}.gamma": ones.clone() for i in range(shape.depth) for name in ("ls1", "ls2")}
    renamed = to_transformers(tensors, dinov2=True, swiglu=shape.has_swiglu)
    renamed["embeddings.mask_token"] = torch.zeros(1, shape.width)  # only pre-training uses it
    kind, model_type = "Dinov2Model", "dinov2"
    config = _sizes(encoder, shape) | {
        "mlp_ratio": _dinov2_mlp_ratio(shape),
        "layerscale_value": 1.0,
        "use_swiglu_ffn": shape.has_swiglu,
        "drop_path_rate": 0.0,
    }
    if shape.num_registers:
        kind, model_type = "Dinov2WithRegistersModel", "dinov2_with_registers"
        config["num_register_tokens"] = shape.num_registers
    return {"architectures": [kind], "model_type": model_type, **config}, renamed


def _vit_settings(encoder: Encoder, shape: Shape) -> dict[str, Any]:
    return _sizes(encoder, shape) | {"intermediate_size": shape.hidden}


def _sizes(encoder: Encoder, shape: Shape) -> dict[str, Any]:
    def plain(size: tuple[int, int]) -> int | list[int]:
        return size[0] if size[0] == size[1] else list(size)

    return {
        "dtype": "float32",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.num_heads,
        "hidden_act": "gelu",
        "layer_norm_eps": shape.eps,
        "image_size": plain(encoder.image_size),
        "patch_size": plain(encoder.stride),
        "num_channels": encoder.in_chans,
        "qkv_bias": True,
    }


def write_folder(folder: Path, trained: Trained, config: dict[str, Any], tensors: Tensors) -> None:
    """Write weights, config.json and preprocessor_config.json."""
    save_tensors(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", _preprocessing(trained))


def _preprocessing(trained: Trained) -> dict[str, Any]:
    """Resize and centre-crop as our evaluation does, bicubic.

    No processor covers a box that is not square, so for such a box images are resized without keeping their ratio.
    """
    height, width = trained.encoder.image_size
    if height == width:
        fitted: dict[str, Any] = {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": int(height / trained.crop_pct)},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }
    else:
        fitted = {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
    return {
        **fitted,
        "do_convert_rgb": trained.encoder.in_chans == 3,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(trained.normalization.mean),
        "image_std": list(trained.normalization.std),
    }
