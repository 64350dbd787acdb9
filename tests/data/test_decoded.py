"""Images that were decoded beforehand are those that would have been decoded, whatever happens on the way."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data import decoded
from ssl_vit.data.decode.decode import decode
from ssl_vit.data.decoded import DecodedSource, open_decoded, shrink
from ssl_vit.data.sources import images as sources
from ssl_vit.data.sources.source import DataConfig, Source, open_source
from tests.data.broken import broken_files

SIDE = 24


@pytest.fixture
def photos(photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of several shapes, kinds and sizes, smaller ones than the side too, and two that are bad."""
    folder = tmp_path / "photos"
    shutil.copytree(photo_folder / "disc", folder)
    rng = np.random.default_rng(0)
    for number, (size, mode) in enumerate({(9, 300): "L", (24, 24): "RGBA", (10, 12): "RGB", (200, 25): "RGB"}.items()):
        pixels = rng.integers(0, 256, (*size, 4), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"odd{number}.png")
    for name in ("half a jpeg", "html page"):
        (folder / f"bad {name}.jpg").write_bytes(broken_files()[name].data)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return folder


def settings(photos: Path, cache: str = "disk", side: int = SIDE) -> DataConfig:
    return DataConfig(source=str(photos), cache=cache, cache_side=side, cache_dir=str(photos.parent / "cache"))


def opened(photos: Path, cache: str = "disk", side: int = SIDE, num_channels: int = 3) -> DecodedSource:
    config = settings(photos, cache, side)
    source = open_decoded(open_source(config), config, num_channels)
    assert isinstance(source, DecodedSource)
    return source


def entries(photos: Path) -> list[Path]:
    return [path for path in (photos.parent / "cache").iterdir() if path.suffix != ".lock"]


def temporary_folder(photos: Path) -> Path:
    return photos.parent / "tmp" / f"ssl_vit-{os.getuid()}"


@pytest.mark.parametrize("cache", ["ram", "disk"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_pixels_are_those_of_the_decoder_made_smaller(photos: Path, cache: str, num_channels: int) -> None:
    source, kept = open_source(settings(photos)), opened(photos, cache, num_channels=num_channels)
    shapes = set()
    for row in range(len(source)):
        path = Path(source.rows[row]["image"]["path"])
        if path.name.startswith("bad"):
            messages = []
            for each in (source, kept):
                with pytest.raises(ValueError, match=r"row \d+ ") as raised:
                    each.image(row, num_channels)
                messages.append(str(raised.value))
            assert messages[0] == messages[1]
            continue
        image, expected = kept.image(row, num_channels), shrink(decode(path, num_channels), SIDE)
        if num_channels > 1:
            assert image.stride()[0] == 1  # as the decoder leaves them, which makes crops fast
        assert torch.equal(image, expected)
        assert min(image.shape[1:]) <= SIDE
        shapes.add(tuple(image.shape[1:]))
    assert {(29, 24), (9, 300), (24, 24), (10, 12), (192, 24)} == shapes
    # Whoever writes into an image spoils that copy alone.
    before = kept.image(5, num_channels).clone()
    kept.image(5, num_channels).zero_()
    assert torch.equal(kept.image(5, num_channels), before)
    assert kept.next_image(20, num_channels)[1] == source.next_image(20, num_channels)[1] == 22
    part = kept.subset(np.array([7]))
    assert type(part) is Source
    assert part.image(0, 3).shape == (3, 48, 40)


def test_shorter_sides_shrink_to_the_side_and_nothing_grows() -> None:
    for before, after in {(48, 40): (29, 24), (1000, 25): (960, 24), (24, 90): (24, 90), (2, 3): (2, 3)}.items():
        assert shrink(torch.zeros(3, *before, dtype=torch.uint8), SIDE).shape == (3, *after)
    # Antialiased: lines too fine to be kept become grey.
    lines = torch.zeros(3, 120, 120, dtype=torch.uint8)
    lines[:, ::2] = 255
    assert (shrink(lines, SIDE).int() - 128).abs().max() < 20


def test_what_is_on_disk_is_decoded_once_and_again_after_a_change(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(photos)
    assert "26 images, 2 of them bad" in capsys.readouterr().out
    (done,) = entries(photos)

    def builds(side: int = SIDE, num_channels: int = 3) -> bool:
        opened(photos, side=side, num_channels=num_channels)
        return "decoded in" in capsys.readouterr().out

    assert not builds()
    assert builds(side=20)
    assert builds(num_channels=1)
    assert not builds()
    with (done / "pixels.bin").open("r+b") as file:
        file.truncate(1000)
    assert builds()
    assert torch.equal(opened(photos).image(7, 3), shrink(open_source(settings(photos)).image(7, 3), SIDE))
    Image.fromarray(np.full((30, 30, 3), 7, np.uint8)).save(photos / "07.png")
    assert builds()
    assert (opened(photos).image(7, 3) == 7).all()
    assert len(entries(photos)) == 4


def test_rows_with_bytes_of_their_own_are_kept_apart_by_their_data_set(tmp_path: Path) -> None:
    saved, cache = str(tmp_path / "saved"), str(tmp_path / "cache")
    config = DataConfig(source=saved, cache="disk", cache_side=SIDE, cache_dir=cache)
    for value in (3, 4):
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        images = [Image.fromarray(np.full((30, 30, 3), value, np.uint8))]
        rows = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))
        rows.save_to_disk(tmp_path / "saved")
        assert (open_decoded(open_source(config), config, 3).image(0, 3) == value).all()


def test_with_another_decoder_all_are_decoded_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(photos).decoded.folder
    assert opened(photos).decoded.folder == first
    monkeypatch.setattr(decoded, "optional_decoders", lambda: {"pillow_heif": "1"})
    assert opened(photos).decoded.folder != first


def test_a_source_of_bad_images_alone_is_kept_too(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="not an image"):
        opened(tmp_path / "photos").image(0, 3)


def _build(photos: Path, seconds: float, cache: str, sums: "multiprocessing.Queue[int]") -> None:
    """Decode slowly, as a run of its own."""
    own = sources.decode

    def slow(data: bytes | str | Path, *args: int) -> torch.Tensor:
        time.sleep(seconds)
        return own(data, *args)

    sources.decode, decoded._SAMPLE = slow, 1
    sums.put(int(opened(photos, cache).image(7, 3).sum()))


def start(photos: Path, seconds: float, cache: str = "disk") -> "tuple[Any, multiprocessing.Queue[int]]":
    context = multiprocessing.get_context("fork")
    sums = context.Queue()
    process = context.Process(target=_build, args=(photos, seconds, cache, sums))
    process.start()
    return process, sums


def test_a_kill_in_the_middle_leaves_nothing_half(photos: Path) -> None:
    process, _ = start(photos, 0.3)
    while not list(photos.parent.glob("cache/unfinished-*/pixels.bin")):
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    assert [path.name[:11] for path in entries(photos)] == ["unfinished-"]
    expected = shrink(open_source(settings(photos)).image(7, 3), SIDE)
    # What another one left behind is cleared away as well; what is under way is not.
    (photos.parent / "cache" / "unfinished-left").mkdir()
    (photos.parent / "cache" / "unfinished-busy").mkdir()
    with decoded.FileLock(photos.parent / "cache" / "busy.lock"):
        assert torch.equal(opened(photos).image(7, 3), expected)
    names = sorted(path.name for path in entries(photos))
    assert len(names) == 2
    assert names[1] == "unfinished-busy"


def test_of_two_runs_at_once_one_decodes_and_the_other_waits(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    both = [start(photos, 0.1) for _ in range(2)]
    assert len({sums.get(timeout=60) for _, sums in both}) == 1
    for process, _ in both:
        process.join()
    text = capfd.readouterr().out
    assert text.count("decoded in") == text.count("another run decodes these images; waiting for") == 1
    assert len(entries(photos)) == 1


def test_too_little_space_is_refused_before_anything_is_decoded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "_decode_all", lambda *_: pytest.fail("decoded"))
    free = {"disk": 10_000, "memory": 10**9}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free["disk"]))
    monkeypatch.setattr(decoded.psutil, "virtual_memory", lambda: SimpleNamespace(available=free["memory"]))
    expected = r"^data.cache_dir='.*cache': 26 decoded images need about 0.00 GiB and 0.00 GiB are free; name another"
    with pytest.raises(ValueError, match=expected):
        opened(photos)
    assert entries(photos) == []
    for disk, memory in ((10_000, 10**9), (10**9, 10_000)):
        free.update(disk=disk, memory=memory)
        with pytest.raises(ValueError, match=r"^data.cache='ram': 26 decoded images need about .* free; take disk"):
            opened(photos, "ram")


def test_the_space_that_is_needed_is_that_which_is_taken(photos: Path) -> None:
    source = open_source(settings(photos))
    taken = sum((path.stat().st_size for path in (opened(photos) and entries(photos)[0]).iterdir()), 0)
    assert decoded._estimate(source, 3, SIDE) == pytest.approx(taken, rel=0.05)


@pytest.fixture
def _full_disk(photos: Path) -> Iterator[None]:
    """From now on no file may grow beyond 8 kB, in this process and its workers."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("_full_disk")
def test_a_disk_that_fills_up_ends_in_one_line(photos: Path) -> None:
    with pytest.raises(ValueError, match=r"^data.cache_dir='.*': cannot be used: .*File too large") as raised:
        opened(photos)
    assert len(str(raised.value).splitlines()) == 1
    assert entries(photos) == []
    with pytest.raises(ValueError, match=r"^data.cache='ram': .*File too large; take disk, or set TMPDIR to another"):
        opened(photos, "ram")
    assert list(temporary_folder(photos).iterdir()) == []
    (photos.parent / "file").touch()
    config = DataConfig(source=str(photos), cache="disk", cache_side=SIDE, cache_dir=str(photos.parent / "file"))
    with pytest.raises(ValueError, match=r"^data.cache_dir='.*file': cannot be used: "):
        open_decoded(open_source(config), config, 3)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_temporary_files_last_as_long_as_they_are_needed(
    photos: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(decoded.multiprocessing, "get_start_method", lambda: method)
    monkeypatch.setattr(decoded.atexit, "register", at_exit.append)
    source = opened(photos, "ram")
    (folder,) = temporary_folder(photos).parent.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    if method == "spawn":  # a worker is sent no pixels, and opens the files by their names
        sent = pickle.dumps(source)
        assert len(sent) < len(pickle.dumps(open_source(settings(photos)))) + 1000
        assert torch.equal(pickle.loads(sent).image(7, 3), source.image(7, 3))
        at_exit.pop()()
    assert at_exit == list(folder.iterdir()) == []
    assert source.decoded.table.shape == (26, 3)
    assert source.image(7, 3).sum() > 0


def test_the_next_start_removes_temporary_files_of_a_killed_one(photos: Path) -> None:
    process, _ = start(photos, 0.3, "ram")
    folder = temporary_folder(photos)
    while not list(folder.glob("unfinished-*/pixels.bin")):
        assert process.is_alive()
        time.sleep(0.02)
    opened(photos, "ram")  # leaves the other one's alone
    assert len(list(folder.iterdir())) == 2
    process.kill()
    process.join()
    assert len(list(folder.iterdir())) == 2
    opened(photos, "ram")
    assert list(folder.iterdir()) == []


def test_temporary_files_are_not_put_into_a_folder_of_somebody_else(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    temporary_folder(photos).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"^data.cache='ram': .* is another user's; take disk, or set TMPDIR to"):
        opened(photos, "ram")


def test_the_folder_is_beside_other_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert decoded.cache_folder(DataConfig()) == tmp_path / "ssl_vit" / "decoded"
    assert decoded.cache_folder(DataConfig(cache_dir="~/x")) == Path.home() / "x"


def test_a_note_beside_the_pixels_says_what_they_are(photos: Path) -> None:
    opened(photos)
    about = json.loads((entries(photos)[0] / "about.json").read_text())
    assert (about["source"], about["side"], about["channels"], about["bad"]) == (str(photos), SIDE, 3, 2)
    assert about["max_image_bytes"] == sources.MAX_IMAGE_BYTES


def overwrite(done: Path) -> None:
    (done / "pixels.bin").write_bytes(bytes(len((done / "pixels.bin").read_bytes())))


def move_rows(done: Path) -> None:
    table = np.load(done / "table.npy")
    np.save(done / "table.npy", table[::-1].copy())


def other_images(done: Path) -> None:
    about = json.loads((done / "about.json").read_text())
    (done / "about.json").write_text(json.dumps(about | {"content": "of something else"}))


def no_regular_file(done: Path) -> None:
    (done / "table.npy").unlink()
    os.mkfifo(done / "table.npy")


@pytest.mark.parametrize("damage", [overwrite, move_rows, other_images, no_regular_file])
def test_what_is_not_as_it_was_decoded_is_decoded_again(photos: Path, damage: Callable[[Path], None]) -> None:
    expected = opened(photos).image(7, 3)
    damage(entries(photos)[0])
    assert torch.equal(opened(photos).image(7, 3), expected)
    assert len(entries(photos)) == 1
