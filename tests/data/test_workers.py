"""What loader processes are told, and what is said when one dies."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from scripts.pretrain_mae import DEFAULTS
from ssl_vit.data.loader import Batches
from ssl_vit.data.sampler import StepSampler
from ssl_vit.data.sources import images as sources
from ssl_vit.data.sources.source import DataConfig, Source, open_source
from ssl_vit.data.transform import Transform
from ssl_vit.data.workers import check_num_workers, choose_num_workers
from ssl_vit.evaluation.features import pixel_features
from ssl_vit.objectives.mae import MAEConfig
from ssl_vit.training.config import parse_run
from tests.data.broken import noise
from tests.interrupted import run
from tests.specs import spec

CPU = torch.device("cpu")


class Signed:
    """A transform whose samples say which process made them."""

    def __init__(self) -> None:
        self.own = MAEConfig().build_transform(spec(32))

    def __call__(self, image: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        torch.rand(3)  # global generators are of no consequence
        np.random.rand(3)  # noqa: NPY002
        return self.own(image, rng) | {"process": torch.tensor(os.getpid())}

    def on_device(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        return self.own.on_device(batch, device) | {"process": batch["process"]}


class Deadly(Signed):
    """A transform that kills its own process at the image of one row, as a decoder's crash does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __call__(self, image: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        if int(image[0, 0, 0]) == 255:
            os.kill(os.getpid(), self.number)
        return super().__call__(image, rng)


def batches(
    source: Source, transform: Transform, num_workers: int, *, num_steps: int = 12, skip: bool = False
) -> Batches:
    sampler = StepSampler(num_samples=len(source), batch_size=4, num_steps=num_steps, seed=0)
    note_bad = (lambda rows: None) if skip else None
    return Batches(source, transform, sampler, num_channels=3, num_workers=num_workers, device=CPU, note_bad=note_bad)


def test_workers_are_chosen_from_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_vit.data.workers.num_cpus", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose_num_workers("auto", CPU) == 0
    assert choose_num_workers("auto", torch.device("cuda")) == 3
    assert choose_num_workers(5, CPU) == 5


def test_auto_was_once_written_as_minus_one() -> None:
    assert DataConfig(num_workers=-1).num_workers == check_num_workers("auto") == "auto"
    for given, expected in (("-1", "auto"), ("auto", "auto"), ("3", 3)):
        assert parse_run(DEFAULTS, [f"--data.num_workers={given}"]).data.num_workers == expected
    with pytest.raises(ValueError, match=r"data.num_workers=some: expected int or "):
        parse_run(DEFAULTS, ["--data.num_workers=some"])


def test_workers_live_for_the_whole_run_and_draw_nothing_of_their_own(photo_folder: Path) -> None:
    source = open_source(DataConfig(source=str(photo_folder)))
    torch.manual_seed(1)
    with batches(source, Signed(), 2, num_steps=35) as one:
        first = list(one)
    torch.manual_seed(2)
    second = list(batches(source, Signed(), 0, num_steps=35))
    # Three and a half epochs.
    assert len(set(torch.cat([batch.pop("process") for batch in first]).tolist()) - {os.getpid()}) == 2
    assert set(torch.cat([batch.pop("process") for batch in second]).tolist()) == {os.getpid()}
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def _spawn() -> Iterator[None]:
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("spawn", force=True)
    yield
    torch.multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("_spawn")
def test_workers_may_be_started_by_spawn(photo_folder: Path) -> None:
    source = open_source(DataConfig(source=str(photo_folder)))
    with batches(source, Signed(), 1, num_steps=3, skip=True) as spawned:
        found = list(spawned)
    for a, b in zip(found, batches(source, Signed(), 0, num_steps=3), strict=True):
        assert set(a.pop("process").tolist()).isdisjoint(b.pop("process").tolist())
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("number", "advice"), [(signal.SIGKILL, "fewer --data.num_workers"), (signal.SIGSEGV, "decoder")]
)
@pytest.mark.parametrize("in_a_step", [False, True])
# torch's signal handler raises the news wherever Python happens to be, also where errors are ignored.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_is_killed_names_the_image_it_was_at(
    tmp_path: Path, number: signal.Signals, advice: str, in_a_step: bool
) -> None:
    for row in range(24):
        image = noise()
        image.putpixel((0, 0), (255 if row == 13 else 0, 0, 0))
        image.save(tmp_path / f"{row:02d}.png")
    # The worker is at the row after a bad one, not at the one that was drawn.
    (tmp_path / "12.png").write_bytes(b"no image")
    source = open_source(DataConfig(source=str(tmp_path)))

    def train() -> None:
        with batches(source, Deadly(number), 2, skip=True) as of_run:
            for _ in of_run:
                if in_a_step:
                    time.sleep(10)  # until the news comes by a signal

    expected = rf"^data.source='{tmp_path}': row 13 \({tmp_path}/13.png\): the loader worker .* was killed \(.*{advice}"
    with pytest.raises(ValueError, match=expected) as raised:
        train()
    assert len(str(raised.value).splitlines()) == 1


def test_a_killed_worker_is_found_after_others_have_waited_for_it(photo_folder: Path) -> None:
    with batches(open_source(DataConfig(source=str(photo_folder))), Signed(), 1) as of_run:
        process = int(next(of_run)["process"][0])
        os.kill(process, signal.SIGKILL)
        with suppress(RuntimeError):  # torch's signal handler may raise the news here
            time.sleep(1)
        (worker,) = of_run._iterator._workers
        worker.join(30)  # as torch's loader does when a queue breaks: nobody can wait for the process again
        with pytest.raises(ValueError, match="the loader worker at this image was killed"), of_run._naming():
            raise ConnectionResetError


def _crash_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let decoding a file kill a loader worker."""
    decode, process = sources.decode, os.getpid()

    def crash(data: Path, *args: Any) -> Tensor:
        if data.name == name and os.getpid() != process:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(data, *args)

    monkeypatch.setattr(sources, "decode", crash)


def test_a_worker_of_an_evaluation_that_is_killed_names_the_image(
    photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _crash_at("07.png", monkeypatch)
    source = open_source(DataConfig(source=str(photo_folder)))
    with pytest.raises(ValueError, match=r"07.png\): the loader worker at this image was killed \(Killed\)"):
        pixel_features(source, np.arange(len(source)), 3, num_workers=1)


def test_an_error_that_no_worker_died_of_is_left_alone(photo_folder: Path) -> None:
    source = open_source(DataConfig(source=str(photo_folder)))

    def train() -> None:
        with batches(source, Signed(), 1) as of_run:
            next(of_run)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        train()


@pytest.mark.usefixtures("_fresh_state")
def test_a_run_whose_worker_is_killed_ends_in_one_line_and_code_1(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _crash_at("07.png", monkeypatch)
    given = [f"--data.source={photo_folder}", f"--output_dir={tmp_path / 'run'}", "--steps=12", "--data.num_workers=1"]
    assert run(*given, "--data.label_column=none") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "07.png): the loader worker at this image was killed (Killed); " in line
