import os
import signal
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_vit.data.config import DataConfig
from ssl_vit.data.sources import stream as streams
from ssl_vit.data.sources.stream import BadSample, ReaderState, ShardSchedule, choose_num_readers, open_stream
from ssl_vit.data.stream_loader import StreamLoader, passing_errors_on
from tests.data.shards import number_of, write_parquet, write_tars

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_is_cached(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stream leaves no copy of the data set behind."""
    cache = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    yield
    assert [path for path in cache.rglob("*") if path.suffix in (".arrow", ".parquet", ".tar")] == []


@pytest.fixture(autouse=True)
def nothing_hangs() -> Any:
    def stop(*_: object) -> None:
        raise TimeoutError("a stream hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(200)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Numbers:
    """A transform that gives which image it is, and a random number of the sample's own."""

    def __call__(self, image: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        return {"number": torch.tensor(number_of(image)), "draw": torch.tensor(rng.random())}

    def on_device(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        return batch


def config(source: str, **settings: Any) -> DataConfig:
    return DataConfig(source=source, streaming=True, **{"shuffle_buffer": 40, **settings})


def loaders(given: DataConfig, num_processes: int = 1, state: dict | None = None, seed: int = 0) -> list[StreamLoader]:
    stream = open_stream(given)
    return [StreamLoader.open(stream, given, seed, index, num_processes, state) for index in range(num_processes)]


def steps(
    opened: list[StreamLoader],
    num_steps: int,
    *,
    start_step: int = 0,
    batch_size: int = 8,
    num_micro: int = 1,
    num_workers: int = 0,
    bad: list[BadSample] | None = None,
) -> list[list[tuple[int, float]]]:
    """What each step learns from, in the order of its samples in a run of one process."""
    found: list[list[tuple[int, float]]] = []
    generators = [
        loader.batches(
            Numbers(),
            batch_size=batch_size,
            num_steps=num_steps,
            start_step=start_step,
            num_micro=num_micro,
            num_channels=3,
            num_workers=num_workers,
            device=CPU,
            note_bad=None if bad is None else bad.extend,
        )
        for loader in opened
    ]
    for _ in range(start_step, num_steps):
        parts: list[list[tuple[int, float]]] = [[] for _ in generators]
        for _ in range(num_micro):
            for part, generator in zip(parts, generators, strict=True):
                batch = next(generator)
                part += zip(batch["number"].tolist(), batch["draw"].tolist(), strict=True)
        found.append([sample for together in zip(*parts, strict=True) for sample in together])
    for generator in generators:
        generator.close()
    return found


def numbers(found: list[list[tuple[int, float]]]) -> list[int]:
    return [number for step in found for number, _ in step]


def state_of(opened: list[StreamLoader]) -> dict[str, Any]:
    """As `StreamLoader.state` gathers it from several processes."""
    states = [
        state for together in zip(*(loader.states.tolist() for loader in opened), strict=True) for state in together
    ]
    return {
        "num_readers": opened[0].schedule.num_readers,
        "num_shards": len(opened[0].schedule.stream.shards),
        "places": states,
    }


@pytest.mark.parametrize("write", [write_parquet, write_tars])
@pytest.mark.parametrize("sizes", [[5] * 8, [17, 1, 2, 9, 4, 3, 3, 1], [37], [13, 0, 22, 3]])
def test_two_processes_of_two_workers_see_each_sample_once_an_epoch(
    tmp_path: Path, write: Any, sizes: list[int]
) -> None:
    """Shards of equal size, of very different sizes, and fewer than workers."""
    opened = loaders(config(write(tmp_path, sizes)), num_processes=2)
    total = sum(sizes)
    assert opened[0].schedule.stream.num_samples == total
    seen = numbers(steps(opened, 15, num_workers=2))
    for epoch in range(3):
        assert sorted(seen[total * epoch : total * (epoch + 1)]) == list(range(total))
    assert seen[:total] != seen[total : 2 * total]


@pytest.mark.parametrize("known", [True, False])
def test_what_a_step_learns_from_follows_from_no_number_of_processes_workers_or_micro_batches(
    tmp_path: Path, known: bool
) -> None:
    given = config(write_tars(tmp_path, [6] * 8), num_samples=None if known else 48)
    plain = steps(loaders(given), 9)
    assert plain == steps(loaders(given), 9, num_workers=2)
    assert plain == steps(loaders(given), 9, num_workers=2, num_micro=4)
    assert plain == steps(loaders(given, num_processes=2), 9, num_workers=2, num_micro=2)
    assert plain == steps(loaders(given, num_processes=4), 9)
    assert plain != steps(loaders(given, seed=1), 9)


def test_where_rows_are_not_counted_equal_shards_are_seen_once_before_any_twice(tmp_path: Path) -> None:
    opened = loaders(config(write_tars(tmp_path, [5] * 8), num_samples=40), num_processes=2)
    assert opened[0].schedule.stream.counts is None
    assert opened[0].notes() == []
    seen = numbers(steps(opened, 10, num_workers=2))
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40))


@pytest.mark.parametrize("sizes", [[30, 1, 1, 1, 1, 1, 1], [36], [20, 0, 16]])
def test_uneven_shards_that_are_not_counted_never_hang_and_lose_nothing(tmp_path: Path, sizes: list[int]) -> None:
    given = config(write_tars(tmp_path, sizes), num_samples=36)
    opened = loaders(given, num_processes=2)
    assert "begin their next epoch earlier" in " ".join(opened[0].notes())
    assert set(numbers(steps(opened, 40, num_workers=2))) == set(range(36))
    schedule = opened[0].schedule
    for epoch in range(3):  # what the readers read in an epoch is all of it, once
        read = Counter(
            (part.shard, row)
            for reader in range(schedule.num_readers)
            for part in schedule.slices(epoch, reader)
            for row, _ in schedule.stream.read(*part)
        )
        assert len(read) == 36
        assert set(read.values()) == {1}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("known", [True, False])
def test_any_step_can_be_gone_on_from_with_other_numbers_of_processes_and_workers(
    tmp_path: Path, known: bool, num_workers: int
) -> None:
    # Blocks of three, and steps after which another reader is next.
    sizes, settings = [7, 5, 6, 6, 9, 4, 8, 3], {"batch_size": 12}
    given = config(write_tars(tmp_path, sizes), shuffle_buffer=24, num_samples=None if known else 48)
    whole = steps(loaders(given, num_processes=2), 8, **settings)
    for stop in (1, 4) if num_workers else (0, 1, 3, 4, 7):
        opened = loaders(given, num_processes=2)
        assert steps(opened, stop, num_workers=num_workers, **settings) == whole[:stop]
        state = state_of(opened)
        for num_processes in (1, 2) if num_workers else (1, 2, 4):
            again = loaders(given, num_processes, state)
            found = steps(again, 8, start_step=stop, num_workers=num_workers, **settings)
            assert found == whole[stop:], (stop, num_processes)


def test_workers_that_are_ahead_do_not_move_the_place_that_is_saved(tmp_path: Path) -> None:
    given = config(write_parquet(tmp_path, [10] * 4))
    (loader,) = loaders(given)
    before = loader.state()
    batches = loader.batches(
        Numbers(),
        batch_size=4,
        num_steps=50,
        start_step=0,
        num_micro=1,
        num_channels=3,
        num_workers=2,
        device=CPU,
    )
    next(batches)
    assert [place[4] - old[4] for place, old in zip(loader.state()["places"], before["places"], strict=True)] == [1] * 4
    batches.close()


class Deadly(Numbers):
    """A transform that kills its own process at one image, as a decoder's crash does."""

    def __call__(self, image: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        if number_of(image) == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(image, rng)


@pytest.mark.parametrize("in_a_step", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_is_killed_names_the_image_it_was_at(tmp_path: Path, in_a_step: bool) -> None:
    given = config(write_parquet(tmp_path, [10] * 4))
    (loader,) = loaders(given)
    batches = loader.batches(
        Deadly(), batch_size=4, num_steps=50, start_step=0, num_micro=1, num_channels=3, num_workers=1, device=CPU
    )

    def train() -> None:
        with passing_errors_on(batches) as read:
            for _ in read:
                if in_a_step:
                    time.sleep(10)  # until the news comes by a signal

    with pytest.raises(ValueError, match=r"^data.source=.*1.parquet, row 3: the loader worker .* was killed \(Killed"):
        train()


def test_other_processes_or_shards_are_refused_with_what_would_work(tmp_path: Path) -> None:
    given = config(write_parquet(tmp_path, [5] * 8), num_readers=4)
    state = state_of(loaders(given))
    with pytest.raises(ValueError, match=r"^data.streaming=True: 3 processes cannot share the 4 readers .*: 1, 2, 4$"):
        loaders(given, 3, state)
    write_parquet(tmp_path, [5] * 9)
    with pytest.raises(ValueError, match=r"has 9 shards, and the run began with 8; give it the same ones"):
        loaders(given, 1, state)


@pytest.mark.parametrize(
    ("num_shards", "wanted", "num_processes", "readers"),
    [
        (8, 32, 1, 8),
        (1000, 32, 1, 32),
        (1000, 32, 8, 32),
        (1000, 32, 3, 24),
        (1, 32, 4, 4),
        (7, 32, 2, 4),
        (9, 1, 1, 1),
    ],
)
def test_readers_are_shared_evenly(num_shards: int, wanted: int, num_processes: int, readers: int) -> None:
    assert choose_num_readers(num_shards, wanted, num_processes) == readers


def test_fewer_workers_start_where_readers_are_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (loader,) = loaders(config(write_parquet(tmp_path, [5] * 5)))
    assert loader.choose_num_workers(3, 8) == 2
    assert loader.choose_num_workers(9, 8) == 4
    assert loader.choose_num_workers(9, 6) == 2
    assert loader.choose_num_workers(0, 8) == 0
    steps([loader], 1, num_workers=3)
    assert "2 of 3 loader workers start" in capsys.readouterr().out


def test_blocks_are_shuffled_anew_and_crops_with_them(tmp_path: Path) -> None:
    stream = open_stream(config(write_parquet(tmp_path, [24])))
    schedule = ShardSchedule(stream, seed=0, num_readers=1, block_size=8)
    drawn = [(sample.row, sample.key) for sample, _ in islice(schedule.samples(0, ReaderState()), 48)]
    rows = [row for row, _ in drawn]
    for start in range(0, 48, 8):  # no sample leaves its block
        assert sorted(rows[start : start + 8]) == list(range(start % 24, start % 24 + 8))
    orders = [[row - min(rows[start : start + 8]) for row in rows[start : start + 8]] for start in range(0, 48, 8)]
    assert len({tuple(order) for order in orders}) == 6
    assert len({(key.epoch, key.position) for _, key in drawn}) == 48


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_passed_over_and_named(tmp_path: Path, num_workers: int) -> None:
    given = config(write_parquet(tmp_path, [6, 6], bad=(2, 3, 7)))
    whole_bad: list[BadSample] = []
    whole = steps(loaders(given), 9, batch_size=4, bad=whole_bad, num_workers=num_workers)
    counts = Counter(numbers(whole))  # of nine good images, which two readers go through at their own pace
    assert set(counts) == set(range(12)) - {2, 3, 7}
    assert max(counts.values()) - min(counts.values()) <= 2
    assert {(Path(str(bad.shard)).name, bad.row, bad.path) for bad in whole_bad} == {
        ("part-00.parquet", 2, "2.png"),
        ("part-00.parquet", 3, "3.png"),
        ("part-01.parquet", 1, "7.png"),
    }
    assert "no image" not in whole_bad[0].reason
    assert whole_bad[0].reason
    bad: list[BadSample] = []
    opened = loaders(given)
    found = steps(opened, 4, batch_size=4, bad=bad, num_workers=num_workers)
    found += steps(loaders(given, state=state_of(opened)), 9, start_step=4, batch_size=4, bad=bad)
    assert found == whole
    assert bad == whole_bad
    with pytest.raises(ValueError, match=r"part-0\d.parquet, row \d \(\d.png\): ") as caught:
        steps(loaders(given), 9, num_workers=num_workers)
    assert "\n" not in str(caught.value)


def test_a_stream_of_bad_images_alone_stops(tmp_path: Path) -> None:
    given = config(write_parquet(tmp_path, [6], bad=tuple(range(6))))
    with pytest.raises(ValueError, match=r"row \d .*; nor can any of the next 49 be decoded"):
        steps(loaders(given), 1, bad=[])


def test_readers_that_are_given_nothing_stop(tmp_path: Path) -> None:
    opened = loaders(config(write_tars(tmp_path, [5]), num_samples=5))
    write_tars(tmp_path, [0])
    with pytest.raises(ValueError, match="holds too few samples for 1 readers"):
        steps(opened, 2)


def test_a_shard_that_is_damaged_further_on_is_named(tmp_path: Path) -> None:
    pattern = write_tars(tmp_path, [9, 9])
    given = config(pattern, num_samples=18)
    path = tmp_path / "part-01.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"^data.source='.*': .*/part-01.tar cannot be read: "):
        steps(loaders(given), 3)
    with pytest.raises(
        ValueError, match=r"part-01.tar is not a tar file, or is empty or damaged: unexpected end of data"
    ):
        open_stream(config(pattern))


def test_a_hub_data_set_is_streamed_and_its_number_of_images_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = write_parquet(tmp_path, [4, 4])
    load = datasets.load_dataset_builder
    calls: list[str] = []

    def stand_in(name: str) -> Any:
        calls.append(name)
        builder = load("parquet", data_files={"validation": pattern})
        monkeypatch.setattr(streams, "check_own_files", lambda *_: None)  # those of a folder here
        builder.info.splits = datasets.SplitDict({"validation": datasets.SplitInfo("validation", num_examples=8)})
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", stand_in)
    given = config("someone/pictures", split="validation")
    stream = open_stream(given)
    assert calls == ["someone/pictures"]
    assert (stream.num_samples, stream.counts, stream.shards) == (8, None, ("shard 0", "shard 1"))
    assert sorted(numbers(steps(loaders(given), 1))) == list(range(8))
    assert open_stream(config("someone/pictures", split="validation", num_samples=5)).num_samples == 5
