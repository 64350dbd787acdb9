from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssl_vit.data.sources.source import open_source
from ssl_vit.doctor.diagnose import diagnose
from ssl_vit.doctor.facts import Facts
from ssl_vit.training.config import parse_run
from tests.conftest import OBJECTIVES


def look_at(folder: Path, *flags: str, objective: str = "mae", sample: int | None = None) -> Facts:
    """What the doctor finds in a folder for a small run; no step is measured."""
    defaults, small = OBJECTIVES[objective]
    config = parse_run(defaults, [*small, f"--data.source={folder}", *flags])
    return diagnose(config, open_source(config.data), sample=sample, step="false")


def save_noise(folder: Path, count: int, shape: tuple[int, ...], seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number:03d}.png")
    return folder


def save_tiffs(folder: Path, shape: tuple[int, ...], dtype: str = "uint16", **how: Any) -> Path:
    tifffile = pytest.importorskip("tifffile")
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype)
        tifffile.imwrite(folder / f"{number}.tif", pixels, photometric="minisblack", **how)
    return folder


def kinds(warnings: list[str]) -> set[str]:
    """The words before the colon of each warning."""
    return {text.partition(":")[0] for text in warnings}
