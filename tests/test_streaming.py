"""Streamed runs that are killed, and streamed runs of two processes, through the real script."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from ssl_vit.core.settings import as_plain
from ssl_vit.core.text import code
from ssl_vit.data.config import DataConfig
from ssl_vit.export.targets import proof_images
from ssl_vit.objectives.mae import MAEConfig
from ssl_vit.runs.trained import open_trained
from ssl_vit.training.config import BatchConfig, RunConfig
from ssl_vit.training.continuing import check_run_folder
from ssl_vit.training.optim import OptimConfig
from tests.data.shards import write_parquet, write_tars
from tests.processes import finish, kill_at
from tests.test_resume import command, losses, same, weights

BAD = 17


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 images in 8 uneven shards, one image of which cannot be decoded: 12 steps of 8 are over two epochs."""
    return write_parquet(tmp_path_factory.mktemp("shards"), [9, 1, 5, 5, 2, 8, 6, 4], bad=(BAD,))


def streamed(source: str, run: Path, *flags: str) -> list[str]:
    given = (f"--data.source={source}", "--data.streaming=true", "--data.shuffle_buffer=16", "--data.num_readers=4")
    return command(Path(source), run, *given, *flags)


@pytest.fixture(scope="module")
def whole(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nobody disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    text = finish(streamed(shards, run))
    assert f"data       {shards}: 40 images, no labels" in text
    assert "no scores at the end: a stream needs evaluation.source, which is not set" in text
    assert "12 steps = 2.4 epochs" in text
    assert text.count("WARNING: images that cannot be decoded are passed over") == 1
    return run


def bad_images(run: Path) -> list[tuple]:
    records = [json.loads(line) for line in (run / "bad_images.jsonl").read_text().splitlines()]
    return [(Path(record["shard"]).name, record["row"], record["path"]) for record in records]


def bad_counts(run: Path) -> list[int]:
    return [json.loads(line)["bad_images"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_killed_streamed_run_ends_with_the_same_weights_bit_for_bit(
    shards: str, whole: Path, tmp_path: Path, num_workers: int
) -> None:
    run = tmp_path / "run"
    flags = (f"--data.num_workers={num_workers}", "--checkpoint.every_steps=2")
    words = streamed(shards, run, *flags)
    kill_at(words, 8)  # in the middle of the second epoch
    assert "Going on from" in finish(words)
    assert same(weights(whole), weights(run)) == []
    assert losses(run) == losses(whole)
    assert bad_images(run) == bad_images(whole) == [("part-03.parquet", 2, "17.png")]
    assert bad_counts(run) == bad_counts(whole)
    assert bad_counts(run)[-1] == 2
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["epoch"] == 2.4
    assert (run / "reconstructions.png").exists()


def test_two_processes_learn_from_a_stream_what_one_learns_and_one_goes_on_where_two_stopped(
    shards: str, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--encoder.drop_path_rate=0"]  # what is drawn on the device may depend on the process
    finish(streamed(shards, one, *flags))
    saving = ("--checkpoint.every_steps=3", "--checkpoint.keep=9", "--data.num_workers=2")
    text = finish(streamed(shards, two, *flags, *saving, "--batch.per_device=2"), num_processes=2)
    assert "2 processes on cpu" in text
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert sorted(bad_images(two)) == sorted(bad_images(one))
    for step in (9, 12):
        shutil.rmtree(two / "checkpoints" / f"step-{step:08d}")
    (two / "results.json").unlink()
    assert "step-00000006" in finish(streamed(shards, two, *flags))
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for name, value in weights(one).items():
        if not name.startswith("optimizer "):
            torch.testing.assert_close(weights(two)[name], value, rtol=1e-3, atol=2e-4)


def test_a_streamed_run_over_tars_is_judged_by_a_source_of_its_own_and_exported(
    photo_folder: Path, tmp_path: Path
) -> None:
    shards, run = write_tars(tmp_path / "shards", [6, 6]), tmp_path / "run"
    judged = (f"--evaluation.source={photo_folder}", "--evaluation.max_images=10")
    text = finish(streamed(shards, run, *judged, "--steps=3", "--data.num_samples=12"))
    assert "trained" in text
    assert json.loads((run / "results.json").read_text())["scores"]["trained"]["knn"]["n"] == 10
    described = json.loads((run / "config.json").read_text())["ssl_vit"]
    assert (described["source"], described["num_images"]) == (Path(shards).name, 12)
    assert proof_images(open_trained(run), asked=True).name == f"3 images of {code(Path(shards).name)}"


def test_epochs_of_unknown_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^epochs=3: the number of images of the stream is not known; .* --steps N"):
        RunConfig(objective=MAEConfig(), epochs=3).num_steps(None)


def test_automatic_settings_take_a_stream_of_unknown_length_for_one_epoch() -> None:
    config = RunConfig(objective=MAEConfig(), steps=100, batch=BatchConfig(size=256), optim=OptimConfig(warmup="auto"))
    found, reasons = config.resolve(None)
    known, _ = config.resolve(25_600)
    assert found == known
    assert reasons[-1] == "assuming one pass over 25,600 images; set --data.num_samples to be exact"


def test_a_run_from_before_these_settings_goes_on_and_none_of_them_may_change(tmp_path: Path) -> None:
    config = RunConfig(objective=MAEConfig(), output_dir=str(tmp_path), data=DataConfig(source="photos"))
    saved = as_plain(config)
    for name in ("streaming", "shuffle_buffer", "num_readers", "num_samples"):
        del saved["data"][name]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    check_run_folder(config)
    for data in (DataConfig(source="photos", streaming=True), DataConfig(source={"photos": 1.0, "more": 1.0})):
        with pytest.raises(ValueError, match="holds a run with other settings: data"):
            check_run_folder(dataclasses.replace(config, data=data))
