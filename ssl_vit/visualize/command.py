"""Runs scripts/visualize.py: draws what was asked for, or all that a backbone can show."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ssl_vit.core.text import plain
from ssl_vit.core.writing import FAULTS, own_folder, report_error
from ssl_vit.data.sources.source import open_source
from ssl_vit.models.attention_maps import attention_maps, has_cls_attention
from ssl_vit.runs.folder import CONFIG_FILE, PICTURES_FOLDER
from ssl_vit.runs.trained import Trained, data_settings, open_trained
from ssl_vit.visualize.attention import draw_attention
from ssl_vit.visualize.film import write_film
from ssl_vit.visualize.inputs import ShownImages, naming, open_shown_images
from ssl_vit.visualize.masks import block_keeps, draw_masks, hidden_keeps, parse_patches, random_keeps
from ssl_vit.visualize.neighbours import draw_neighbours
from ssl_vit.visualize.patches import draw_pca, draw_positions, draw_similarity, position_table

WHAT = ("reconstructions", "attention", "patch_attention", "pca", "similarity", "neighbours", "positions")


def visualize(args: argparse.Namespace) -> int:
    """Draw what was asked for, or all that this backbone can show; print the files.

    Returns:
        0; 2 where something named cannot be used or shown.
    """
    try:
        if len(args.image_size or ()) > 2:
            shown = " ".join(map(str, args.image_size))
            raise ValueError(f"--image_size {shown}: give one number, or height and width")
        trained = open_trained(args.path, args.weights)
        what = _chosen(trained, args.what)
        out = args.out or _own_folder(args.path)
        size = None if args.image_size is None else (args.image_size[0], args.image_size[-1])
        named = args.images or [args.source] if args.source else args.images
        settings = {"seed": args.seed, "image_size": size, "asked": args.open_source}
        inputs = open_shown_images(trained, named, number=args.num_images, **settings)
        for name in what:
            for path in _draw(name, trained, inputs, out, args):
                print(plain(path))
    except FAULTS as error:
        return report_error(error)
    return 0


def film(args: argparse.Namespace) -> int:
    """Write the film of a run's figures; return 0, or 2 if there are none."""
    out = args.out or args.path / PICTURES_FOLDER / "film.gif"
    try:
        number = write_film(args.path, out, seconds=args.seconds, width=args.width)
    except FAULTS as error:
        return report_error(error)
    print(f"{plain(out)}   {number} figures")
    return 0


def _own_folder(path: Path) -> Path:
    if (path / CONFIG_FILE).is_file() or path.is_dir():
        return own_folder(path / PICTURES_FOLDER)
    raise ValueError(f"{path}: name the folder to write to with --out")


def _chosen(trained: Trained, asked: Sequence[str] | None) -> list[str]:
    """What was asked for; else all that this backbone can show but neighbours, for which a gallery has to be encoded.

    Raises:
        ValueError: something that this backbone does not have.
    """
    encoder, arch = trained.encoder, trained.encoder.config.arch
    lacks = {
        "reconstructions": trained.objective is None
        and f"{trained.folder} holds no decoder; runs of MAE, SimMIM and FCMAE do, with their checkpoints",
        "attention": not has_cls_attention(encoder) and f"{arch} has no attention maps of a class token",
        "patch_attention": not encoder.has_attention_maps and f"{arch} has no attention maps",
        "positions": position_table(encoder) is None and f"{arch} has no table of positions",
    }
    possible = [what for what in WHAT if not lacks.get(what)]
    for what in asked or ():
        if reason := lacks.get(what):
            raise ValueError(f"--what {what}: {reason}; choose of {', '.join(possible)}")
    default = [what for what in possible if what != "neighbours" and (what != "attention" or trained.pooled == "cls")]
    return list(asked or default)


def _draw(what: str, trained: Trained, inputs: ShownImages, out: Path, args: argparse.Namespace) -> list[Path]:
    encoder, images = trained.encoder, inputs.images
    normalization = trained.normalization
    grid = encoder.grid_of(*images.shape[-2:])
    path = out / f"{what}.{args.format}"
    patches = args.patches or [grid[0] // 2 * grid[1] + grid[1] // 2]
    block = "the last block" if args.layer == -1 else f"block {args.layer % max(encoder.num_layers, 1)}"
    if what == "reconstructions":
        return _reconstructions(trained, inputs, grid, out, args)
    if what == "attention":
        maps = attention_maps(encoder, images, layer=args.layer)
        title = f"Attention of the class token in {block}"
        kept = path.with_stem(f"{what}_{100 * args.mass:.0f}")
        draw_attention(images, maps, path=path, title=title, normalization=normalization)
        draw_attention(images, maps, path=kept, title=title, mass=args.mass, normalization=normalization)
        return [path, kept]
    if what == "patch_attention":
        written = []
        for patch in patches:
            maps = attention_maps(encoder, images, patch=patch, layer=args.layer)
            written.append(path.with_stem(f"{what}_{patch}"))
            title = f"Attention of patch {patch} in {block}"
            draw_attention(images, maps, path=written[-1], title=title, patch=patch, normalization=normalization)
        return written
    if what == "positions":
        draw_positions(encoder, path)
        return [path]
    if what == "neighbours":
        with naming("--gallery", args.gallery):
            gallery = open_source(data_settings(trained, args.gallery, asked=args.open_source))
        draw_neighbours(trained, inputs, gallery, path, most=args.gallery_size, seed=args.seed)
        return [path]
    with torch.inference_mode():
        tokens = encoder(images).patches
    if what == "pca":
        draw_pca(images, tokens, grid, path=path, foreground=args.foreground, normalization=normalization)
    else:
        draw_similarity(images, tokens, grid, patches, path=path, normalization=normalization)
    return [path]


def _reconstructions(
    trained: Trained, inputs: ShownImages, grid: tuple[int, int], out: Path, args: argparse.Namespace
) -> list[Path]:
    objective, images = trained.objective, inputs.images
    assert objective is not None
    number, num_patches = len(images), grid[0] * grid[1]
    masks = {}
    if args.hide:
        hidden = parse_patches(args.hide)
        masks["hidden"] = {f"{len(set(hidden))} removed": hidden_keeps(number, num_patches, hidden)}
    else:
        for kind in args.mask:
            masks[kind] = {
                f"{ratio:.0%} removed": random_keeps(number, num_patches, ratio, args.seed)
                if kind == "random"
                else block_keeps(number, grid, ratio, args.seed)
                for ratio in args.mask_ratios
            }
    written = []
    for kind, keeps in masks.items():
        written.append(out / f"reconstructions_{kind}.{args.format}")
        draw_masks(objective, images, keeps, written[-1], normalization=trained.normalization)
    return written
