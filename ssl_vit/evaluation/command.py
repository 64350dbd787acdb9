"""The command line shared by evaluate_knn.py and linear_probe.py."""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser

from ssl_vit.data.sources import DataConfig, open_source
from ssl_vit.evaluation.evaluate import EvaluationConfig, evaluate_encoder, evaluate_pixels
from ssl_vit.evaluation.scores import format_table, scores_to_json
from ssl_vit.export.backbone import load_backbone, read_config


def main(probe: str, description: str | None, args: Sequence[str] | None = None) -> int:
    """Score a backbone by one probe beside raw pixels: a table, and a JSON file next to the backbone.

    Args:
        probe: "knn" or "linear".
        description: shown by --help.
        args: the command line; None takes the process's own.

    Returns:
        The exit code: 2, after one line, where something named cannot be used.
    """
    parser = ArgumentParser(exit_on_error=False, description=description)
    parser.add_argument(
        "backbone", type=str, help="folder of a run or of an exported backbone, or its safetensors file"
    )
    parser.add_class_arguments(EvaluationConfig, skip={"every_steps"})
    for name, text in {
        "split": "split of the source",
        "test_split": "split of the test source",
        "image_column": "column that holds the images",
        "label_column": "column that holds the classes",
    }.items():
        parser.add_argument(f"--{name}", type=str | None, default=None, help=text)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode")
    parser.add_argument("--seed", type=int, default=0, help="draws subset and folds")
    try:
        _run(probe, parser.parse_args(args))
    except (ValueError, ArgumentError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _run(probe: str, given: Any) -> None:
    config = EvaluationConfig(
        **{item.name: given[item.name] for item in fields(EvaluationConfig) if item.name != "every_steps"}
    )
    path = Path(given.backbone)
    folder = path if path.is_dir() else path.parent
    encoder = load_backbone(path)
    described = read_config(folder)
    source = config.source or described["ssl_vit"].get("source")
    if source is None:
        raise ValueError("--source: name the labelled images to evaluate on")
    mean, std = (tuple(described["pretrained_cfg"][name]) for name in ("mean", "std"))
    chosen = {name: given[name] for name in ("split", "image_column", "label_column") if given[name] is not None}
    data = DataConfig(source=source, mean=mean, std=std, **chosen)
    train = open_source(data)
    test = None
    if config.test_source is not None:
        test = open_source(replace(data, source=config.test_source, split=given.test_split or data.split))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    shared: dict[str, Any] = {"num_workers": given.num_workers, "seed": given.seed, "probes": [probe]}
    rows = {
        "raw pixels": evaluate_pixels(train, test, config, num_channels=encoder.in_chans, **shared),
        "backbone": evaluate_encoder(
            encoder.to(device), train, test, config, mean=mean, std=std, device=device, **shared
        ),
    }
    print(format_table(rows, k=config.k))
    result = {"source": source, "test_source": config.test_source, "feature": config.feature, **scores_to_json(rows)}
    file = folder / f"{probe}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {file}")
