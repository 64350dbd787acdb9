"""What would stop or spoil a run, and what deserves a thought, in words that say what to do."""

import numpy as np
from jaxtyping import Int64

from ssl_vit.data.augment.multicrop import MultiCropConfig
from ssl_vit.data.sources.source import Source
from ssl_vit.doctor.images import LabelCounts, Pictures, held_channels
from ssl_vit.models.encoder import Encoder
from ssl_vit.objectives.recipes import choose_num_prototypes
from ssl_vit.training.config import RunConfig

MOST_UNREADABLE = 0.01  # share of the pictures
_MANY_DUPLICATES = 0.01
_MANY_SMALL = 0.1
_MANY_LONG = 0.01
_LONG = 3.0  # longer side over shorter one, measured against the input's shape
_FEW_IMAGES = 10_000
_LEAST_GRID = 3  # patches of a local crop's side
_MOST_ENLARGED = 4.0  # of the smallest local crops


def problems_of_pictures(pictures: Pictures) -> list[str]:
    """What about the pictures would stop or spoil any run."""
    if not pictures.num_readable:
        reason = pictures.unreadable[0].reason
        return [f"none of the {pictures.num_read:,} pictures that were looked at can be read; the first: {reason}"]
    share = pictures.num_unreadable / pictures.num_read
    if share > MOST_UNREADABLE:
        return [
            f"{share:.1%} of the pictures cannot be read, more than {MOST_UNREADABLE:.0%}: "
            "remove them or fetch them again"
        ]
    return []


def problems_of_size(config: RunConfig, num_images: int) -> list[str]:
    """A batch that the source cannot fill with different pictures."""
    if num_images >= config.batch.size:
        return []
    fits = 2 ** max(int(np.log2(num_images)) - 1, 0)
    return [
        f"{num_images:,} images are fewer than batch.size {config.batch.size}: a step would see the same picture more "
        f"than once; lower it, to {fits} for example"
    ]


def warnings_of_pictures(
    pictures: Pictures, labels: LabelCounts | None, num_images: int, drops_duplicates: bool = False
) -> list[str]:
    """What deserves a thought whatever is trained on the pictures."""
    found = []
    read = pictures.num_readable
    if 0 < pictures.num_unreadable <= MOST_UNREADABLE * pictures.num_read:
        found.append(f"unreadable: {_of(pictures.num_unreadable, pictures.num_read)}; remove them or fetch them again")
    kinds = {
        "duplicates": (pictures.repeats, "byte for byte the same as"),
        "near-duplicates": (pictures.near_repeats, "nearly the same as"),
    }
    more = "; a sample finds few of them, --sample all finds them all" if pictures.num_read < num_images else ""
    for name, (repeats, how) in kinds.items():
        if repeats is not None and repeats.count > _MANY_DUPLICATES * read and not drops_duplicates:
            found.append(
                f"{name}: {_of(repeats.count, read)} are {how} another one and count twice in training; "
                f"--data.drop_duplicates true leaves them out{more}"
            )
    pages = sum(count for held, count in pictures.contents.items() if held.pages > 1)
    if pages and any("of which the first is used" in text for text in pictures.dropped):
        tiffs = [held.pages for held in pictures.contents if held.format == "TIFF" and held.pages > 1]
        are = f"; if they are channels, --data.pages channels and {max(tiffs)} values in data.mean" if tiffs else ""
        found.append(
            f"pages: {_of(pages, read)} hold several pages or frames, of which the first is used{are}; "
            "if each is an image, --data.pages images"
        )
    deep = sum(count for held, count in pictures.contents.items() if held.bits == 16)
    if deep:
        found.append(
            f"16 bits: {_of(deep, read)} have 16 bits a channel, of which the upper 8 are used; where "
            "what matters lies within a narrow range, stretch it to the whole one beforehand"
        )
    constant = [number for number, value in enumerate(pictures.std, start=1) if value == 0]
    if constant:
        found.append(f"channels: every pixel has the same value in {_listed('channel', constant)}")
    if labels is not None and labels.num_classes == 1:
        found.append(
            f"labels: all labelled pictures are of class {labels.largest.name!r}; that is no matter for learning, but "
            "scores need two classes: name other pictures in evaluation.source"
        )
    return found


def warnings_of_run(config: RunConfig, encoder: Encoder, pictures: Pictures, num_images: int) -> list[str]:
    """What deserves a thought when a config's run is trained on the pictures, of which some can be read.

    Args:
        config: the settings as the user gave them, with `auto`.
        encoder: what they build, on whichever device.
    """
    found = []
    if num_images < _FEW_IMAGES and config.encoder.pretrained is None:
        found.append(
            f"few images: {num_images:,} are few to learn from scratch, for which {_FEW_IMAGES:,} are a modest number. "
            "Start from trained weights with --encoder.pretrained, or add unlabelled images of the same kind; fewer "
            "epochs do not help"
        )
    return [
        *found,
        *_prototypes(config, num_images),
        *_small(pictures, encoder),
        *_long(pictures, encoder),
        *_local_crops(config, pictures, encoder),
        *_channels(config, pictures),
        *_normalisation(config, pictures),
    ]


def _prototypes(config: RunConfig, num_images: int) -> list[str]:
    given = getattr(config.objective, "num_prototypes", None)
    if not isinstance(given, int):
        return []
    auto = choose_num_prototypes(num_images)
    if given <= 4 * auto:
        return []
    return [
        f"prototypes: objective.num_prototypes {given:,} are many for {num_images:,} images; auto would take {auto:,}"
    ]


def _small(pictures: Pictures, encoder: Encoder) -> list[str]:
    sizes, wanted = np.array(pictures.sizes), np.array(encoder.image_size)
    small = int((sizes < wanted).any(axis=1).sum())
    if small <= _MANY_SMALL * len(sizes):
        return []
    side = int(np.median(sizes.min(axis=1)))
    patch = next((patch for patch in (16, 8, 4, 2) if side // patch >= 8), None)
    hint = "larger pictures would suit it better"
    if patch is not None and side // patch * patch < wanted.max():
        hint = f"encoder.image_size {side // patch * patch} with encoder.patch_size {patch} would suit them"
    return [
        f"small pictures: {_of(small, len(sizes))} are smaller than the input of {_size(encoder.image_size)} and are "
        f"enlarged to it; the shorter side is {side} at the median: {hint}"
    ]


def _long(pictures: Pictures, encoder: Encoder) -> list[str]:
    sizes = np.array(pictures.sizes, dtype=float)
    height, width = encoder.image_size
    stretch = np.abs(np.log(sizes[:, 1] / sizes[:, 0] * height / width))
    long = int((stretch > np.log(_LONG)).sum())
    if long <= _MANY_LONG * len(sizes):
        return []
    shape = "square" if height == width else f"of {_size(encoder.image_size)}"
    return [
        f"elongated pictures: {_of(long, len(sizes))} are more than {_LONG:g} times as long as the input's shape, the "
        f"most {np.exp(stretch.max()):.1f} times; crops are about {shape} and see a part of such a picture: cut it "
        "into tiles, or take an encoder.image_size of its shape"
    ]


def _local_crops(config: RunConfig, pictures: Pictures, encoder: Encoder) -> list[str]:
    objective = config.objective
    if not isinstance(objective, MultiCropConfig) or not objective.num_local_crops:
        return []
    found = []
    size = objective.local_size
    rows, columns = (side // patch for side, patch in zip(size, encoder.patch_size, strict=True))
    if min(rows, columns) < _LEAST_GRID:
        found.append(
            f"local crops: {_size(size)} are only {rows} x {columns} patches; raise objective.local_crop_size or lower "
            "encoder.patch_size"
        )
    heights, widths = np.array(pictures.sizes).T
    share = objective.local_crop_scale[0]
    area = share * float(np.median(heights * widths))
    enlarged = (size[0] * size[1] / area) ** 0.5
    if enlarged > _MOST_ENLARGED:
        found.append(
            f"local crops: the smallest of a picture of median size have {area:,.0f} pixels and are enlarged "
            f"{enlarged:.1f} times, to {_size(size)}; raise the lower end of objective.local_crop_scale, which is "
            f"{share:g}, or lower objective.local_crop_size"
        )
    return found


def channels_to_read(config: RunConfig, source: Source, rows: Int64[np.ndarray, " r"]) -> int:
    """The config's channels, or as many as the images hold where it says 3 and they cannot be converted to these."""
    held = held_channels(source, rows) if config.encoder.in_chans == 3 and config.encoder.pretrained is None else None
    return held if held is not None and held > 4 else config.encoder.in_chans


def problems_of_channels(config: RunConfig, pictures: Pictures) -> list[str]:
    """Images of more channels than the config's run takes."""
    return [
        f"channels: the images hold {pictures.num_channels} channels and encoder.in_chans is "
        f"{config.encoder.in_chans}: use the settings above, a value of data.mean and data.std for each channel"
    ]


def suggested_channels(config: RunConfig, pictures: Pictures) -> int:
    """Channels that suit the pictures: those that were read, but one where pictures without colour would be tripled."""
    free = config.encoder.in_chans == 3 and config.encoder.pretrained is None
    return 1 if free and pictures.is_grey else pictures.num_channels


def normalisation(pictures: Pictures) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel as settings have them: four digits, and no deviation of 0."""
    return (
        tuple(round(value, 4) for value in pictures.mean),
        tuple(max(round(value, 4), 1e-4) for value in pictures.std),
    )


def _channels(config: RunConfig, pictures: Pictures) -> list[str]:
    if config.encoder.in_chans != 3 or suggested_channels(config, pictures) != 1:
        return []
    return [
        "greyscale: no picture that was read has colour, and encoder.in_chans is 3; "
        "with 1 the same is learned from a third of the input: the settings above are for that"
    ]


def _normalisation(config: RunConfig, pictures: Pictures) -> list[str]:
    given, (mean, std) = config.data, normalisation(pictures)
    mean, std = mean[: len(given.mean)], std[: len(given.std)]  # those of grey pictures are all the same
    if len(given.mean) != len(mean) or config.encoder.pretrained is not None:
        return []  # a backbone wants the normalisation that it was trained with
    shift = np.abs(np.array(mean) - given.mean) / given.std
    stretch = np.array(std) / given.std
    if (shift <= 0.5).all() and ((stretch > 2 / 3) & (stretch < 1.5)).all():
        return []
    return [
        f"normalisation: data.mean {_numbers(given.mean)} and data.std {_numbers(given.std)} are far from what these "
        "pictures have; use the settings above"
    ]


def _of(count: int, total: int) -> str:
    return f"{count:,} of {total:,} pictures"


def _size(size: tuple[int, int]) -> str:
    """Height and width as people say a size."""
    return f"{size[1]} x {size[0]} pixels"


def _numbers(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"


def _listed(what: str, numbers: list[int]) -> str:
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
