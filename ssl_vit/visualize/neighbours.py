"""Draws the nearest neighbours of a few images: which images have similar features."""

import textwrap
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.core.text import plain
from ssl_vit.data.augment.device import normalize
from ssl_vit.data.augment.evaluation import EvalTransform, centre_crop
from ssl_vit.data.sources.source import Source
from ssl_vit.evaluation.features import EncodeSettings, extract_features, select_feature
from ssl_vit.evaluation.scores import class_name
from ssl_vit.runs.trained import Trained
from ssl_vit.visualize.grid import draw_grid, to_rgb
from ssl_vit.visualize.inputs import ShownImages

_CHARACTERS = 16  # of a line below one of seven panels


def nearest(
    queries: Float[Tensor, "q d"],
    gallery: Float[Tensor, "n d"],
    k: int,
    *,
    query_groups: Int[np.ndarray, " q"] | None = None,
    gallery_groups: Int[np.ndarray, " n"] | None = None,
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Cosine similarity and place of the k nearest of the gallery, the nearest first.

    Args:
        query_groups, gallery_groups: numbers of groups that count as one image, which is no neighbour of itself;
            -1 belongs to no group.

    Raises:
        ValueError: a query has fewer than k neighbours.
    """
    similarity = F.normalize(queries.float(), dim=-1) @ F.normalize(gallery.float(), dim=-1).T
    if query_groups is not None and gallery_groups is not None:
        same = (query_groups[:, None] == gallery_groups) & (query_groups[:, None] >= 0)
        similarity = similarity.masked_fill(torch.from_numpy(same), -torch.inf)
    if len(gallery) < k or similarity.topk(k).values.isinf().any():
        raise ValueError(f"the gallery has too few images for {k} neighbours of each: name a larger --gallery")
    found = similarity.topk(k)
    return found.values, found.indices


def draw_neighbours(
    trained: Trained, inputs: ShownImages, gallery: Source, path: Path, *, most: int, seed: int, k: int = 6
) -> None:
    """Write a figure with a row for each query: itself and its k nearest, with similarity and, if known, class.

    Args:
        gallery: where neighbours are looked for, in at most `most` rows drawn by `seed`. Rows that are a query itself
            or another page or tile of its file are left out.
    """
    device = next(trained.encoder.parameters()).device
    encoder, height_width = trained.encoder, (inputs.images.shape[-2], inputs.images.shape[-1])
    rows = np.sort(np.random.default_rng(seed).choice(len(gallery), min(most, len(gallery)), replace=False))
    transform = EvalTransform(height_width, trained.normalization, trained.crop_pct)
    settings = EncodeSettings(batch_size=64, device=device)
    pieces = extract_features(encoder, gallery, rows, transform, settings, max_bad_share=1.0)
    rows = rows[pieces["places"].numpy()]
    with torch.inference_mode():
        found = encoder(inputs.images.to(device))
    queries = (found.cls if trained.pooled == "cls" else found.patches.mean(dim=1)).cpu()
    own = _are_rows_of(gallery, inputs)
    # Without groups every row is one of its own.
    groups = np.arange(len(gallery)) if gallery.groups is None else np.asarray(gallery.groups)
    similarity, places = nearest(
        queries,
        select_feature(pieces, trained.pooled),
        k,
        query_groups=groups[list(inputs.rows)] if own else None,
        gallery_groups=groups[rows] if own else None,
    )
    panels, cells = [], []
    for query, (values, chosen) in enumerate(zip(similarity.tolist(), rows[places.numpy()], strict=True)):
        decoded = [
            centre_crop(gallery.image(int(row), encoder.in_chans), height_width, trained.crop_pct) for row in chosen
        ]
        neighbours = normalize(torch.stack(decoded), trained.normalization)
        panels.append(torch.cat([inputs.images[query : query + 1], neighbours]))
        own_row = [inputs.rows[query]] if own else []
        labels = [_label(gallery, int(row)) for row in [*own_row, *chosen]]
        first = labels.pop(0) if own else short_lines(inputs.names[query])
        cells.append([first, *(f"{value:.3f}\n{name}".strip() for value, name in zip(values, labels, strict=True))])
    flat = to_rgb(torch.cat(panels), trained.normalization)
    pooled = "class tokens" if encoder.has_cls_token else "pooled features"
    what = pooled if trained.pooled == "cls" else "mean patch tokens"
    draw_grid(
        rearrange(flat, "(q v) h w k -> q v h w k", q=len(panels)),
        ["query", *(f"nearest {place + 1}" for place in range(k))],
        path,
        title="Nearest neighbours",
        caption=f"Cosine similarity of {what}, among {len(rows):,} images of {plain(gallery.name, 200)}.",
        cells=cells,
    )


def _are_rows_of(gallery: Source, inputs: ShownImages) -> bool:
    """Whether the images are those rows of the gallery too, by whatever path either was named."""
    source = inputs.source
    if source is None or len(source) != len(gallery):
        return False
    return all(_stored(source, row) == _stored(gallery, row) for row in inputs.rows)


def _stored(source: Source, row: int) -> bytes | Path | None:
    try:
        stored = source.file(row)
    except ValueError:  # the row holds no image
        return None
    return stored if isinstance(stored, bytes) else stored.resolve()


def _label(source: Source, row: int) -> str:
    if source.labels is None or source.labels[row] < 0:
        return ""
    return short_lines(class_name(int(source.labels[row]), source.class_names))


def short_lines(text: str) -> str:
    """A name in at most two lines that fit below a panel."""
    lines = textwrap.wrap(plain(text), _CHARACTERS)
    if len(lines) > 2:
        lines[1] = lines[1][: _CHARACTERS - 1] + "…"
    return "\n".join(lines[:2])
