"""A backbone as an archive of torch.export, which runs without timm and ssl_vit, for any number of images."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ssl_vit.core.writing import write_json
from ssl_vit.export.graph import StaticBackbone
from ssl_vit.models.encoder import Features
from ssl_vit.runs.trained import Trained

LIBRARY = "pytorch"
LOADING_CODE = """\
import torch

model = torch.export.load("model.pt2").module()
images = torch.randn(1, {in_chans}, {height}, {width})  # normalised as config.json says
with torch.inference_mode():
    cls, patches = model(images)
features = {feature}  # one vector an image
"""


def write(trained: Trained, folder: Path) -> str:
    """Write `model.pt2`, and `config.json` with sizes and normalisation."""
    images = torch.randn(2, trained.encoder.in_chans, *trained.encoder.image_size)
    program = torch.export.export(
        StaticBackbone(trained.encoder), (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names the folders of whoever exported it
    archive = io.BytesIO()
    torch.export.save(program, archive)
    (folder / "model.pt2").write_bytes(archive.getvalue())  # torch's own writer ends the process on a full disk
    write_json(folder / "config.json", trained.described())
    return LOADING_CODE


def load(folder: Path) -> Callable[[Tensor], Features]:
    """Load the archive in torch."""
    model = torch.export.load(folder / "model.pt2").module()

    def encode(images: Tensor) -> Features:
        return Features(*model(images))

    return encode
