"""The result of a run: a safetensors backbone with timm's key names, and what is needed to use it."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import ssl_vit
from ssl_vit import reading
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.vit import ViT, ViTConfig, set_fused_attention
from ssl_vit.reading import read_tensors

BACKBONE_FILE, CONFIG_FILE = "backbone.safetensors", "config.json"
TOLERANCE = 1e-4
"""Largest difference of a feature, as a share of the largest feature where that is above 1; fp32. A convolution and the
product that it is differ in their last bits, and so does what follows."""


def export_backbone(
    encoder: Encoder,
    folder: Path,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    provenance: dict[str, Any],
    crop_pct: float = 0.875,
) -> Path:
    """Write `backbone.safetensors` and `config.json`, and prove that they load as what was trained.

    The tensors carry timm's key names, so `timm.create_model(arch, num_classes=0, checkpoint_path=...)` reads them.
    config.json follows timm's layout; our own settings stand under "ssl_vit".

    Raises:
        RuntimeError: what was written does not give the encoder's features.
    """
    if not isinstance(encoder, ViT):
        raise ValueError(f"cannot export a {type(encoder).__name__}: only Vision Transformers of timm so far")
    described = describe(encoder, mean=mean, std=std, provenance=provenance, crop_pct=crop_pct)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in encoder.vit.state_dict().items()}
    # Proven where nobody looks for it yet, then moved.
    with tempfile.TemporaryDirectory(dir=folder, prefix="unfinished-") as unfinished:
        save_file(tensors, Path(unfinished) / BACKBONE_FILE, metadata={"format": "pt"})
        (Path(unfinished) / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")
        # safetensors lets only its owner read a file; a result is for whom the folder is for.
        (Path(unfinished) / BACKBONE_FILE).chmod((Path(unfinished) / CONFIG_FILE).stat().st_mode)
        _prove_equal(encoder, Path(unfinished))
        for name in (CONFIG_FILE, BACKBONE_FILE):
            (Path(unfinished) / name).replace(folder / name)
    return folder / BACKBONE_FILE


def describe(
    encoder: ViT,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    provenance: dict[str, Any],
    crop_pct: float = 0.875,
) -> dict[str, Any]:
    """The content of config.json: timm's layout, and our own settings under "ssl_vit"."""
    config = encoder.config
    # Nothing trains the class token of an MAE, so the mean of its patch tokens stands for an image.
    pooling = "token" if encoder.has_cls_token and provenance.get("objective") != "MAE" else "avg"
    return {
        "architecture": config.arch.split(".")[0],
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": pooling,
        "model_args": {
            **config.timm_overrides,
            "global_pool": pooling,
            "img_size": list(encoder.image_size),
            "patch_size": encoder.patch_size[0] if len(set(encoder.patch_size)) == 1 else list(encoder.patch_size),
            "in_chans": encoder.in_chans,
            "fc_norm": False,
            "dynamic_img_size": True,
        },
        "pretrained_cfg": {
            "input_size": [encoder.in_chans, *encoder.image_size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": crop_pct,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "ssl_vit": {
            "version": ssl_vit.__version__,
            "encoder": {key: value for key, value in dataclasses.asdict(config).items() if key != "grad_checkpointing"},
            "torch": torch.__version__,
            "timm": timm.__version__,
            **provenance,
        },
    }


def load_backbone(path: str | Path) -> Encoder:
    """Build the encoder that a run exported and fill it, strictly.

    Args:
        path: a run folder, a folder with backbone.safetensors and config.json, or the safetensors file in it.

    Returns:
        the encoder in eval mode, with the `pretrained_cfg` that timm's own models have.

    Raises:
        ValueError: a file is missing or unreadable, or its tensors are not exactly those of the architecture.
    """
    file = backbone_file(path)
    encoder = read_encoder_config(file.parent).build()
    assert isinstance(encoder, ViT)
    load_strictly(encoder.vit, read_tensors(file), file)
    # What timm.data.resolve_model_data_config reads of a model: size, normalisation and crop.
    encoder.pretrained_cfg = read_config(file.parent)["pretrained_cfg"]
    return encoder.eval()


def backbone_file(path: str | Path) -> Path:
    """The safetensors file of a backbone, or of the folder it lies in.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    file = path / BACKBONE_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{file}: no such file; a finished run has one, and `python scripts/export.py RUN` writes it at any time"
        )
    return file


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json next to a backbone.

    Raises:
        ValueError: it is missing, no JSON, or not from ssl_vit.
    """
    file = folder / CONFIG_FILE
    config = read_json(file)
    if "encoder" not in config.get("ssl_vit", {}):
        raise ValueError(f"{file}: has no ssl_vit.encoder section; it was not written by ssl_vit's export")
    return config


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file beside a backbone.

    Raises:
        ValueError: it is missing, or no JSON object.
    """
    try:
        return reading.read_json(file)
    except OSError as error:
        raise ValueError(
            f"{file}: cannot be read ({error.strerror}); a backbone needs its {file.name} beside it"
        ) from error


def read_encoder_config(folder: Path) -> ViTConfig:
    """Architecture and sizes from the config.json next to a backbone."""
    try:
        return ViTConfig.from_plain(read_config(folder)["ssl_vit"]["encoder"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: ssl_vit.encoder.{error}") from error


def load_strictly(module: torch.nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    """Fill a module with exactly the tensors it has, or refuse with what is missing, unknown and of another shape."""
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    missing, unexpected = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {wanted[name]}"
        for name in sorted(set(wanted) & set(tensors))
        if tuple(tensors[name].shape) != wanted[name]
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{len(found)} {what}: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}"
            for what, found in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", shapes),
            )
            if found
        ]
        raise ValueError(f"{file}: does not fit {type(module).__name__}: {'; '.join(parts)}")
    module.load_state_dict(tensors)


def _prove_equal(encoder: ViT, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    device = next(encoder.parameters()).device
    images = torch.randn(2, encoder.in_chans, *encoder.image_size, generator=generator).to(device)
    training = encoder.training
    encoder.eval()
    with torch.inference_mode():
        loaded = load_backbone(folder).to(device)
        fused = [module.fused_attn for module in encoder.modules() if hasattr(module, "fused_attn")]
        set_fused_attention(loaded, all(fused))  # two kernels differ in rounding
        expected, found = encoder(images), loaded(images)
    encoder.train(training)
    difference = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    if not difference <= 1e-5:
        raise RuntimeError(f"{folder}: the exported backbone's features differ from the trained ones by {difference}")
