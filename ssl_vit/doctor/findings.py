"""What would stop or spoil a run (problems) and what deserves a thought (warnings), each with what to do."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

from ssl_vit.data.augment.multicrop import MultiCropConfig
from ssl_vit.data.sources.source import Source
from ssl_vit.doctor.facts import Labels, as_size
from ssl_vit.doctor.images import Images, most_common_channels
from ssl_vit.models.encoder import Encoder
from ssl_vit.objectives.anchor import AnchorConfig
from ssl_vit.objectives.recipes import choose_num_prototypes
from ssl_vit.training.config import RunConfig

_MOST_UNREADABLE = 0.01  # share of the images
_MANY_DUPLICATES = 0.01
_MANY_SMALL = 0.1
_MANY_LONG = 0.01
_LONG = 3.0  # longer side over shorter one, measured against the input's shape
_FEW_IMAGES = 10_000
_FEW_TO_GO_ON = 100_000
_RATE_OF_FRESH_WEIGHTS = 5e-4  # DINO's for a batch of 256
_LARGE = 4.0  # times the input's shorter side
_LEAST_SIDE = 96  # pixels, three tokens of the backbones that are named
_LEAST_GRID = 3  # patches of a local crop's side
_MOST_ENLARGED = 4.0  # of the smallest local crops


def problems_of_images(config: RunConfig, images: Images, num_images: int, adopts: bool) -> Iterator[str]:
    """What about the images would stop or spoil a run.

    Args:
        num_images: of the whole source.
        adopts: whether the run takes the channels that were measured.
    """
    share = images.unreadable.count / images.num_read
    if not images.num_readable:
        reason = images.unreadable.examples[0].reason
        yield f"none of the {images.num_read:,} images that were looked at can be read; the first: {reason}"
    elif share > _MOST_UNREADABLE:
        yield (
            f"{share:.1%} of the images cannot be read, more than {_MOST_UNREADABLE:.0%}: "
            "remove them or fetch them again"
        )
    yield from config.notes(num_images)
    if images.num_readable and not adopts and images.num_channels != config.encoder.in_chans:
        yield (
            f"channels: the images hold {images.num_channels} channels and encoder.in_chans is "
            f"{config.encoder.in_chans}: use the settings above, a value of data.mean and data.std for each channel"
        )


def warnings_of_images(
    images: Images, labels: Labels | None, num_images: int, drops_duplicates: bool = False
) -> Iterator[str]:
    """What deserves a thought whatever is trained on the images."""
    read = images.num_readable
    if 0 < images.unreadable.count <= _MOST_UNREADABLE * images.num_read:
        yield f"unreadable: {_of(images.unreadable.count, images.num_read)}; remove them or fetch them again"
    more = "; a sample finds few of them, --sample all finds them all" if images.num_read < num_images else ""
    for name, duplicates, how in (
        ("duplicates", images.duplicates, "byte for byte the same as"),
        ("near-duplicates", images.near_duplicates, "nearly the same as"),
    ):
        if duplicates is not None and duplicates.count > _MANY_DUPLICATES * read and not drops_duplicates:
            yield (
                f"{name}: {_of(duplicates.count, read)} are {how} another one and count twice in training; "
                f"--data.drop_duplicates true leaves them out{more}"
            )
    pages = images.count(lambda held: held.pages > 1)
    if pages and any("of which the first is used" in text for text in images.dropped):
        tiffs = [held.pages for held in images.contents if held.format == "TIFF" and held.pages > 1]
        are = f"; if they are channels, --data.pages channels and {max(tiffs)} values in data.mean" if tiffs else ""
        yield (
            f"pages: {_of(pages, read)} hold several pages or frames, of which the first is used{are}; "
            "if each is an image, --data.pages images"
        )
    if deep := images.count(lambda held: held.bits == 16):
        yield (
            f"16 bits: {_of(deep, read)} have 16 bits a channel, of which the upper 8 are used; where "
            "what matters lies within a narrow range, stretch it to the whole one beforehand"
        )
    if constant := [str(number) for number, value in enumerate(images.pixels.std, start=1) if value == 0]:
        channels = "channels" if len(constant) > 1 else "channel"
        yield f"channels: every pixel has the same value in {channels} {', '.join(constant)}"
    if labels is not None and labels.num_classes == 1:
        yield (
            f"labels: all labelled images are of class {labels.largest.name!r}; that is no matter for learning, but "
            "scores need two classes: name other images in evaluation.source"
        )


def warnings_of_run(config: RunConfig, encoder: Encoder, images: Images, num_images: int) -> Iterator[str]:
    """What deserves a thought when a config's run is trained on the images, at least one of which can be read.

    Args:
        config: the settings as the user gave them, with `auto`.
        encoder: built from them, on any device.
    """
    if num_images < _FEW_IMAGES and config.encoder.pretrained is None:
        yield (
            f"few images: {num_images:,} are few to learn from scratch, for which {_FEW_IMAGES:,} are a modest number. "
            "Start from trained weights with --encoder.pretrained (docs/continue.md), or add unlabelled images of the "
            "same kind; fewer epochs do not help"
        )
    yield from _warnings_of_going_on(config, num_images)
    yield from _warnings_of_backbone(config, encoder, num_images)
    prototypes = getattr(config.objective, "num_prototypes", None)
    if isinstance(prototypes, int) and prototypes > 4 * (auto := choose_num_prototypes(num_images)):
        yield (
            f"prototypes: objective.num_prototypes {prototypes:,} are many for {num_images:,} images; auto would take "
            f"{auto:,}"
        )
    at_once, least = config.batch.size // config.batch.num_micro(1), getattr(config.objective, "least_at_once", 0)
    if at_once < least:
        yield (
            "micro-batch: the loss takes a statistic over the images that are computed at once on all devices, "
            f"{at_once} on one device, and {least} are the fewest with which it is known to learn; raise "
            "batch.size and batch.per_device (a smaller encoder or fewer local crops need less memory), or use more "
            "devices"
        )
    yield from _warnings_of_sizes(images, encoder, is_trained=config.encoder.pretrained is not None)
    if config.data.tile_size is None:
        yield from _warnings_of_large(images, encoder)
    yield from _warnings_of_local_crops(config, images, encoder)
    if config.encoder.in_chans == 3 and suggested_channels(config, images) == 1:
        yield (
            "greyscale: no image that was read has colour, and encoder.in_chans is 3; with 1 the same is learned "
            "from a third of the input: the settings above are for that"
        )
    yield from _warnings_of_normalisation(config, images)


def _warnings_of_going_on(config: RunConfig, num_images: int) -> Iterator[str]:
    """What spoils weights that a run starts from; docs/continue.md says why, and what was measured."""
    if config.encoder.pretrained is None:
        return
    peak = 0.0 if config.optim.base_lr == "auto" else config.optim.peak_lr(config.batch.size)  # auto's suits them
    if peak >= _RATE_OF_FRESH_WEIGHTS:
        yield (
            f"continuing: a peak rate of {peak:.1e} suits fresh weights, and undoes what trained ones know; a tenth of "
            f"the recipe from scratch is usual: lower optim.base_lr, which is {config.optim.base_lr:g}"
        )
    if not config.optim.freeze_backbone_until:
        yield (
            "continuing: heads and decoders are fresh, and their first gradients mean nothing to trained weights: "
            "--optim.freeze_backbone_until 0.1 --optim.unfreeze_ramp 0.02 lets them learn first"
        )
    if isinstance(config.objective, AnchorConfig) and config.objective.anchor == "none" and num_images < _FEW_TO_GO_ON:
        yield (
            f"continuing: {num_images:,} images teach little and may undo much: --objective.anchor gram keeps the "
            "backbone near to its start, and evaluation.every_steps shows whether it gains"
        )


def _warnings_of_backbone(config: RunConfig, encoder: Encoder, num_images: int) -> Iterator[str]:
    """Where another family of backbones would suit the data better; docs/backbones.md compares them."""
    has_crops = isinstance(config.objective, MultiCropConfig)
    knows_locality = not encoder.supports_keep  # neighbours are mixed before the blocks, so tokens cannot be dropped
    is_new = config.encoder.pretrained is None
    if num_images < _FEW_IMAGES and is_new and not knows_locality and min(encoder.image_size) >= _LEAST_SIDE:
        yield (
            f"backbone: {config.encoder.arch} has to learn that neighbouring pixels belong together, and "
            f"{num_images:,} images are few for that; ConvNeXt and hybrids know it: --encoder.arch convnext_tiny or "
            f"vit_small_r26_s32_224{'' if has_crops else ', with LeJEPA'}"
        )
    tokens = encoder.attention_length
    share = tokens / (tokens + 6 * encoder.embed_dim)  # of a block's operations
    if has_crops and share > 0.5:  # without crops most tokens are dropped
        yield (
            f"backbone: attention among {tokens:,} tokens takes {share:.0%} of the operations, and grows with the "
            "square of the pixels; Swin's grows linearly: --encoder.arch swin_tiny_patch4_window7_224"
        )


def _warnings_of_sizes(images: Images, encoder: Encoder, *, is_trained: bool) -> Iterator[str]:
    sizes, (height, width) = np.array(images.sizes), encoder.image_size
    small = int((sizes < (height, width)).any(axis=1).sum())
    if small > _MANY_SMALL * len(sizes):
        side = int(np.median(sizes.min(axis=1)))
        patch = next((patch for patch in (16, 8, 4, 2) if side // patch >= 8), None)
        hint = "larger images would suit it better"
        if is_trained:  # its patches are given
            smaller = max(side // max(encoder.stride), 4) * max(encoder.stride)
            hint = f"encoder.image_size {smaller} costs less" if smaller < max(height, width) else hint
        elif patch is not None and side // patch * patch < max(height, width):
            arch = " in a Vision Transformer" if "patch_size" in encoder.other_settings else ""
            hint = f"encoder.image_size {side // patch * patch} with encoder.patch_size {patch}{arch} would suit them"
        yield (
            f"small images: {_of(small, len(sizes))} are smaller than the input of {_pixels(encoder.image_size)} and "
            f"are enlarged to it; the shorter side is {side} at the median: {hint}"
        )
    stretch = np.abs(np.log(sizes[:, 1] / sizes[:, 0] * height / width))
    long = int((stretch > np.log(_LONG)).sum())
    if long > _MANY_LONG * len(sizes):
        shape = "square" if height == width else f"of {_pixels(encoder.image_size)}"
        yield (
            f"elongated images: {_of(long, len(sizes))} are more than {_LONG:g} times as long as the input's shape, "
            f"the most {np.exp(stretch.max()):.1f} times; crops are about {shape} and see a part of such an image: "
            "cut it into tiles (data.tile_size), or take an encoder.image_size of its shape"
        )


def _warnings_of_large(images: Images, encoder: Encoder) -> Iterator[str]:
    side, shorter = min(encoder.image_size), np.median(np.array(images.sizes).min(axis=1))
    if shorter >= _LARGE * side:
        # Random crops have 60 % of the area on average: of such tiles they keep the scale.
        tile, seen = 9 * side // 7, 20 * side / shorter
        yield (
            f"large images: the shorter side, {shorter:,.0f} pixels at the median, becomes {side}, and what is 20 "
            f"pixels wide becomes {seen:.2g}; if small things matter, --data.tile_size {tile} learns from tiles at the "
            "images' own scale (docs/tiles.md)"
        )


def _warnings_of_local_crops(config: RunConfig, images: Images, encoder: Encoder) -> Iterator[str]:
    objective = config.objective
    if not isinstance(objective, MultiCropConfig) or not objective.num_local_crops:
        return
    size, share = objective.local_size, objective.local_crop_scale[0]
    rows, columns = (side // patch for side, patch in zip(size, encoder.stride, strict=True))
    if min(rows, columns) < _LEAST_GRID:
        settable = "patch_size" not in encoder.other_settings
        yield (
            f"local crops: {_pixels(size)} are only {rows} x {columns} patches; raise objective.local_crop_size"
            + (" or lower encoder.patch_size" if settable else f", of which {as_size(encoder.stride)} pixels are one")
        )
    area = share * float(np.median(np.prod(images.sizes, axis=1)))
    enlarged = (size[0] * size[1] / area) ** 0.5
    if enlarged > _MOST_ENLARGED:
        yield (
            f"local crops: the smallest of an image of median size have {area:,.0f} pixels and are enlarged "
            f"{enlarged:.1f} times, to {_pixels(size)}; raise the lower end of objective.local_crop_scale, which is "
            f"{share:g}, or lower objective.local_crop_size"
        )


def _warnings_of_normalisation(config: RunConfig, images: Images) -> Iterator[str]:
    given, (mean, std) = config.data, normalisation(images)
    mean, std = mean[: len(given.mean)], std[: len(given.std)]  # all channels of grey images are the same
    if len(given.mean) != len(mean) or config.encoder.pretrained is not None:
        return  # a backbone wants the normalisation that it was trained with
    shift = np.abs(np.array(mean) - given.mean) / given.std
    stretch = np.array(std) / given.std
    if (shift > 0.5).any() or (stretch <= 2 / 3).any() or (stretch >= 1.5).any():
        yield (
            f"normalisation: data.mean {_numbers(given.mean)} and data.std {_numbers(given.std)} are far from what "
            "these images have; use the settings above"
        )


def channels_to_read(config: RunConfig, source: Source, rows: Int64[np.ndarray, " r"]) -> int:
    """The config's channels; if these are 3 by default and the images hold more than 4, as many as they hold."""
    if not _may_choose_channels(config):
        return config.encoder.in_chans
    held = most_common_channels(source, rows)
    return held if held is not None and held > 4 else 3


def suggested_channels(config: RunConfig, images: Images) -> int:
    """Channels that suit the images: those that were read, but 1 where images without colour would be tripled."""
    return 1 if _may_choose_channels(config) and images.is_grey else images.num_channels


def _may_choose_channels(config: RunConfig) -> bool:
    return config.encoder.in_chans == 3 and config.encoder.pretrained is None


def normalisation(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel as settings have them: four digits, and no deviation of 0."""
    pixels = images.pixels
    return tuple(round(value, 4) for value in pixels.mean), tuple(max(round(value, 4), 1e-4) for value in pixels.std)


def _of(count: int, total: int) -> str:
    return f"{count:,} of {total:,} images"


def _pixels(size: tuple[int, int]) -> str:
    return f"{as_size(size)} pixels"


def _numbers(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
