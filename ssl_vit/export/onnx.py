"""A backbone as an ONNX graph, for any number of images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_vit.core.writing import write_json
from ssl_vit.export.graph import StaticBackbone
from ssl_vit.models.encoder import Features
from ssl_vit.runs.trained import Trained

LIBRARY = "onnx"
LOADING_CODE = """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
images = np.random.randn(1, {in_chans}, {height}, {width}).astype(np.float32)  # normalised as config.json says
cls, patches = session.run(["cls", "patches"], {{"images": images}})
features = {feature}  # one vector an image
"""
_LARGEST_SINGLE_FILE = 1_900_000_000  # bytes; ONNX's own format ends at 2 GiB


def write(trained: Trained, folder: Path) -> str:
    """Write `model.onnx`, and `config.json` with sizes and normalisation."""
    model, images = (
        StaticBackbone(trained.encoder),
        torch.randn(2, trained.encoder.in_chans, *trained.encoder.image_size),
    )
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["cls", "patches"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # names the folders of whoever exported it
    program.save(folder / "model.onnx", external_data=size > _LARGEST_SINGLE_FILE)
    write_json(folder / "config.json", trained.described())
    return LOADING_CODE


def load(folder: Path) -> Callable[[Tensor], Features]:
    """Load the graph in onnxruntime, once onnx has checked it."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(folder / "model.onnx"))
    session: Any = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def encode(images: Tensor) -> Features:
        cls, patches = session.run(["cls", "patches"], {"images": images.numpy()})
        return Features(torch.from_numpy(cls), torch.from_numpy(patches))

    return encode
