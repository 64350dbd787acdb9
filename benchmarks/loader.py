"""Input of MAE and DINO, decoded or from the cache, beside the papers' Pillow pipelines (torchvision's transforms)."""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from benchmarks.flags import add_number
from benchmarks.rounds import alternate, machine, ratio_lines, ratios, synchronize
from ssl_vit.data.augment.multicrop import MultiCropConfig
from ssl_vit.data.decoded import open_decoded
from ssl_vit.data.sources.source import DataConfig, Source, open_source
from ssl_vit.data.transform import InputSpec, Normalization, Transform
from ssl_vit.objectives.mae import MAEConfig

HELP = "images per second and core of the input of MAE and DINO, beside the papers' in Pillow"
as_lines = ratio_lines
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="a folder of images")
    add_number(parser, "--num_images", 1, 64, "images of a round")
    add_number(parser, "--num_local_crops", 0, 8, "local crops of DINO")


def measure(args: argparse.Namespace, settings: list[str]) -> dict:
    torch.set_num_threads(1)  # rates are those of one core
    return compare_loader(
        args.data, num_images=args.num_images, num_local_crops=args.num_local_crops, rounds=args.rounds
    )


class PillowBlur:
    """Gaussian blur with a probability, as DINO's code applies it."""

    def __init__(self, prob: float) -> None:
        self.prob = prob

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.prob:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def pillow_views(num_local_crops: int) -> list[T.Compose]:
    """The paper's transform of each view (Caron et al. 2021, appendix; the values are those of its code)."""

    def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> T.Compose:
        steps = [
            T.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(0.5),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            PillowBlur(blur),
            *([T.RandomSolarize(128, p=solarize)] if solarize else []),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
        return T.Compose(steps)

    locals_ = [view(96, (0.05, 0.4), 0.5, 0.0)] * num_local_crops
    return [view(224, (0.4, 1.0), 1.0, 0.0), view(224, (0.4, 1.0), 0.1, 0.2), *locals_]


def pillow_mae() -> T.Compose:
    """The transform of MAE's pre-training (He et al. 2022, appendix; the values are those of its code)."""
    steps = [
        T.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
        T.RandomHorizontalFlip(0.5),
        T.ToTensor(),
        T.Normalize(MEAN, STD),
    ]
    return T.Compose(steps)


def compare_loader(
    folder: str, *, num_images: int = 64, batch_size: int = 16, rounds: int = 5, num_local_crops: int = 8
) -> dict:
    """Images per second of one process, for MAE and DINO: the paper's pipeline, ours up to the crops, and ours whole.

    Ours both as each image is decoded and as it comes from the decoded cache, 256 pixels.

    Args:
        folder: a folder of images.
        num_images: images of a round.
        batch_size: images that are flipped, coloured and normalised at once, on this device.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    if not paths:
        raise ValueError(f"--data={folder}: holds no .jpg or .png file")
    paths = [paths[row % len(paths)] for row in range(num_images)]
    data = DataConfig(source=folder, label_column="none", cache="ram", cache_side=256)
    source = open_source(data)
    source = source.subset(np.arange(min(num_images, len(source))))
    cached = open_decoded(source, data, 3)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipelines = {
        "MAE": ([pillow_mae()], MAEConfig()),
        "DINO": (pillow_views(num_local_crops), MultiCropConfig(num_local_crops=num_local_crops)),
    }
    rates: dict[str, list[float]] = {}
    found: dict[str, dict] = {}
    for name, (views, config) in pipelines.items():
        transform: Transform = config.build_transform(InputSpec((224, 224), (16, 16), Normalization(MEAN, STD)))
        contenders = {"paper (Pillow)": _pillow(paths, views)}
        contenders |= _own(len(paths), source, transform, batch_size, device)
        of_cache = _own(len(paths), cached, transform, batch_size, device)
        contenders |= {f"{kind}, cache": work for kind, work in of_cache.items()}
        own = alternate({f"{name}: {key}": work for key, work in contenders.items()}, rounds)
        rates |= own
        found |= {key: vars(ratio) for key, ratio in ratios(own, f"{name}: paper (Pillow)").items()}
    return {
        "what": f"one crop (MAE) and 2 + {num_local_crops} (DINO) of {num_images} images in one process",
        "rates": rates,
        "ratios": found,
        "machine": machine(),
    }


def _pillow(paths: list[Path], views: list[T.Compose]) -> Callable[[], int]:
    def work() -> int:
        for path in paths:
            with Image.open(path) as image:
                rgb = image.convert("RGB")
            for view in views:
                view(rgb)
        return len(paths)

    return work


def _own(
    num_images: int, source: Source, transform: Transform, batch_size: int, device: torch.device
) -> dict[str, Callable[[], int]]:
    def sample(row: int) -> dict[str, torch.Tensor]:
        return transform(source.image(row % len(source), 3), np.random.default_rng(row))

    def crops() -> int:
        for row in range(num_images):
            sample(row)
        return num_images

    def whole() -> int:
        for start in range(0, num_images, batch_size):
            samples = [sample(row) for row in range(start, min(start + batch_size, num_images))]
            batch = {name: torch.stack([item[name] for item in samples]) for name in samples[0]}
            transform.on_device(batch, device)
        synchronize()
        return num_images

    return {"crops alone": crops, f"whole, colours on {device.type}": whole}
