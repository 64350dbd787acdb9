"""The search for what fits, on stand-ins for a device that runs out of memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from ssl_vit.objectives.mae import MAE
from ssl_vit.training.device.micro_batch import largest_that_fits, micro_batch_sizes
from ssl_vit.training.loop import main
from tests.conftest import OBJECTIVES, SMALL_RUN, losses


def test_sizes_cut_the_share_evenly() -> None:
    assert micro_batch_sizes(12) == [1, 2, 3, 4, 6, 12]
    assert micro_batch_sizes(12, limit=5) == [1, 2, 3, 4]
    assert micro_batch_sizes(7, limit=6) == [1]


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 16, 100, 511, 512, 1000])
def test_the_largest_size_that_fits_is_found_in_few_attempts(limit: int) -> None:
    tried = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError

    sizes = micro_batch_sizes(512)
    assert largest_that_fits(sizes, attempt) == max((size for size in sizes if size <= limit), default=None)
    assert len(tried) <= 5
    assert len(tried) == len(set(tried))
    assert len(tried) == 1 or limit < 512  # all at once is tried first


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def attempt(size: int) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        largest_that_fits([1, 2], attempt)


def limit_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let MAE run out of memory above so many images at once."""
    forward = MAE.forward

    def limited(self: MAE, batch: dict[str, torch.Tensor], progress: float) -> dict[str, torch.Tensor]:
        if len(batch["images"]) > most:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, batch, progress)

    monkeypatch.setattr(MAE, "forward", limited)
    monkeypatch.setattr("ssl_vit.training.device.micro_batch.has_limit", lambda device: True)


def test_what_is_found_is_trained_with_and_changes_nothing_else(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start("--batch.per_device=2", steps=2, name="given")
    limit_memory(monkeypatch, 3)
    assert start("--batch.auto=true", steps=2) == 0
    assert "auto       batch.per_device 2: the most of 8 that fit" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["batch"]["per_device"] == 2
    assert losses(tmp_path / "run") == losses(tmp_path / "given")
    limit_memory(monkeypatch, 0)
    with pytest.raises(ValueError, match=r"batch.auto=True: not even one image fits.*grad_checkpointing"):
        start("--batch.auto=true", steps=2, name="other")


def test_nothing_is_tried_on_a_cpu(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    start("--batch.auto=true", steps=1)
    text = capsys.readouterr().out
    assert "auto       batch.auto: nothing is tried on a CPU" in text
    assert "batch      8 = 1 process x 1 micro-batch x 8 images" in text


@pytest.mark.usefixtures("_fresh_state")
@pytest.mark.parametrize(
    ("most", "advice"),
    [(2, "As tried, 2 fit: --batch.per_device 2; the batch of a step stays 8"), (0, "not even one image fits")],
)
def test_a_run_that_is_out_of_memory_says_what_fits(
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    most: int,
    advice: str,
) -> None:
    limit_memory(monkeypatch, most)
    flags = [f"--data.source={photo_folder}", f"--output_dir={tmp_path / 'run'}", "--steps=2"]
    monkeypatch.setattr("sys.argv", ["pretrain_mae.py", *SMALL_RUN, *flags, "--data.label_column=none"])
    assert main(OBJECTIVES["mae"][0]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory with 8 images at once")
    assert advice in line
