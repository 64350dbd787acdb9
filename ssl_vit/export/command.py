"""The command of scripts/export.py."""

import argparse
import os
from pathlib import Path

from ssl_vit.core.text import plain
from ssl_vit.core.writing import FAULTS, report_error
from ssl_vit.export.run import export_distilled_run, export_fine_tuned, export_run
from ssl_vit.export.targets import TARGETS, export_to, proof_images, push
from ssl_vit.export.transformers import check_mae
from ssl_vit.objectives.mae import MAE
from ssl_vit.runs.checkpoint import STATE_FILE
from ssl_vit.runs.trained import Trained, is_fine_tuned, open_trained


def export(args: argparse.Namespace) -> int:
    """Export, and print the folders and the largest difference from the trained backbone.

    Returns:
        0; 2 if an argument cannot be used or a library has no such architecture; 1 if a proof failed.
    """
    try:
        return _export(args)
    except FAULTS as error:
        return report_error(error, failed_proof=True)


def _export(args: argparse.Namespace) -> int:
    if args.to is None:
        if args.push_to_hub:
            raise ValueError(f"--push_to_hub {args.push_to_hub}: name the library with --to")
        _refuse(args, "without --to", "images", "license")
        print(f"Wrote {export_run(args.path, args.weights, args.out)} (+ config.json)")
        return 0
    targets = list(dict.fromkeys(args.to))
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"--to {target}: no such library; choose of {' '.join(TARGETS)}")
    if args.push_to_hub and len(targets) > 1:
        raise ValueError(f"--push_to_hub {args.push_to_hub}: takes one library, not {' '.join(targets)}")
    out = args.out
    if out is None:
        if not args.path.exists():
            raise ValueError(f"{args.path}: name the folder to write to with --out")
        folder = args.path.parent if args.path.is_file() else args.path
        is_checkpoint = (folder / STATE_FILE).is_file()  # which is deleted as the run goes on
        out = (folder.parent.parent if is_checkpoint else folder) / "exported"
    if is_fine_tuned(args.path):
        return _export_fine_tuned(args, targets, out)
    trained = open_trained(args.path, args.weights)
    if "transformers" in targets and isinstance(trained.objective, MAE) and not args.push_to_hub:
        targets += _with_decoder(trained)
    proof = proof_images(trained, args.images, asked=args.open_source)
    reason = f", since none of its own can be read: {proof.why}; name others with --images" if proof.why else ""
    print(f"Comparing on {plain(proof.name + reason)}.")
    code = 0
    for target in dict.fromkeys(targets):
        try:
            found = export_to(trained, target, out, proof, license=args.license, overwrite=args.overwrite)
        except ValueError as error:  # the other libraries may take it
            code = report_error(ValueError(f"--to {target}: {error}"))
            continue
        print(f"{target:<17}{plain(found.folder)}   largest difference {found.difference:.1e}")
        if args.push_to_hub:
            print(f"Uploaded to {push(found.folder, args.push_to_hub, private=args.private)}")
    return code


def _refuse(args: argparse.Namespace, why: str, *names: str) -> None:
    """Refuse flags that would change nothing."""
    for name in names:
        if (value := getattr(args, name)) not in (None, "unknown"):
            raise ValueError(f"--{name} {value}: has no effect {why}; leave it out")


def _with_decoder(trained: Trained) -> list[str]:
    """The library that takes a run of MAE with its decoder, where it takes this one."""
    try:
        check_mae(trained)
    except ValueError as error:
        print(f"note       without its decoder: {plain(error)}")
        return []
    return ["transformers_mae"]


def _export_fine_tuned(args: argparse.Namespace, targets: list[str], out: Path) -> int:
    if not set(targets) <= {"timm", "transformers"} or args.push_to_hub:
        raise ValueError(
            f"--to {' '.join(targets)}: {args.path} is a fine-tuned classifier, which leaves as timm's alone, and a "
            "distilled DeiT as transformers' too"
        )
    _refuse(args, "on a fine-tuned classifier", "weights", "images", "license")
    for target in targets:
        if os.path.lexists(out / target) and not args.overwrite:
            raise ValueError(f"{out / target}: is there already; choose another --out, or --overwrite it")
        if target == "timm":
            folder = export_fine_tuned(args.path, out / target).parent
        else:
            folder = export_distilled_run(args.path, out / target)
        print(f"{target:<17}{plain(folder)}")
    return 0
