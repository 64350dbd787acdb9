"""Export to a library: write, load through the library, prove equal, and only then move into place."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.core.privacy import public
from ssl_vit.core.settings import renamed_settings
from ssl_vit.core.text import code
from ssl_vit.core.writing import UNFINISHED, fresh_folder, naming_full_disk, replace_folder, restore_folder, settle
from ssl_vit.data.augment.device import normalize
from ssl_vit.data.augment.evaluation import centre_crop
from ssl_vit.data.sources.stream import Stream, open_images
from ssl_vit.export import onnx, timm, torch_export, torchvision, transformers
from ssl_vit.export.card import write_card
from ssl_vit.export.graph import timm_code
from ssl_vit.models.encoder import Features
from ssl_vit.models.vit import set_fused_attention
from ssl_vit.models.weights.proof import largest_difference
from ssl_vit.objectives.mae import MAE
from ssl_vit.runs.trained import Trained, data_settings

_NUM_IMAGES = 3


class Exported(NamedTuple):
    """What an export wrote."""

    folder: Path
    difference: float
    """Largest difference of a feature from the trained backbone's."""


class Proof(NamedTuple):
    """Images that an export is proven on."""

    images: Float[Tensor, "b c h w"]
    """Normalised."""
    name: str
    """Of the images, as Markdown."""
    why: str = ""
    """Why no training images could be used; empty where they were, or where the user named others."""


class Target(NamedTuple):
    """A library: how to write a folder that it reads, and how to compare what it computes."""

    library: str
    """Its name on the Hugging Face hub."""
    write: Callable[[Trained, Path], str]
    """Writes the folder; returns Python that loads it from within, for `fill_in`."""
    prove: Callable[[Trained, Path, Tensor], float]
    """Largest difference from the trained backbone, on normalised images; RuntimeError above the tolerance."""
    needs: tuple[str, ...] = ()
    """Packages beyond the core installation."""


def export_to(
    trained: Trained, target: str, out: Path, proof: Proof, *, license: str = "unknown", overwrite: bool = False
) -> Exported:
    """Export to the folder OUT/TARGET: written to a temporary folder, proven there, then renamed.

    Raises:
        ValueError: the library has no such architecture or is not installed, or the folder exists.
        RuntimeError: the library does not give the trained features from it. Nothing is left behind.
    """
    library, write, prove, needs = TARGETS[target]
    missing = [name for name in needs if find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)}: not installed; pip install 'ssl-vit[export]' brings all")
    folder = out / target
    restore_folder(folder)
    if os.path.lexists(folder) and not overwrite:
        raise ValueError(f"{folder}: is there already; choose another --out, or --overwrite it")
    with naming_full_disk(folder), fresh_folder(out / f"{UNFINISHED}{target}") as unfinished:
        code = write(trained, unfinished)
        difference = prove(trained, unfinished, proof.images)
        text = write_card(
            trained,
            library=library,
            loading_code=fill_in(code, trained),
            difference=difference,
            proved_on=proof.name,
            license=license,
        )
        (unfinished / "README.md").write_text(text)
        settle(unfinished, like=unfinished / "README.md")
        replace_folder(unfinished, folder)
    return Exported(folder, difference)


def fill_in(loading_code: str, trained: Trained) -> str:
    """The loading code of a library with a backbone's sizes, and with the feature that it was scored by."""
    encoder = trained.encoder
    height, width = encoder.image_size
    feature = "cls" if trained.feature == "cls" else "patches.mean(1)"
    # Distilled models give the mean of their two tokens, hierarchical ones what `cls` is.
    gives_feature = trained.feature == (trained.pooled if encoder.has_cls_token else "cls")
    is_timms_own = gives_feature and not hasattr(encoder.model, "dist_token")
    return loading_code.format(
        in_chans=encoder.in_chans,
        height=height,
        width=width,
        num_prefix=getattr(encoder.model, "num_prefix_tokens", 0),
        feature=feature,
        timm_code="\n    ".join(timm_code(encoder)),
        timm_feature="model(images)" if is_timms_own else feature,
    )


@torch.inference_mode()
def compare(trained: Trained, encode: Callable[[Tensor], Features], images: Float[Tensor, "b c h w"]) -> float:
    """Largest difference between a library's features and the trained backbone's, for several images and for one.

    Raises:
        RuntimeError: it is above the tolerance.
    """
    set_fused_attention(trained.encoder, True)
    difference = 0.0
    for batch in (images, images[:1]):
        pairs = zip(trained.encoder(batch), encode(batch), strict=True)
        difference = max(difference, *(largest_difference(*pair) for pair in pairs))
    return difference


@torch.inference_mode()
def compare_mae(
    trained: Trained,
    reconstruct: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    images: Float[Tensor, "b c h w"],
) -> float:
    """Largest difference between the patches that both models predict from the same visible ones.

    Raises:
        RuntimeError: it is above the tolerance.
    """
    mae = trained.objective
    assert isinstance(mae, MAE)
    noise = torch.rand(len(images), trained.encoder.num_patches, generator=torch.Generator().manual_seed(0))
    found, masked = reconstruct(images, noise)
    keep = torch.stack([row.logical_not().nonzero()[:, 0] for row in masked])
    set_fused_attention(mae, True)
    return largest_difference(mae.reconstruct(images, keep), found)


def proof_images(trained: Trained, source: str | None = None, *, asked: bool = False) -> Proof:
    """A few images of `source` or of the training images; generated ones where the latter cannot be opened.

    Args:
        asked: see `check_asked`.

    Raises:
        ValueError: `source` is named and cannot be opened.
    """
    encoder, why = trained.encoder, ""
    try:
        with renamed_settings({"data.source": "--images"} if source is not None else {}):
            opened = open_images(data_settings(trained, source, asked=asked))
        if isinstance(opened, Stream):
            decoded = opened.first_images(_NUM_IMAGES, encoder.in_chans)
        else:
            rows = torch.linspace(0, len(opened) - 1, min(_NUM_IMAGES, len(opened))).long().tolist()
            # A bad image is replaced by the next good one; each appears once.
            found = {at: image for image, at in (opened.next_image(row, encoder.in_chans) for row in rows)}
            decoded = list(found.values())
        images = torch.stack([centre_crop(image, encoder.image_size, trained.crop_pct) for image in decoded])
        name = f"{len(images)} images of {code(public(opened.name))}"
    except ValueError as error:
        if source is not None:
            raise
        coarse = torch.rand(_NUM_IMAGES, encoder.in_chans, 8, 8, generator=torch.Generator().manual_seed(0))
        smooth = F.interpolate(coarse, encoder.image_size, mode="bicubic").clamp(0, 1)
        images, name, why = (255 * smooth).to(torch.uint8), f"{_NUM_IMAGES} generated images", str(error)
    return Proof(normalize(images, trained.normalization), name, why)


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload an exported folder to the Hugging Face hub; returns the address.

    Raises:
        ValueError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from ssl_vit")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(f"--push_to_hub {repo}: {' '.join(str(error).split())}; {folder} is written") from error
    return address


def _prove_features(load: Callable[[Path], Callable[[Tensor], Features]]) -> Callable[[Trained, Path, Tensor], float]:
    return lambda trained, folder, images: compare(trained, load(folder), images)


def _prove_mae(trained: Trained, folder: Path, images: Tensor) -> float:
    return compare_mae(trained, transformers.load_mae(folder), images)


def _target(module: Any, *needs: str) -> Target:
    return Target(module.LIBRARY, module.write, _prove_features(module.load), needs)


TARGETS = {
    "timm": _target(timm),
    "transformers": _target(transformers, "transformers"),
    "transformers_mae": Target(transformers.LIBRARY, transformers.write_mae, _prove_mae, ("transformers",)),
    "torchvision": _target(torchvision),
    "onnx": _target(onnx, "onnx", "onnxscript", "onnxruntime"),
    "torch_export": _target(torch_export),
}
