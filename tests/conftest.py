"""Fixtures: tiny models and images made on the fly."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors.torch import load_file

from scripts import (
    distill,
    pretrain_dino,
    pretrain_dinov2,
    pretrain_fcmae,
    pretrain_lejepa,
    pretrain_mae,
    pretrain_simmim,
)
from ssl_vit.core.machine import cpu_name
from ssl_vit.models.config import EncoderConfig
from ssl_vit.models.vit import ViT
from ssl_vit.runs.checkpoint import list_checkpoints
from ssl_vit.training.config import parse_run
from ssl_vit.training.device import cuda_graphs
from ssl_vit.training.loop import set_up, train
from tests.backbones import teacher_folder
from tests.reruns import FakeCapture, Rerun

if "PYTEST_XDIST_WORKER" in os.environ:  # test processes share the cores, and so do those that they start
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # processes that tests start need not compile our modules each time
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

GOLDEN = Path(__file__).parent / "golden"
TINY = {"arch": "vit_small_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write tests/golden/losses.json anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first, which take longest: so that no core waits for the other at the end."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_encoder() -> ViT:
    return EncoderConfig(image_size=32, pos_embed="sincos", **TINY).build()


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 20 images: red discs and blue squares on noise."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, channel in (("disc", 0), ("square", 2)):
        (folder / name).mkdir()
        for number in range(20):
            pixels = rng.integers(0, 80, (48, 40, 3), dtype=np.uint8)
            y, x = np.mgrid[:48, :40]
            row, column = rng.integers(16, 32), rng.integers(14, 26)
            distance = np.hypot(y - row, x - column) if name == "disc" else np.maximum(abs(y - row), abs(x - column))
            pixels[distance < 10, channel] = 255
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")
    return folder


ROOT = Path(__file__).parents[1]
SMALL_ENCODER = [
    "--encoder.arch=vit_tiny_patch16_224",
    "--encoder.image_size=32",
    "--encoder.patch_size=8",
    "--encoder.embed_dim=32",
    "--encoder.depth=2",
    "--encoder.num_heads=2",
    "--encoder.drop_path_rate=0.1",
    "--batch.size=8",
    "--precision=no",
    "--log_every=1",
    "--evaluation.folds=2",
]
SMALL_RUN = [
    *SMALL_ENCODER,
    "--optim.base_lr=0.032",
    "--objective.decoder_embed_dim=16",
    "--objective.decoder_depth=1",
    "--objective.decoder_num_heads=2",
]
SMALL_DINO = [
    *SMALL_ENCODER,
    "--optim.base_lr=0.032",
    "--objective.hidden_dim=48",
    "--objective.bottleneck_dim=16",
    "--objective.head_batch_norm=false",  # under accumulation it would be another loss, and so would Sinkhorn-Knopp
    "--objective.centering=center",
    "--objective.teacher_temp=0.04",
    "--objective.num_local_crops=2",
    "--objective.local_crop_size=16",
]
# LayerScale's 1e-5 would leave all class tokens the same for a dozen steps, and KoLeo with nothing but rounding errors.
SMALL_DINOV2 = [*SMALL_DINO, "--objective.centering=sinkhorn", "--optim.base_lr=0.01", "--encoder.layer_scale=1.0"]
SMALL_CONVNEXT = [
    "--encoder.arch=convnextv2_atto",
    "--encoder.image_size=64",
    "--encoder.model_args={depths: [1, 1, 2, 1], dims: [8, 16, 24, 40]}",
    *(flag for flag in SMALL_ENCODER if not flag.startswith("--encoder.")),
]
SMALL_LEJEPA = [
    *SMALL_ENCODER,
    "--optim.base_lr=0.032",
    "--objective.hidden_dim=48",
    "--objective.projection_dim=16",
    "--objective.num_directions=64",
    "--objective.num_local_crops=2",
    "--objective.local_crop_size=16",
]
OBJECTIVES = {
    "mae": (pretrain_mae.DEFAULTS, SMALL_RUN),
    "dino": (pretrain_dino.DEFAULTS, SMALL_DINO),
    "dinov2": (pretrain_dinov2.DEFAULTS, SMALL_DINOV2),
    "simmim": (pretrain_simmim.DEFAULTS, [*SMALL_ENCODER, "--optim.base_lr=0.032", "--objective.mask_unit=16"]),
    "fcmae": (pretrain_fcmae.DEFAULTS, [*SMALL_CONVNEXT, "--optim.base_lr=0.032", "--objective.decoder_embed_dim=16"]),
    "lejepa": (pretrain_lejepa.DEFAULTS, SMALL_LEJEPA),
    "simdino": (pretrain_dino.DEFAULTS, [*SMALL_DINO, "--objective.loss=coding_rate"]),
    "simdinov2": (pretrain_dinov2.DEFAULTS, [*SMALL_DINOV2, "--objective.loss=coding_rate"]),
    "distill": (distill.DEFAULTS, [*SMALL_ENCODER, "--optim.base_lr=0.02", f"--objective.teacher={teacher_folder()}"]),
}
RECORDED = ("mae", "dino", "dinov2")
"""Objectives whose recorded runs are tested."""


@pytest.fixture
def _fresh_state() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()
    torch.set_num_threads(threads)


@pytest.fixture
def start(photo_folder: Path, tmp_path: Path, _fresh_state: None) -> Callable[..., int]:
    """Runs a small training in this process and returns its exit code."""

    def start(*flags: str, name: str = "run", steps: int = 6, labels: bool = False, objective: str = "mae") -> int:
        AcceleratorState._reset_state()
        flags = flags if labels else ("--data.label_column=none", *flags)
        defaults, small = OBJECTIVES[objective]
        settings = [f"--data.source={photo_folder}", f"--output_dir={tmp_path / name}", f"--steps={steps}"]
        return train(set_up(parse_run(defaults, [*small, *settings, *flags])))

    return start


def nearest_mean(
    train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, *, num_classes: int, seed: int = 0
) -> torch.Tensor:
    means = torch.stack([train[labels == label].mean(dim=0) for label in range(num_classes)])
    return torch.cdist(test, means).argmin(dim=1)


@pytest.fixture
def quick_scores() -> Iterator[None]:
    """Classify by the nearest mean instead of by a logistic regression, which takes longer than a small run."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ssl_vit.evaluation.evaluate.logistic_predict", nearest_mean)
        yield


def losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def machine() -> dict[str, str]:
    """What the last bits of a loss depend on."""
    maker = "AMD" if "AMD" in cpu_name() else cpu_name().partition(" ")[0]  # MKL has paths of its own for each
    return {"torch": torch.__version__, "cpu": f"{maker} {torch.backends.cpu.get_cpu_capability()}"}


def loss_tolerance(objective: str = "") -> float:
    """How far losses may lie, relatively, from those in golden/: other processors sum in another order."""
    written = json.loads((GOLDEN / "losses.json").read_text())
    return 1e-6 if written["machines"].get(objective, written["machine"]) == machine() else 1e-4


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(run)[-1] / "model.safetensors")


@pytest.fixture
def reruns(monkeypatch: pytest.MonkeyPatch) -> list[Rerun]:
    FakeCapture.made = []
    monkeypatch.setattr(cuda_graphs, "Capture", FakeCapture)
    return FakeCapture.made
