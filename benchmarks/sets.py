"""Make the sets of images that the lists in `benchmarks/lists` name, beside what is there already.

python -m benchmarks.sets --cifar10 cifar10/train.parquet --photos FOLDER

cifar10_parts/first_N.parquet: the first rows of CIFAR-10, for growth_*.yaml. auto/openmoji_grey.parquet,
photos_left.parquet and photos_right.parquet: images that no search has seen, for auto_*.yaml.
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from ssl_vit.data.sources import openmoji

PARTS = (1_000, 5_000, 20_000)
LEFT = 0.6
"""Share of a photograph's width that is learned from; the rest judges."""
CROPS = {"photos_left": 24, "photos_right": 8}
SIDE = 64


def write_parts(table: Path, folder: Path) -> None:
    """The first rows of a table, as files of their own.

    Raises:
        ValueError: it is missing, or has fewer rows than the largest part.
    """
    if not table.is_file():
        raise ValueError(f"--cifar10 {table}: no such file")
    rows = Dataset.from_parquet(str(table))
    if len(rows) < max(PARTS):
        raise ValueError(f"--cifar10 {table}: has {len(rows):,} rows; the parts need {max(PARTS):,}")
    for count in PARTS:
        rows.select(range(count)).to_parquet(folder / f"first_{count}.parquet")


def write_grey_emoji(path: Path) -> None:
    """Emoji of the nine groups of Unicode without their colours."""
    rows = openmoji.load().cast_column("image", ImageFeature())
    rows = rows.filter(lambda label: label >= 0, input_columns="label")
    images = [image.convert("L").convert("RGB") for image in rows["image"]]
    _write(list(zip(images, rows["label"], strict=True)), path)


def write_halves(photos: Path, folder: Path) -> None:
    """Random squares from the left and the right of each photograph, whose label is its place in the list of names.

    Raises:
        ValueError: the folder has no JPEG.
    """
    paths = sorted(path for path in photos.glob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise ValueError(f"--photos {photos}: has no file NAME.jpg")
    generator = np.random.default_rng(0)
    rows: dict[str, list[tuple[Image.Image, int]]] = {name: [] for name in CROPS}
    for label, path in enumerate(paths):
        with Image.open(path) as opened:
            photo = ImageOps.exif_transpose(opened).convert("RGB")
        border = int(photo.width * LEFT)
        boxes = ((0, 0, border, photo.height), (border, 0, photo.width, photo.height))
        for (name, count), box in zip(CROPS.items(), boxes, strict=True):
            half = photo.crop(box)
            rows[name] += [(_random_square(half, generator), label) for _ in range(count)]
    for name, found in rows.items():
        _write(found, folder / f"{name}.parquet")


def _random_square(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A square of 40 to 90 % of the shorter side, resized."""
    side = int(min(image.size) * generator.uniform(0.4, 0.9))
    x, y = (int(generator.integers(0, length - side + 1)) for length in image.size)
    return image.crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _write(rows: list[tuple[Image.Image, int]], path: Path) -> None:
    images, labels = zip(*rows, strict=True)
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    Dataset.from_dict({"image": list(images), "label": list(labels)}, features=features).to_parquet(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the sets of images that the benchmarks' lists name.")
    parser.add_argument("--cifar10", type=Path, help="parquet file of CIFAR-10's training images: makes cifar10_parts/")
    parser.add_argument("--photos", type=Path, help="folder of JPEG photographs: makes their halves in auto/")
    args = parser.parse_args()
    Path("auto").mkdir(exist_ok=True)
    try:
        if args.cifar10:
            Path("cifar10_parts").mkdir(exist_ok=True)
            write_parts(args.cifar10, Path("cifar10_parts"))
        if args.photos:
            write_halves(args.photos, Path("auto"))
        write_grey_emoji(Path("auto/openmoji_grey.parquet"))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
