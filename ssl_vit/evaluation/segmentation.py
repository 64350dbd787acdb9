"""Linear segmentation on frozen patch tokens, scored by mean intersection over union.

As in Oquab et al., "DINOv2" (2023, section 7.4): a batch norm and a linear layer turn patch tokens into a small map of
classes, which is enlarged to the mask's size. Heads of several learning rates are trained on the same batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ssl_vit.core.distributed import process_index
from ssl_vit.core.schedules import warmup_cosine
from ssl_vit.core.settings import check_given, check_ranges
from ssl_vit.core.text import plain
from ssl_vit.data.augment.evaluation import EvalTransform
from ssl_vit.data.loader import reading
from ssl_vit.data.sampler import SampleKey, StepSampler, sample_rng
from ssl_vit.data.workers import CurrentRows, in_workers, leave_signals_to_the_main_process
from ssl_vit.evaluation.command import (
    Backbone,
    PicturesConfig,
    data_config,
    naming_own,
    naming_test,
    tell_notes,
    write_result,
)
from ssl_vit.evaluation.features import EncodeSettings
from ssl_vit.evaluation.left_out import refuse
from ssl_vit.evaluation.masks import MaskedSource, Problems, centre_pair, hold_out, open_masked, random_pair
from ssl_vit.evaluation.scores import lay_out
from ssl_vit.evaluation.splits import PICK_FOLDS, TEST_FOLDS, check_apart


@dataclass(frozen=True)
class SegmentationConfig(PicturesConfig):
    """Linear segmentation."""

    batch_size: int = 16
    """Images of a step."""
    test_source: str | dict[str, float] | None = None
    """Images to test on; `null` = a held-out fifth of the source."""
    test_split: str | None = None
    """Split of the test source; `null` = that of the source. Given alone, it is one of the source."""
    mask_column: str | None = None
    """Column that holds the masks; found where there is exactly one further column of images."""
    mask_source: str | None = None
    """Folder of masks with the names of the images, where images are a folder."""
    test_mask_source: str | None = None
    """Folder of the test images' masks."""
    ignore_index: int = 255
    """Value of pixels that belong to no class."""
    num_layers: int = 1
    """Last blocks whose patch tokens are concatenated: 1 or, in DINOv2's larger setting, 4. Of Swin and ConvNeXt at
    most those of the last stage."""
    steps: int = 2000
    """Optimizer steps."""
    base_lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Learning rates of AdamW, each with a head of its own; the best is picked on a held-out part of the source."""
    baselines: tuple[str, ...] = ("untrained",)
    """Baselines shown beside the backbone: untrained (the architecture with fresh weights)."""
    seed: int = 0
    """Seed of everything random."""
    output: str | None = None
    """JSON file to write; `null` = segmentation.json beside the backbone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_given(self, "base_lrs")
        check_ranges(self, num_layers="[1, inf)", steps="[1, inf)", seed="[0, inf)", base_lrs="(0, inf)")
        for name in self.baselines:
            if name != "untrained":
                raise ValueError(f"baselines={self.baselines!r}: no {name!r}; there is untrained")


class Segmentation(NamedTuple):
    """How well pixels are classified. Shares, not percent."""

    miou: float
    """Mean over the classes of intersection over union; classes that are neither present nor predicted do not count."""
    low: float
    high: float
    """Ends of the 95 % interval of the mean IoU, by bootstrap over the images."""
    pixel_accuracy: float
    iou: dict[int, float]
    """Intersection over union of each class."""
    base_lr: float
    """Learning rate of the head that was picked."""
    held_out: dict[float, float]
    """Mean IoU of each head on the part that it was picked on."""
    n: int
    """Images that were tested: those whose crop holds a pixel of a class."""


def pixel_counts(
    predictions: Int64[Tensor, "h w"], mask: Int64[Tensor, "h w"], num_classes: int
) -> Int64[Tensor, "3 classes"]:
    """Count pixels of each class: recognised, present and predicted; pixels of no class (-1) do not count."""
    known = mask >= 0
    present, predicted = mask[known], predictions[known]
    kinds = (present[present == predicted], present, predicted)
    return torch.stack([kind.bincount(minlength=num_classes) for kind in kinds])


def intersection_over_union(counts: Int64[Tensor, "3 classes"]) -> dict[int, float]:
    """Return the IoU of each class that is present or was predicted."""
    intersection, present, predicted = counts
    union = present + predicted - intersection
    labels = union.nonzero().flatten()
    return dict(zip(labels.tolist(), (intersection[labels].double() / union[labels]).tolist(), strict=True))


def mean_iou(counts: Int64[Tensor, "3 classes"]) -> float:
    """Return the mean IoU over the classes that are present or were predicted."""
    return float(np.mean(list(intersection_over_union(counts).values())))


def bootstrap_interval(counts: Int64[Tensor, "n 3 classes"], seed: int, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean IoU: images are drawn with replacement, and the middle 95 % of the results taken."""
    rng = np.random.default_rng(seed)
    flat = counts.flatten(1).double()
    found = []
    for _ in range(draws):
        weights = torch.from_numpy(np.bincount(rng.integers(len(flat), size=len(flat)), minlength=len(flat))).double()
        found.append(mean_iou((weights @ flat).round().long().view_as(counts[0])))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


class LinearHead(nn.Module):
    """Batch norm and a linear layer on each patch token."""

    def __init__(self, width: int, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b classes rows columns"]:
        values = self.linear(self.norm(rearrange(tokens, "b n d -> (b n) d")))
        return rearrange(values, "(b rows columns) k -> b k rows columns", rows=grid[0], columns=grid[1])


def train_heads(
    backbone: Backbone,
    source: MaskedSource,
    base_lrs: Sequence[float],
    config: SegmentationConfig,
    num_classes: int,
    on_step: Callable[[], object] = lambda: None,
) -> list[LinearHead]:
    """Train a head for each learning rate, all on the same batches; the same call gives the same heads."""
    encoder, device = backbone.encoder, backbone.settings.device
    heads = []
    for _ in base_lrs:
        generator = torch.Generator().manual_seed(config.seed)
        heads.append(LinearHead(encoder.embed_dim * config.num_layers, num_classes, generator).to(device))
    optimizer = torch.optim.AdamW(
        [{"params": list(head.parameters()), "base_lr": lr} for head, lr in zip(heads, base_lrs, strict=True)],
        weight_decay=1e-4,
    )
    sampler = StepSampler(
        num_samples=len(source), batch_size=config.batch_size, num_steps=config.steps, seed=config.seed
    )
    pairs = _Pairs(source, backbone, config.seed)
    loader = _loader(pairs, backbone.settings, batch_sampler=sampler)
    with reading(loader, pairs.current, source.images.where) as batches:
        for step, (images, masks) in enumerate(batches):
            tokens, grid = _tokens(backbone, images, config.num_layers)
            masks = masks.to(device, non_blocking=True)
            losses = [_loss(_enlarge(head(tokens, grid), backbone.transform), masks) for head in heads]
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(step / config.steps, 0.1, group["base_lr"], 0.0)
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            on_step()
    return heads


@torch.no_grad()
def segment(
    backbone: Backbone,
    heads: Sequence[LinearHead],
    source: MaskedSource,
    config: SegmentationConfig,
    num_classes: int,
) -> list[Int64[Tensor, "n 3 classes"]]:
    """Return for each head the pixel counts of each image: all that the scores need, and small for many classes."""
    found: list[list[Tensor]] = [[] for _ in heads]
    pairs = _Pairs(source, backbone, None)
    loader = _loader(pairs, backbone.settings)
    for head in heads:
        head.eval()
    with reading(loader, pairs.current, source.images.where) as batches:
        for images, masks in batches:
            tokens, grid = _tokens(backbone, images, config.num_layers)
            for head, counts in zip(heads, found, strict=True):
                predictions = _enlarge(head(tokens, grid), backbone.transform).argmax(dim=1).cpu()
                counts += [pixel_counts(*pair, num_classes) for pair in zip(predictions, masks, strict=True)]
    return [torch.stack(counts) for counts in found]


class _Pairs(Dataset):
    """Images and masks at the encoder's size: random crops by sample key, or the centres by row."""

    def __init__(self, source: MaskedSource, backbone: Backbone, seed: int | None) -> None:
        # Not the backbone itself: loader processes get a copy of what is kept here.
        self.source, self.num_channels = source, backbone.encoder.in_chans
        self.transform, self.seed = backbone.transform, seed
        self.current = CurrentRows(backbone.settings.num_workers)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey | int) -> tuple[Tensor, Tensor]:
        if isinstance(key, SampleKey) and self.seed is not None:
            self.current.note(key.index)
            pair = self.source.pair(key.index, self.num_channels)
            return random_pair(*pair, self.transform.size, sample_rng(self.seed, key))
        assert isinstance(key, int)
        self.current.note(key)
        pair = self.source.pair(key, self.num_channels)
        return centre_pair(*pair, self.transform.size, self.transform.crop_pct)


def _loader(pairs: Dataset, settings: EncodeSettings, batch_sampler: StepSampler | None = None) -> DataLoader:
    return DataLoader(
        pairs,
        batch_size=settings.batch_size if batch_sampler is None else 1,
        batch_sampler=batch_sampler,
        num_workers=settings.num_workers,
        pin_memory=settings.device.type == "cuda",
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),
    )


def _tokens(backbone: Backbone, images: Tensor, num_layers: int) -> tuple[Float[Tensor, "b n d"], tuple[int, int]]:
    """Frozen patch tokens of the last blocks, side by side, and their grid."""
    encoder, device, dtype = backbone.encoder, backbone.settings.device, backbone.settings.autocast_dtype
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        normalised = backbone.transform.on_device(images, device)
        layers = encoder.last_layers(normalised, num_layers)
    grid = encoder.grid_of(*normalised.shape[-2:])
    return torch.cat([features.patches for features in layers], dim=2).float(), grid


def _enlarge(logits: Float[Tensor, "b k r s"], transform: EvalTransform) -> Float[Tensor, "b k h w"]:
    """Enlarge logits to the size of the masks, without the padding."""
    (height, width), (below, right) = transform.size, transform.padding
    rows = _stretch(logits.shape[2], height + below, logits.device)[:, :height]
    columns = _stretch(logits.shape[3], width + right, logits.device)[:, :width]
    # The gradient of F.interpolate has no fixed order of sums on CUDA, that of products has.
    return rows.T @ (logits @ columns)


def _loss(logits: Float[Tensor, "b k h w"], masks: Int64[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the pixels that belong to a class; 0 where there are none."""
    # Flat, since that of maps has no fixed order of sums on CUDA.
    flat = rearrange(logits, "b k h w -> (b h w) k")
    return F.cross_entropy(flat, masks.flatten(), ignore_index=-1, reduction="sum") / (masks >= 0).sum().clamp(1)


def _stretch(length: int, to: int, device: torch.device) -> Float[Tensor, "length to"]:
    """Matrix that a line of `length` values is multiplied by to be enlarged linearly."""
    return F.interpolate(torch.eye(length, device=device)[None], to, mode="linear", align_corners=False)[0]


def evaluate_segmentation(path: Path, config: SegmentationConfig) -> None:
    """Score a backbone by linear segmentation: a table, and a JSON file."""
    backbone = Backbone.load(path, config)
    if process_index() != 0:  # heads are small and the encoder runs once per image and step: one process does it
        return
    if config.num_layers > (most := backbone.encoder.num_last_layers):
        shared = f"the last {most} blocks of {backbone.encoder.config.arch} share width and grid"
        raise ValueError(f"num_layers={config.num_layers}: {shared}; give at most {most}")
    bad: list[dict[str, Any]] = []
    train, test, test_name = _open(backbone, config, bad)
    num_classes = _count_classes(train, test)
    rows: dict[str, Segmentation] = {}
    for name in (*config.baselines, "backbone"):
        encoder = backbone.untrained(config.seed) if name == "untrained" else backbone.encoder
        rows[name] = _evaluate(name, replace(backbone, encoder=encoder.eval()), train, test, config, num_classes)
    lines = [["%", "mIoU", "pixel accuracy", "images"]]
    for name, item in rows.items():
        shown = f"{100 * item.miou:.1f} [{100 * item.low:.1f}, {100 * item.high:.1f}]"
        lines.append([name, shown, f"{100 * item.pixel_accuracy:.1f}", str(item.n)])
    print(f"tested on {plain(test_name)}\n{lay_out(lines)}\n")
    print(lay_out([["class", "IoU, %"], *([str(k), f"{100 * v:.1f}"] for k, v in rows["backbone"].iou.items())]))
    result = {"weights": str(backbone.file), "test": test_name, "num_classes": num_classes, "num_train": len(train)}
    result |= {"num_test": rows["backbone"].n, "num_bad": len(bad), "crop_pct": backbone.transform.crop_pct}
    result |= {"settings": asdict(config), **{name: item._asdict() for name, item in rows.items()}}
    write_result(backbone.folder / "segmentation.json", config.output, result, bad)


def _evaluate(
    name: str,
    backbone: Backbone,
    train: MaskedSource,
    test: MaskedSource,
    config: SegmentationConfig,
    num_classes: int,
) -> Segmentation:
    several = len(config.base_lrs) > 1
    held_out: dict[float, float] = {}
    best = sorted(config.base_lrs)[len(config.base_lrs) // 2]
    total = config.steps * (2 if several else 1)
    with tqdm(total=total, desc=f"segmentation, {name}", unit="step", leave=False, disable=None) as bar:
        if several:
            fit, pick = hold_out(train, PICK_FOLDS, config.seed + 1)
            heads = train_heads(backbone, fit, config.base_lrs, config, num_classes, bar.update)
            found = segment(backbone, heads, pick, config, num_classes)
            if found[0][:, 1].any():  # else no pixel that a head could be picked by
                held_out = {lr: mean_iou(counts.sum(dim=0)) for lr, counts in zip(config.base_lrs, found, strict=True)}
                best = max(held_out, key=lambda lr: held_out[lr])
        heads = train_heads(backbone, train, [best], config, num_classes, bar.update)
    counts = segment(backbone, heads, test, config, num_classes)[0]
    counts = counts[counts[:, 1].any(dim=1)]  # images without a known pixel test nothing
    if len(counts) == 0:
        raise ValueError(f"no mask of {test.images.name!r} holds a pixel of a class in its centre; give --crop_pct 1")
    total_counts = counts.sum(dim=0)
    low, high = bootstrap_interval(counts, config.seed)
    accuracy = float(total_counts[0].sum() / total_counts[1].sum())
    return Segmentation(
        mean_iou(total_counts), low, high, accuracy, intersection_over_union(total_counts), best, held_out, len(counts)
    )


def _open(
    backbone: Backbone, config: SegmentationConfig, bad: list[dict[str, Any]]
) -> tuple[MaskedSource, MaskedSource, str]:
    """Open the training and the test images; pairs that cannot be decoded are left out and added to `bad`."""
    data = data_config(backbone, config, label_column="none")
    shared = {"mask_column": config.mask_column, "ignore_index": config.ignore_index}
    with naming_own(config):
        train = _readable(open_masked(data, mask_source=config.mask_source, **shared), backbone, config, bad)
    if config.test_source is None and config.test_split is None:
        train, test = hold_out(train, TEST_FOLDS, config.seed)
        return train, test, f"a held-out {len(test) / (len(train) + len(test)):.0%} of {train.images.name}"
    other = replace(data, source=config.test_source or data.source, split=config.test_split or data.split)
    with naming_test(config):
        test = _readable(open_masked(other, mask_source=config.test_mask_source, **shared), backbone, config, bad)
    check_apart(train.images, test.images, "--test_")
    return train, test, test.images.name


def _readable(
    source: MaskedSource, backbone: Backbone, config: SegmentationConfig, bad: list[dict[str, Any]]
) -> MaskedSource:
    """Keep the pairs whose image and mask can be used; to find them, each pair is decoded once before training."""
    tell_notes(source.images, source.masks)
    if config.on_bad_image == "raise":
        return source
    work, num_workers = Problems(source, backbone.encoder.in_chans).__getitem__, backbone.settings.num_workers
    with in_workers(work, range(len(source)), source.images.where, num_workers=num_workers) as found:
        reasons: list[str | None] = list(found)
    rows = [row for row, reason in enumerate(reasons) if reason is not None]
    if rows:
        refuse(len(rows), len(source), config.max_bad_share, str(reasons[rows[0]]))
    bad += [{"source": source.images.name, "row": row, "reason": reasons[row]} for row in rows]
    return source.subset(np.setdiff1d(np.arange(len(source)), rows)) if rows else source


def _count_classes(train: MaskedSource, test: MaskedSource) -> int:
    """Return one more than the highest class; all masks are read, so a broken mask stops the run before training."""
    learned, tested = (
        set(torch.cat([source.mask(row).unique() for row in range(len(source))]).unique().tolist())
        for source in (train, test)
    )
    ignored, learned, tested = -1 in learned, learned - {-1}, tested - {-1}
    if len(learned) < 2:
        held = f"only class {learned.pop()}" if learned else "no class"
        hint = f"; {train.ignore_index} is taken for pixels of no class: where it is one, give --ignore_index -1"
        hint = hint if ignored else ""
        raise ValueError(f"source={train.images.name!r}: the masks hold {held}; segmentation needs at least two{hint}")
    if not tested:
        raise ValueError(f"the test masks of {test.images.name!r} hold no class; name other images with --test_source")
    if tested - learned:
        shown = ", ".join(map(str, sorted(tested - learned)[:10]))
        raise ValueError(
            f"the test masks of {test.images.name!r} hold classes that the training masks lack: {shown}; add images of "
            "them to the source, or name other test images with --test_source"
        )
    return int(max(learned)) + 1
