"""A small run folder, and what a stranger may have put into it."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from ssl_vit.core.writing import replace_json
from ssl_vit.data.sources.source import DataConfig
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.weights.backbone import export_backbone
from ssl_vit.objectives.mae import MAEConfig
from ssl_vit.runs.checkpoint import save_checkpoint
from ssl_vit.training.config import RunConfig, write_config
from tests.conftest import TINY
from tests.specs import GREY

SECRET = b"user: alice\npassword: swordfish-0000\n"


def small_run(folder: Path) -> Path:
    """What an MAE of three steps leaves, with no images anywhere."""
    objective = MAEConfig(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    config = RunConfig(
        objective, str(folder), steps=3, encoder=EncoderConfig(image_size=32, **TINY), data=DataConfig(source="nowhere")
    )
    (folder / "pictures").mkdir(parents=True)
    write_config(config, folder / "config.yaml")
    model = config.build_objective()
    state = {"objective": "MAE", "backbone": "encoder.", "class_names": ["a", "b"], "num_images": 40}
    save_checkpoint(folder, 3, model, torch.optim.AdamW(model.parameters()), state)
    lines = [{"step": step, "loss": 1 / step, "progress": step / 3, "images_per_second": 50.0} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (0, 3):
        Image.new("RGB", (40, 20), (step, 0, 0)).save(folder / "pictures" / f"step-{step:08d}.webp")
    provenance = {"objective": "MAE", "source": "/home/alice/photos", "steps": 3}
    export_backbone(model.backbone(), folder, normalization=GREY, provenance=provenance)
    score = {"knn": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 40}}
    replace_json(folder / "results.json", {"step": 3, "scores": {"trained": score}})
    return folder


def to_file(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "secret.txt")


def to_nothing(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "new.txt")


def to_folder(path: Path, outside: Path) -> None:
    path.symlink_to(outside, target_is_directory=True)


def to_itself(path: Path, outside: Path) -> None:
    path.symlink_to(path.name)


def to_zeros(path: Path, outside: Path) -> None:
    path.symlink_to("/dev/zero")


def fifo(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def folder(path: Path, outside: Path) -> None:
    path.mkdir()
    (path / "inside").touch()


def chain(path: Path, outside: Path) -> None:
    """A link to a link, the second of which leads out."""
    path.with_name(f"{path.name}.2").symlink_to(outside / "secret.txt")
    path.symlink_to(f"{path.name}.2")


PLANTED = [
    *(pytest.param(plants, id=plants.__name__) for plants in (to_file, to_nothing, fifo, chain)),
    *(
        pytest.param(plants, id=plants.__name__, marks=pytest.mark.slow)
        for plants in (to_folder, to_itself, to_zeros, folder)
    ),
]
"""`pytest.param`s of functions that put something in a place, given what lies outside."""


@contextmanager
def guarded(outside: Path, seconds: float = 20) -> Iterator[None]:
    """Fail where something outside changes, or where it takes longer than so many seconds, as a FIFO that is opened."""

    def give_up(*args: object) -> None:
        raise AssertionError("hangs")

    before = _contents(outside)
    handler = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert _contents(outside) == before


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def plant(plants: Callable[[Path, Path], None], path: Path, outside: Path) -> None:
    """Put something hostile in the place of whatever a path names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"{path.name}-was"))
    path.unlink(missing_ok=True)
    plants(path, outside)
