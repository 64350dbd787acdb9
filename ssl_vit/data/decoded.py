"""Images that are decoded once: small, uint8, in one file that all processes of a machine map into their memory."""

import atexit
import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import psutil
import torch
import torchvision
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from jaxtyping import Int64, UInt8
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ssl_vit.core.distributed import process_index
from ssl_vit.core.manifest import hash_file, hash_of
from ssl_vit.core.paths import as_path
from ssl_vit.core.reading import open_regular, read_json
from ssl_vit.core.writing import UNFINISHED, flush, fresh_folder, mark, replace_json
from ssl_vit.data.decode.formats import optional_decoders
from ssl_vit.data.sources.fingerprint import fingerprint
from ssl_vit.data.sources.source import DataConfig, Source
from ssl_vit.data.workers import in_workers

_FORMAT = 2  # raised when images are kept otherwise
_PIXELS, _TABLE, _ABOUT = "pixels.bin", "table.npy", "about.json"
_GIB = 2**30
_NUM_BLOCKS, _BLOCK = 64, 2**16  # blocks of the pixels that are compared at each start, and bytes of each
_SAMPLE, _SAMPLE_SECONDS = 256, 5.0  # rows, at most, that the size is estimated from


def shrink(image: UInt8[Tensor, "c h w"], side: int) -> UInt8[Tensor, "c h2 w2"]:
    """The image with a shorter side of at most `side` pixels: bicubic, antialiased, never enlarged."""
    height, width = image.shape[1:]
    short = min(height, width)
    if short <= side:
        return image
    size = [max(1, round(length * side / short)) for length in (height, width)]
    return F.resize(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True)


class Decoded:
    """Decoded images by row, read-only, in files that the operating system shares among all processes."""

    def __init__(self, folder: Path, num_channels: int) -> None:
        """Map the files of a folder: all images, one after another, each [h, w, c]; and the table of their places."""
        self.folder, self.num_channels = folder, num_channels
        pixels = folder / _PIXELS
        self._pixels = np.memmap(pixels, np.uint8, "r") if pixels.stat().st_size else np.empty(0, np.uint8)
        self.table: Int64[np.ndarray, "n 3"] = np.load(folder / _TABLE, mmap_mode="r", allow_pickle=False)
        """Where each row's image begins, its height and width; -1 = it cannot be decoded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Decoded, (self.folder, self.num_channels)  # a spawned worker maps the files itself

    def image(self, row: int) -> UInt8[Tensor, "c h w"] | None:
        """The image of a row; None where it could not be decoded."""
        start, height, width = self.table[row].tolist()
        if start < 0:
            return None
        end = start + height * width * self.num_channels
        # A copy, as a decoder gives one: writing into the map would end the process.
        pixels = np.array(self._pixels[start:end]).reshape(height, width, self.num_channels)
        return torch.from_numpy(pixels).permute(2, 0, 1)


@dataclass(frozen=True, eq=False)
class DecodedSource(Source):
    """A source whose images were decoded beforehand. A bad one is decoded again when drawn, for the same error."""

    decoded: Decoded = field(kw_only=True)
    side: int = field(kw_only=True)
    """Most pixels of an image's shorter side."""

    def image(self, index: int, num_channels: int) -> UInt8[Tensor, "{num_channels} h w"]:
        kept = self.decoded.image(index) if num_channels == self.decoded.num_channels else None
        return shrink(super().image(index, num_channels), self.side) if kept is None else kept

    def subset(self, rows: Int64[np.ndarray, " r"]) -> Source:
        """Some rows of the source, in this order, to be decoded from their files."""
        return Source(**{item.name: getattr(self, item.name) for item in fields(Source)}).subset(rows)


def open_decoded(source: Source, config: DataConfig, num_channels: int) -> Source:
    """The source with its images decoded, as `data.cache` says; every process calls this.

    The first process of each machine finds them on disk or decodes them with all its CPUs; the others wait for it. For
    `ram` they lie in temporary files, which the system keeps in memory as long as nothing else needs it.

    Raises:
        ValueError: too little space, or a folder that cannot be written, in every process.
    """
    if config.cache == "none":
        return source
    if isinstance(config.cache_side, str):
        raise ValueError("data.cache_side='auto': is not resolved; give a number of pixels")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    folder = problem = ""
    with ExitStack() as temporary:
        if local == 0:
            try:
                if config.cache == "disk":
                    folder = str(_find_or_build(source, config, num_channels, config.cache_side))
                else:
                    folder = str(_build_temporary(source, num_channels, config.cache_side, temporary))
            except ValueError as error:
                problem = str(error)
        found = gather_object([(folder, problem)])
        for _, other in found:
            if other:
                raise ValueError(other)
        decoded = Decoded(Path(found[process_index() - local][0]), num_channels)
        gather_object([None])  # all have opened the files
        if multiprocessing.get_start_method() != "fork":  # forked workers inherit the open files, which need no name
            atexit.register(temporary.pop_all().close)
    own = {item.name: getattr(source, item.name) for item in fields(Source)}
    return DecodedSource(**own, decoded=decoded, side=config.cache_side)


def cache_folder(config: DataConfig) -> Path:
    """Where decoded images are kept."""
    if config.cache_dir is not None:
        return as_path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssl_vit" / "decoded"


def _find_or_build(source: Source, config: DataConfig, num_channels: int, side: int) -> Path:
    """The folder of `data.cache_dir` that holds the decoded images, built where there is none or a damaged one."""
    folder = cache_folder(config)
    about = {
        "format": _FORMAT,
        "content": fingerprint(source, np.arange(len(source))),
        "channels": num_channels,
        "side": side,
        "max_image_bytes": source.max_image_bytes,
        # Decoders differ in their last bit from version to version.
        "libraries": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "Pillow": PIL.__version__,
            **optional_decoders(),
        },
    }
    name = hash_of(about)
    done = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, name):
            if not _is_whole(done, about):
                _remove_leftovers(folder)
                remedy = f"name another folder, set a --data.cache_side below {side}, or --data.cache none"
                _check_space(source, num_channels, side, f"data.cache_dir={str(folder)!r}", _free_disk(folder), remedy)
                shutil.rmtree(done, ignore_errors=True)  # a damaged one
                with fresh_folder(folder / f"{UNFINISHED}{name}") as unfinished:
                    mark(unfinished)
                    num_bad = _decode_all(source, num_channels, side, unfinished, str(done))
                    for file in (_PIXELS, _TABLE):
                        flush(unfinished / file)
                    noted = {"source": source.name, "bad": num_bad, "sha256": _seal(unfinished), **about}
                    replace_json(unfinished / _ABOUT, noted)
                    unfinished.rename(done)
                flush(folder)
    except OSError as error:
        what = f"cannot be used: {_reason(error)}; name another folder"
        raise ValueError(f"data.cache_dir={str(folder)!r}: {what}") from error
    return done


def _build_temporary(source: Source, num_channels: int, side: int, temporary: ExitStack) -> Path:
    """A folder with the decoded images, which is deleted when `temporary` closes, or else by the next start."""
    parent = Path(tempfile.gettempdir()) / f"ssl_vit-{os.getuid()}"
    name = secrets.token_hex(8)
    try:
        parent.mkdir(mode=0o700, exist_ok=True)
        if parent.is_symlink() or parent.stat().st_uid != os.getuid():
            raise OSError(f"{parent} is another user's")
        _remove_leftovers(parent, with_locks=True)
        free = min(_free_disk(parent), psutil.virtual_memory().available)
        remedy = f"take disk, set a --data.cache_side below {side}, or --data.cache none"
        _check_space(source, num_channels, side, "data.cache='ram'", free, remedy)
        temporary.callback((parent / f"{name}.lock").unlink, missing_ok=True)
        temporary.enter_context(_locked(parent, name))
        folder = temporary.enter_context(fresh_folder(parent / f"{UNFINISHED}{name}"))
        _decode_all(source, num_channels, side, folder, str(parent))
    except OSError as error:
        raise ValueError(f"data.cache='ram': {_reason(error)}; take disk, or set TMPDIR to another folder") from error
    return folder


def _reason(error: OSError) -> str:
    return str(error).strip().splitlines()[-1]


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of a name; the end of a process, however it ends, frees it."""
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"cache      another run decodes these images; waiting for {folder / name}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_whole(done: Path, about: dict[str, Any]) -> bool:
    """Whether what lies there was decoded from these images, and is as it was written."""
    try:
        noted = read_json(done / _ABOUT)
        return noted | json.loads(json.dumps(about)) == noted and noted.get("sha256") == _seal(done)
    except (OSError, ValueError):
        return False


def _seal(folder: Path) -> str:
    """SHA-256 of the table, of the pixels' size and of evenly spaced blocks of them.

    Reading all pixels would take minutes at each start. So this detects files that are cut short, swapped or
    overwritten, but not single bytes that a disk changed between the blocks.
    """
    digest = hashlib.sha256(hash_file(folder / _TABLE).encode())
    with os.fdopen(open_regular(folder / _PIXELS), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(str(size).encode())
        for start in np.linspace(0, max(0, size - _BLOCK), _NUM_BLOCKS).astype(np.int64).tolist():
            digest.update(os.pread(file.fileno(), _BLOCK, start))
    return digest.hexdigest()


def _remove_leftovers(folder: Path, *, with_locks: bool = False) -> None:
    """Remove what killed runs left behind; their locks only where no other run may be waiting for them."""
    for unfinished in folder.glob(f"{UNFINISHED}*"):
        lock = FileLock(folder / f"{unfinished.name.removeprefix(UNFINISHED)}.lock")
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(unfinished, ignore_errors=True)
                if with_locks:
                    Path(lock.lock_file).unlink(missing_ok=True)
        except Timeout:
            continue  # under way


def _free_disk(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _check_space(source: Source, num_channels: int, side: int, setting: str, free: int, remedy: str) -> None:
    """Refuse to decode what will not fit into `free` bytes."""
    needed = _estimate(source, num_channels, side)
    if needed > free:
        need, have = needed / _GIB, max(free, 0) / _GIB
        what = f"{len(source):,} decoded images need about {need:.2f} GiB and {have:.2f} GiB are free"
        raise ValueError(f"{setting}: {what}; {remedy}")


def _estimate(source: Source, num_channels: int, side: int) -> int:
    """Bytes that all images will take, from a seeded sample of them."""
    rows = np.random.default_rng(0).permutation(len(source))[:_SAMPLE]
    sizes, start = [], time.perf_counter()
    for row in rows.tolist():
        try:
            _, height, width = source.image(row, num_channels).shape
        except ValueError:
            sizes.append(0.0)
        else:
            sizes.append(height * width * min(1.0, side / min(height, width)) ** 2)
        if time.perf_counter() - start > _SAMPLE_SECONDS:
            break
    return round(sum(sizes) / len(sizes) * num_channels * len(source)) + 24 * len(source)


def _decode_all(source: Source, num_channels: int, side: int, folder: Path, where: str) -> int:
    """Fill the files of `folder` with all CPUs, images in any order; returns how many cannot be decoded."""
    pixels = folder / _PIXELS
    pixels.touch()
    writer = _Writer(source, num_channels, side, pixels)
    start = time.perf_counter()
    with in_workers(writer.decode, range(len(writer.firsts) - 1), writer.where, doing="decoding") as places:
        table: Int64[np.ndarray, "n 3"] = np.fromiter(chain.from_iterable(places), np.dtype((np.int64, 3)), len(source))
    np.save(folder / _TABLE, table)
    seconds, num_bad = time.perf_counter() - start, int((table[:, 0] < 0).sum())
    bad = f", {num_bad:,} of them bad" if num_bad else ""
    print(
        f"cache      {len(source):,} images{bad} in {pixels.stat().st_size / _GIB:.2f} GiB, decoded in {seconds:.0f} s "
        f"({len(source) / seconds:.0f} images/s): {where}",
        flush=True,
    )
    return num_bad


class _Writer:
    """Decodes images into the file of pixels, several processes at once, each image once for all of its tiles."""

    def __init__(self, source: Source, num_channels: int, side: int, pixels: Path) -> None:
        self.source, self.num_channels, self.side, self.pixels = source, num_channels, side, pixels
        self._end = multiprocessing.Value("q", 0)
        images = np.arange(len(source)) if source.tiles is None else source.tiles[:, 0]
        self.firsts = np.flatnonzero(np.diff(images, prepend=-1, append=-1))
        """The first row of each image, and the end of the last one."""

    def where(self, number: int) -> str:
        """The beginning of an error about an image."""
        return self.source.where(int(self.firsts[number]))

    def decode(self, number: int) -> list[tuple[int, int, int]]:
        """Append an image, or its tiles; returns their rows of the table."""
        rows = range(self.firsts[number], self.firsts[number + 1])
        try:
            whole = self.source.decode_whole(rows[0], self.source.file(rows[0]), self.num_channels)
            images = [shrink(self.source.cut(whole, row), self.side) for row in rows]
        except (ValueError, OSError):
            return [(-1, 0, 0)] * len(rows)
        return [self._append(image) for image in images]

    def _append(self, image: UInt8[Tensor, "c h w"]) -> tuple[int, int, int]:
        values = image.permute(1, 2, 0).contiguous().numpy()
        with self._end.get_lock():
            start = self._end.value
            self._end.value += values.nbytes
        with self.pixels.open("r+b") as file:
            file.seek(start)
            file.write(values.data)
        return start, image.shape[1], image.shape[2]
