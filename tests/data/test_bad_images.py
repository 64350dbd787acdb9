import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data.bad_images import LOOKED_AT, BadImages, leave_out_bad, look_beforehand
from ssl_vit.data.config import DataConfig
from ssl_vit.data.decode import decode
from ssl_vit.data.decoded import DecodedSource, open_decoded
from ssl_vit.data.loader import Batches, TransformedSource
from ssl_vit.data.sampler import SampleKey, StepSampler
from ssl_vit.data.sources import images as sources
from ssl_vit.data.sources.images import MAX_TRIES, Source
from ssl_vit.data.sources.source import open_source
from ssl_vit.data.sources.stream import open_stream
from ssl_vit.objectives.mae import MAEConfig
from tests.data.broken import broken_files, noise
from tests.data.shards import write_parquet
from tests.specs import spec

CPU = torch.device("cpu")


def transform():
    return MAEConfig().build_transform(spec(32))


def folder_of(folder: Path, num_good: int, bad: tuple[int, ...] = ()) -> Source:
    """Images by number, in two classes in turns, some of them broken."""
    for number in range(num_good + len(bad)):
        path = folder / f"{number:03d}.png"
        noise().save(path)
        if number in bad:
            path.write_bytes(path.read_bytes()[:-40])
    return open_source(DataConfig(source=str(folder)))


def bad_images(source: Source, folder: Path, start_step: int = 0, **settings: float) -> BadImages:
    config = DataConfig(source=source.name, **settings)
    metrics = folder / "metrics.jsonl"
    return BadImages(source, config, folder, metrics=metrics, start_step=start_step, num_channels=3, is_writer=True)


def listed(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "bad_images.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_broken_file_is_replaced_counted_and_listed_with_its_reason(tmp_path: Path, num_workers: int) -> None:
    photos, run = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    run.mkdir()
    reasons = {}
    for number, broken in enumerate(broken_files().values()):
        noise().save(photos / f"{number:03d}-good.png")
        path = photos / f"{number:03d}.{broken.suffix}"
        path.write_bytes(broken.data)
        reasons[str(path)] = broken.reason
    source = open_source(DataConfig(source=str(photos)))
    bad = bad_images(source, run)
    sampler = StepSampler(num_samples=len(source), batch_size=len(source), num_steps=2, seed=0)
    batches = Batches(
        source, transform(), sampler, num_channels=3, num_workers=num_workers, device=CPU, note_bad=bad.note
    )
    for step, batch in enumerate(batches, start=1):
        assert set(batch) == {"images", "keep"}
        assert bad.settle(step) == step * len(reasons)
    records = listed(run)
    assert len(records) == len(reasons)
    assert {record["path"] for record in records} == set(reasons)
    for record in records:
        assert source.rows[record["row"]]["image"]["path"] == record["path"]
        assert re.search(reasons[record["path"]], record["reason"])


def test_a_bad_image_becomes_the_next_good_one_under_its_own_key(tmp_path: Path) -> None:
    source = folder_of(tmp_path, 5, bad=(2, 3, 6))
    source = open_source(DataConfig(source=str(tmp_path)))
    source = Source(source.name, source.rows, source.image_column, labels=np.arange(8), class_names=tuple("abcdefgh"))
    samples = TransformedSource(source, transform(), 3, seed=4, skip_bad=True)
    strict = TransformedSource(source, transform(), 3, seed=4)
    for bad, good in ((2, 4), (3, 4), (6, 7)):
        found, expected = samples[SampleKey(1, 5, bad)], strict[SampleKey(1, 5, good)]
        assert int(found.pop("bad_row")) == bad
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert int(samples[SampleKey(1, 5, 4)]["bad_row"]) == -1
    with pytest.raises(ValueError, match="row 2"):
        strict[SampleKey(1, 5, 2)]


def test_the_next_good_one_is_looked_for_round_the_end_and_not_forever(tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "none").mkdir()
    source = folder_of(tmp_path / "few", 1, bad=(1, 2))
    assert source.next_image(1, 3)[1] == 0
    for number in range(MAX_TRIES + 5):
        (tmp_path / "none" / f"{number}.png").touch()
    source = open_source(DataConfig(source=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"row 3 \(.*\): the file is empty; nor can any of the next 49 be decoded"):
        source.next_image(3, 3)


def test_rows_and_counts_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    source = folder_of(tmp_path / "photos", 90, bad=(1, 2, 3))
    bad = bad_images(source, tmp_path)
    bad.note(torch.tensor([-1, 1, -1, 1]))
    assert bad.settle(1) == 2
    bad.note(torch.tensor([2]))
    assert bad.settle(2) == 3
    assert [(record["step"], record["row"]) for record in listed(tmp_path)] == [(1, 1), (2, 2)]
    with (tmp_path / "bad_images.jsonl").open("a") as file:
        file.write('{"step": 3, "ro')  # killed while writing
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "bad_images": 2}\n{"step": 1, "eval": 0.5}\n')
    again = bad_images(source, tmp_path, start_step=1)
    assert (again.count, again.rows) == (2, {(None, 1)})
    again.note(torch.tensor([2, 3]))
    assert again.settle(2) == 4
    assert [record["row"] for record in listed(tmp_path)] == [1, 2, 3]
    assert "cut off" in listed(tmp_path)[2]["reason"]


def test_a_run_that_draws_too_many_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    source = folder_of(tmp_path / "photos", 17, bad=(0, 1, 2))
    bad = bad_images(source, tmp_path, max_bad_share=0.1)
    bad.note(torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]))
    bad.settle(1)
    bad.check(99)  # too few to judge by
    with pytest.raises(ValueError, match=r"^data.max_bad_share=0.1: 11 of the 109 images drawn so far .*jsonl says"):
        bad.check(109)
    bad.check(110)
    bad.note(torch.tensor([2]))
    bad.settle(2)
    with pytest.raises(ValueError, match=r"3 of the source's 20 images cannot be decoded"):
        bad.check(10_000)
    lenient = bad_images(source, tmp_path, start_step=2, max_bad_share=1.0)
    assert lenient.rows == {(None, 0), (None, 1), (None, 2)}
    lenient.check(1000)


def test_rows_that_cannot_be_decoded_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder_of(tmp_path, 5, bad=(2, 6))
    readable = leave_out_bad(source, 3, 0)
    assert [Path(row["image"]["path"]).stem for row in readable.rows] == ["000", "001", "003", "004", "005"]
    assert "2 of the 7 evaluation images" in capsys.readouterr().out
    assert leave_out_bad(readable, 3, 0) is readable


def test_a_file_that_may_not_be_read_is_replaced_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    source = folder_of(tmp_path / "photos", 4)
    locked, read = tmp_path / "photos" / "002.png", sources.read_file

    def refuse(path: Path, most: int) -> bytes:  # to root, who may run this, the system refuses nothing
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, most)

    for module in (decode, sources):
        monkeypatch.setattr(module, "read_file", refuse)
    bad = bad_images(source, tmp_path)
    sampler = StepSampler(num_samples=4, batch_size=4, num_steps=1, seed=0)
    list(Batches(source, transform(), sampler, num_channels=3, num_workers=0, device=CPU, note_bad=bad.note))
    assert bad.settle(1) == 1
    (record,) = listed(tmp_path)
    assert record["path"] == str(locked)
    assert "Permission denied" in record["reason"]


@pytest.fixture
def many(tmp_path: Path) -> Callable[..., Source]:
    """A folder of images, the first of which are cut off."""

    def many(num_images: int, num_bad: int, suffix: str = "png", channels: int = 3) -> Source:
        shape = (8, 8, channels) if channels > 1 else (8, 8)
        pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
        for number in range(num_images):
            file = tmp_path / "many" / f"{number:04d}.{suffix}"
            file.parent.mkdir(exist_ok=True)
            if suffix == "npy":
                np.save(file, pixels.transpose(2, 0, 1))
            else:
                Image.fromarray(pixels).save(file)
            if number < num_bad:
                file.write_bytes(file.read_bytes()[:-20])
        return open_source(DataConfig(str(tmp_path / "many"), label_column="none"))

    return many


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize(("num_bad", "refused"), [(0, False), (2, False), (3, True), (20, True)])
def test_a_small_source_is_looked_at_as_a_whole(
    many: Callable[..., Source], capsys: pytest.CaptureFixture[str], suffix: str, num_bad: int, refused: bool
) -> None:
    source, config = many(40, num_bad, suffix), DataConfig("x", max_bad_share=0.05)
    if refused:
        with pytest.raises(ValueError, match=rf"max_bad_share=0.05: {num_bad} of the source's 40 images cannot be"):
            look_beforehand(source, config, 3)
        look_beforehand(source, DataConfig("x", max_bad_share=0.5), 3)
    else:
        look_beforehand(source, config, 3)
    assert (f"note       {num_bad} of the source's 40 images cannot be decoded" in capsys.readouterr().out) is (
        num_bad > 0
    )


@pytest.mark.parametrize(("num_bad", "refused"), [(15, False), (25, False), (150, True)])
def test_a_large_source_is_refused_only_by_more_than_chance(
    many: Callable[..., Source], num_bad: int, refused: bool
) -> None:
    source, config = many(LOOKED_AT + 44, num_bad), DataConfig("x", max_bad_share=0.05)
    if refused:
        with pytest.raises(
            ValueError, match=rf"\d+ of {LOOKED_AT} images looked at cannot be decoded; the first: .*row"
        ):
            look_beforehand(source, config, 3)
    else:
        look_beforehand(source, config, 3)


@pytest.mark.parametrize("on_bad_image", ["skip", "raise"])
@pytest.mark.parametrize(("suffix", "channels", "wanted"), [("png", 3, 12), ("npy", 5, 3), ("npy", 12, 5)])
def test_images_of_other_channels_than_the_encoder_has_are_refused_beforehand(
    many: Callable[..., Source], suffix: str, channels: int, wanted: int, on_bad_image: str
) -> None:
    source, config = many(4, 0, suffix, channels), DataConfig("x", on_bad_image=on_bad_image)
    with pytest.raises(ValueError, match=rf"none of the 4 images .* with encoder.in_chans={wanted}"):
        look_beforehand(source, config, wanted)
    look_beforehand(source, config, channels)


def test_what_was_decoded_beforehand_is_known_to_the_last(many: Callable[..., Source]) -> None:
    source, config = many(300, 20), DataConfig("x", max_bad_share=0.05, cache="ram", cache_side=8)
    decoded = open_decoded(source, config, 3)
    with pytest.raises(ValueError, match=r"20 of the source's 300 images cannot .*cut off"):
        look_beforehand(decoded, config, 3)


@pytest.mark.parametrize("num_bad", [20, LOOKED_AT + 30])
def test_what_can_be_decoded_by_now_is_not_bad(many: Callable[..., Source], tmp_path: Path, num_bad: int) -> None:
    source, config = many(300, num_bad), DataConfig("x", max_bad_share=0.05, cache="ram", cache_side=8)
    decoded = open_decoded(source, config, 3)
    assert isinstance(decoded, DecodedSource)
    assert (decoded.decoded.table[:, 0] < 0).sum() == num_bad
    files = sorted((tmp_path / "many").iterdir())
    for file in files[:num_bad]:
        file.write_bytes(files[-1].read_bytes())
    look_beforehand(decoded, config, 3)


def test_a_small_bad_shard_says_little_of_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_parquet(tmp_path, [2, 100], bad=(0, 1))
    config = DataConfig(source, streaming=True)
    look_beforehand(open_stream(config), config, 3)
    assert f"note       2 of {MAX_TRIES} images looked at cannot be decoded" in capsys.readouterr().out
    everything = DataConfig(write_parquet(tmp_path / "small", [2, 3], bad=(0, 1)), streaming=True)
    with pytest.raises(ValueError, match="2 of the source's 5 images cannot be decoded"):
        look_beforehand(open_stream(everything), everything, 3)


def test_a_source_of_one_bad_image_has_no_next_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 0 \(.*\): the PNG file is cut off$"):
        folder_of(tmp_path, num_good=0, bad=(0,)).next_image(0, 3)
