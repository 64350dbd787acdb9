"""Write and load the result of a run: a safetensors backbone with timm's key names, and its config.json."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import ssl_vit
from ssl_vit.core.manifest import hash_file
from ssl_vit.core.privacy import public
from ssl_vit.core.reading import entry, read_json, read_tensors, read_yaml
from ssl_vit.core.writing import (
    UNFINISHED,
    flush,
    fresh_folder,
    naming_full_disk,
    replace_folder,
    save_tensors,
    settle,
    write_json,
)
from ssl_vit.data.augment.evaluation import CROP_PCT
from ssl_vit.data.config import DataConfig
from ssl_vit.data.transform import Normalization
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.weights.proof import prove_equal

BACKBONE_FILE, CONFIG_FILE = "backbone.safetensors", "config.json"
TIMM_FILE = "model.safetensors"
"""Weights of a backbone in the folder that timm reads, and of a classifier."""
WEIGHTS_HASH = "weights_sha256"
"""Key in config.json's section "ssl_vit": SHA-256 of the weights file beside it."""


def export_backbone(
    encoder: Encoder,
    folder: Path,
    *,
    normalization: Normalization,
    provenance: dict[str, Any],
    crop_pct: float = CROP_PCT,
) -> Path:
    """Write `backbone.safetensors` and `config.json`, and prove that loading them gives the trained features.

    The tensors carry timm's key names, so `timm.create_model(arch, num_classes=0, checkpoint_path=...)` reads them.
    config.json follows timm's layout, with our own settings under "ssl_vit". See `write_pair`.

    Args:
        provenance: stored under "ssl_vit"; its "pooled" says which feature stands for an image (default: "cls").

    Raises:
        RuntimeError: the written files do not give the encoder's features.
    """
    described = describe(encoder, normalization=normalization, provenance=provenance, crop_pct=crop_pct)

    def prove(written: Path) -> None:
        prove_equal(encoder, encoder, encoder, load_backbone(written), tolerance=1e-5)

    return write_pair(folder, BACKBONE_FILE, encoder.model.state_dict(), described, prove)


def write_pair(
    folder: Path, name: str, tensors: dict[str, Tensor], described: dict[str, Any], prove: Callable[[Path], None]
) -> Path:
    """Write weights and the config.json that carries their SHA-256; returns the weights file.

    Both are written to a temporary folder, proven there and then moved. A new folder is renamed as a whole. In an
    existing one, such as a run's, config.json is moved first: after a kill between the two moves, `read_weights`
    refuses the pair, and the next export replaces it.

    Args:
        prove: called with the temporary folder.

    Raises:
        OSError: a file could not be written; names it. Existing files are unchanged.
    """
    is_new = not os.path.lexists(folder)
    place = folder.with_name(f"{UNFINISHED}{folder.name}") if is_new else folder / f"{UNFINISHED}export"
    with naming_full_disk(folder / name), fresh_folder(place) as unfinished:
        file, config_file = unfinished / name, unfinished / CONFIG_FILE
        save_tensors(tensors, file)
        described["ssl_vit"][WEIGHTS_HASH] = hash_file(file)
        write_json(config_file, described)
        prove(unfinished)
        settle(unfinished, like=config_file)
        if is_new:
            replace_folder(unfinished, folder)
        else:
            for written in (config_file, file):
                written.replace(folder / written.name)
            flush(folder)
    return folder / name


def describe(
    encoder: Encoder,
    *,
    normalization: Normalization,
    provenance: dict[str, Any],
    crop_pct: float = CROP_PCT,
) -> dict[str, Any]:
    """The content of config.json: timm's layout, with our own settings under "ssl_vit"."""
    config = encoder.config
    arguments, pooling = encoder.timm_arguments(provenance.get("pooled", "cls"))
    cfg = getattr(encoder.model, "pretrained_cfg", {})
    return {
        "architecture": config.arch.split(".")[0],
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": pooling,
        "model_args": {**arguments, "in_chans": encoder.in_chans},
        "pretrained_cfg": {
            "input_size": [encoder.in_chans, *encoder.image_size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": crop_pct,
            "crop_mode": "center",
            "mean": list(normalization.mean),
            "std": list(normalization.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": cfg.get("first_conv"),
            "classifier": cfg.get("classifier"),
        },
        "ssl_vit": {
            "version": ssl_vit.__version__,
            "encoder": {key: public(value) for key, value in asdict(config).items() if key != "grad_checkpointing"},
            "torch": torch.__version__,
            "timm": timm.__version__,
            **public(provenance),
        },
    }


def load_backbone(path: str | Path) -> Encoder:
    """Build an exported encoder and load its weights, strictly.

    Args:
        path: a run folder, a folder with backbone.safetensors and config.json, or the safetensors file in it.

    Returns:
        the encoder in eval mode, with the `pretrained_cfg` that timm's own models have.

    Raises:
        ValueError: a file is missing or unreadable, or its tensors are not exactly those of the architecture.
    """
    file = backbone_file(path)
    config, tensors = read_encoder_config(file.parent), read_tensors(file, links=True)
    check_sizes(lambda: config.build().model, tensors, file)
    encoder = config.build()
    load_strictly(encoder.model, tensors, file)
    _check_pair(file)
    # What timm.data.resolve_model_data_config reads of a model: size, normalisation and crop.
    encoder.pretrained_cfg = read_config(file.parent).get("pretrained_cfg", {})
    return encoder.eval()


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of an export.

    Raises:
        ValueError: they are damaged, or not the weights that the config.json beside them was written with.
    """
    tensors = read_tensors(file, links=True)
    _check_finite(tensors, file)
    _check_pair(file)
    return tensors


def _check_pair(file: Path) -> None:
    """Compare weights with the SHA-256 in the config.json beside them; exports of early versions have none."""
    noted = read_config(file.parent)["ssl_vit"].get(WEIGHTS_HASH)
    if noted is not None and noted != hash_file(file, links=True):
        raise ValueError(
            f"{file}: holds other weights than {file.parent / CONFIG_FILE} was written with (its SHA-256 differs): an "
            "export was cut short or a file has changed; export again"
        )


def check_sizes(build: Callable[[], nn.Module], tensors: dict[str, Tensor], file: Path) -> None:
    """Refuse weights that do not fit a module, before memory is allocated for it."""
    with torch.device("meta"):
        _check_fit(build(), tensors, file)


def backbone_file(path: str | Path) -> Path:
    """The safetensors file of a backbone, given the file or its folder, which may be an export to timm.

    Raises:
        ValueError: there is no such file.
    """
    path = Path(path)
    file = path / BACKBONE_FILE if path.is_dir() else path
    if file.is_file():
        return file
    timms = file.with_name(TIMM_FILE)
    if own_file(timms) is None:
        why = "a finished pre-training has one, and `ssl-vit export RUN` writes it at any time"
        if timms.is_file() and _num_classes(file.parent):
            why = f"{timms} is a fine-tuned classifier, which timm loads: local-dir:{file.parent}"
        raise ValueError(f"{file}: no such file; {why}")
    if not path.is_dir():
        raise ValueError(f"{file}: no such file; name {timms}, which holds the backbone")
    return timms


def own_file(path: Path) -> Path | None:
    """The weights of a backbone that we exported, also for timm, given the file or its folder; None for all others."""
    files = [path / BACKBONE_FILE, path / TIMM_FILE] if path.is_dir() else [path]
    for file in filter(Path.is_file, files):
        if file.name == BACKBONE_FILE or (file.name == TIMM_FILE and _num_classes(file.parent) == 0):
            return file
    return None


def _num_classes(folder: Path) -> int | None:
    """Classes of what we exported to a folder, 0 for a backbone; None where we did not."""
    try:
        return entry(read_config(folder), "num_classes", int, folder / CONFIG_FILE)
    except ValueError:
        return None


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json next to a backbone.

    Raises:
        ValueError: it is missing, is no JSON, or was not written by ssl_vit.
    """
    file = folder / CONFIG_FILE
    config = read_description(file)
    own = config.get("ssl_vit")
    if not isinstance(own, dict) or not isinstance(own.get("encoder"), dict):
        raise ValueError(f"{file}: has no ssl_vit.encoder section; it was not written by ssl_vit's export")
    return config


def read_normalisation(config: dict[str, Any], file: Path) -> tuple[Normalization, float]:
    """Normalisation and centre crop's share, from the config.json beside a backbone."""
    cfg = {"crop_pct": CROP_PCT, **entry({"pretrained_cfg": config, **config}, "pretrained_cfg", dict, file)}
    mean, std = (tuple(entry(cfg, name, list[float], file)) for name in ("mean", "std"))
    try:
        DataConfig(mean=mean, std=std)
    except ValueError as error:
        raise ValueError(f"{file}: pretrained_cfg.{error}") from error
    return Normalization(mean, std), entry(cfg, "crop_pct", float, file)


def own_source(folder: Path, *, asked: bool) -> str | dict[str, float] | None:
    """The source of a backbone's training images: from the run's settings beside it, else from its export.

    Raises:
        ValueError: see `check_asked`.
    """
    settings = folder / "config.yaml"
    if os.path.lexists(settings):
        source = entry(read_yaml(settings), "data.source", str | dict[str, float], settings)
    else:
        source = place_of(read_config(folder)["ssl_vit"].get("source"))
    if source is not None:
        check_asked(source, folder, asked=asked)
    return source


def check_asked(source: str | dict[str, float], folder: Path, *, asked: bool) -> None:
    """Refuse to open a source that a folder names unless the user asked for it: a stranger may have named it.

    Raises:
        ValueError: the user did not ask, and the source does not come with this package.
    """
    if not asked and source != "openmoji":
        what = f"{folder} names it, and a stranger's settings open nothing unasked; --open_source true opens it"
        raise ValueError(f"data.source={source!r}: {what}")


def place_of(source: Any) -> str | dict[str, float] | None:
    """The source that an export names; None where it holds only the last part of a local folder's path."""
    names = source if isinstance(source, dict) else [source]
    is_told = all(isinstance(name, str) and ("/" in name or name == "openmoji") for name in names)
    return source if is_told else None


def read_description(file: Path) -> dict[str, Any]:
    """The JSON object in a file that describes the weights beside it.

    Raises:
        ValueError: it is missing, or holds no JSON object.
    """
    try:
        return read_json(file, links=True)
    except OSError as error:
        raise ValueError(
            f"{file}: cannot be read ({error.strerror}); a backbone needs its {file.name} beside it"
        ) from error


def read_encoder_config(folder: Path) -> EncoderConfig:
    """Architecture and sizes from the config.json next to a backbone."""
    described = read_config(folder)["ssl_vit"]["encoder"]
    try:
        return EncoderConfig.from_plain(described)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: ssl_vit.encoder.{error}") from error


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    """Load exactly the tensors that a module has; else list what is missing, unexpected or of another shape or dtype.

    Raises:
        ValueError: names, shapes or dtypes are not the module's, or a value is not finite.
    """
    _check_fit(module, tensors, file)
    _check_finite(tensors, file)
    module.load_state_dict(tensors)


def _check_finite(tensors: dict[str, Tensor], file: Path) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise ValueError(f"{file}: {name} holds NaN or infinity; weights of an earlier checkpoint may be whole")


def _check_fit(module: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    wanted = module.state_dict()
    shared = sorted(wanted.keys() & tensors.keys())
    problems = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(wanted[name].shape)}"
            for name in shared
            if tensors[name].shape != wanted[name].shape
        ],
        "of a dtype that weights do not have": [
            f"{name} {str(tensors[name].dtype).removeprefix('torch.')}"
            for name in shared
            if tensors[name].is_floating_point() != wanted[name].is_floating_point()
        ],
    }
    parts = [
        f"{len(names)} {problem}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for problem, names in problems.items()
        if names
    ]
    if parts:
        raise ValueError(f"{file}: does not fit {type(module).__name__}: {'; '.join(parts)}")
