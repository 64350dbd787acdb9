"""Pictures that are decoded once: small, uint8, in one file that all processes of a machine map into their memory."""

import hashlib
import io
import json
import mmap
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from multiprocessing import reduction
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
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from ssl_vit.core.distributed import process_index
from ssl_vit.core.manifest import hash_file
from ssl_vit.core.paths import as_path
from ssl_vit.core.reading import open_regular, read_json
from ssl_vit.core.writing import flush, replace_json
from ssl_vit.data.outputs import mark
from ssl_vit.data.sources.fingerprint import fingerprint
from ssl_vit.data.sources.source import DataConfig, Source
from ssl_vit.data.workers import (
    CurrentRows,
    leave_signals_to_the_main_process,
    naming_killed_workers,
    num_cpus,
    num_local_processes,
    shut_down,
)

_FORMAT = 2  # raised when pictures are kept otherwise
_PIXELS, _TABLE, _ABOUT = "pixels.bin", "table.npy", "about.json"
_GIB = 2**30
_CHUNK = 64  # rows that a worker decodes at once
_NUM_BLOCKS, _BLOCK = 64, 2**16  # blocks of the pixels that are compared at each start, and bytes of each
_SAMPLE, _SAMPLE_SECONDS = 256, 5.0  # rows, at most, that the size is estimated from


def shrink(image: UInt8[Tensor, "c h w"], side: int) -> UInt8[Tensor, "c h2 w2"]:
    """The picture with a shorter side of at most `side` pixels: bicubic, antialiased, never enlarged."""
    height, width = image.shape[1:]
    short = min(height, width)
    if short <= side:
        return image
    size = [max(1, round(length * side / short)) for length in (height, width)]
    return F.resize(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True)


class _Descriptor:
    """An open file, closed with this object, which a worker is handed in whatever way it is started."""

    def __init__(self, number: int) -> None:
        self.number = number
        weakref.finalize(self, os.close, number)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.number),)


def _received(sent: Any) -> _Descriptor:
    return _Descriptor(sent.detach())


class Decoded:
    """Decoded pictures by row, read-only. The files need no name any more, and no process holds a copy of them."""

    def __init__(self, pixels: _Descriptor, table: _Descriptor, num_channels: int) -> None:
        """Map the files.

        Args:
            pixels: all pictures, one after another, each [h, w, c].
            table: .npy of [n, 3]: where each row's picture begins, height and width; -1 = it cannot be decoded.
        """
        self._files, self.num_channels = (pixels, table), num_channels
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*buffer is not writable")
            self._pixels = torch.frombuffer(_map(pixels), dtype=torch.uint8) if _size(pixels) else torch.empty(0)
        mapped = _map(table)
        header = io.BytesIO(mapped[:256])
        np.lib.format.read_magic(header)
        shape, _, dtype = np.lib.format.read_array_header_1_0(header)
        self.table: Int64[np.ndarray, "n 3"] = np.frombuffer(mapped, dtype, offset=header.tell()).reshape(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return Decoded, (*self._files, self.num_channels)

    def image(self, row: int) -> UInt8[Tensor, "c h w"] | None:
        """The picture of a row; None where it could not be decoded."""
        start, height, width = self.table[row].tolist()
        if start < 0:
            return None
        end = start + height * width * self.num_channels
        # A copy, as of a decoder: whoever writes into it must not end the process.
        return self._pixels[start:end].view(height, width, self.num_channels).clone().permute(2, 0, 1)


def _size(file: _Descriptor) -> int:
    return os.fstat(file.number).st_size


def _map(file: _Descriptor) -> mmap.mmap:
    return mmap.mmap(file.number, 0, access=mmap.ACCESS_READ)


@dataclass(frozen=True, eq=False)
class DecodedSource(Source):
    """A source whose pictures were decoded beforehand. A bad one is still decoded when it is drawn, to fail as ever."""

    decoded: Decoded = field(kw_only=True)
    side: int = field(kw_only=True)
    """Most pixels of a picture's shorter side."""

    def image(self, index: int, num_channels: int) -> UInt8[Tensor, "{num_channels} h w"]:
        kept = self.decoded.image(index) if num_channels == self.decoded.num_channels else None
        return shrink(super().image(index, num_channels), self.side) if kept is None else kept

    def subset(self, rows: Int64[np.ndarray, " r"]) -> Source:
        """Some rows of the source, in this order, to be decoded from their files."""
        return Source(**{item.name: getattr(self, item.name) for item in fields(Source)}).subset(rows)


def open_decoded(source: Source, config: DataConfig, num_channels: int) -> Source:
    """The source with its pictures decoded, as `data.cache` says; every process calls this.

    The first process of each machine finds them on disk or decodes them with all its CPUs; the others wait for it.

    Raises:
        ValueError: too little space, or a folder that cannot be written, in every process.
    """
    if config.cache == "none":
        return source
    if isinstance(config.cache_side, str):
        raise ValueError("data.cache_side='auto': is not resolved; give a number of pixels")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    files: tuple[_Descriptor, ...] = ()
    paths, problem = [], ""
    if local == 0:
        try:
            if config.cache == "disk":
                folder = _find_or_build(source, config, num_channels, config.cache_side)
                paths = [str(folder / name) for name in (_PIXELS, _TABLE)]
            else:
                files = _build_in_memory(source, num_channels, config.cache_side)
                paths = [_path_of(file) for file in files]
        except ValueError as error:
            problem = str(error)
    found = gather_object([(paths, problem)])
    for _, other in found:
        if other:
            raise ValueError(other)
    opened = [_Descriptor(os.open(path, os.O_RDONLY)) for path in found[process_index() - local][0]]
    gather_object([None])  # what is in memory lasts until all have opened it
    decoded = Decoded(opened[0], opened[1], num_channels)
    own = {item.name: getattr(source, item.name) for item in fields(Source)}
    return DecodedSource(**own, decoded=decoded, side=config.cache_side)


def cache_folder(config: DataConfig) -> Path:
    """Where decoded pictures are kept."""
    if config.cache_dir is not None:
        return as_path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssl_vit" / "decoded"


def _find_or_build(source: Source, config: DataConfig, num_channels: int, side: int) -> Path:
    folder = cache_folder(config)
    about = {
        "format": _FORMAT,
        "content": fingerprint(source, np.arange(len(source))),
        "channels": num_channels,
        "side": side,
        "max_image_bytes": source.max_image_bytes,
        # Decoders differ in their last bit from version to version.
        "libraries": {"torch": torch.__version__, "torchvision": torchvision.__version__, "Pillow": PIL.__version__},
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    done = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder, name):
            if not _is_whole(done, about):
                _remove_leftovers(folder)
                _build_on_disk(source, num_channels, side, done, about)
    except OSError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"data.cache_dir={str(folder)!r}: cannot be used: {reason}; name another folder") from error
    return done


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of a name; the end of a process, however it ends, frees it."""
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"cache      another run decodes these pictures; waiting for {folder / name}", flush=True)
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
    """SHA-256 of the table, of the pixels' size and of blocks of them, evenly spaced.

    Reading all pixels would take minutes at each start. So this tells of files that are cut short, swapped or
    overwritten, and not of single bytes that a disk changed between the blocks.
    """
    digest = hashlib.sha256(hash_file(folder / _TABLE).encode())
    with os.fdopen(open_regular(folder / _PIXELS), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(str(size).encode())
        for start in np.linspace(0, max(0, size - _BLOCK), _NUM_BLOCKS).astype(np.int64).tolist():
            digest.update(os.pread(file.fileno(), _BLOCK, start))
    return digest.hexdigest()


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left behind."""
    for unfinished in folder.glob("unfinished-*"):
        lock = FileLock(folder / f"{unfinished.name.removeprefix('unfinished-')}.lock")
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(unfinished, ignore_errors=True)
        except Timeout:
            continue  # under way


def _build_on_disk(source: Source, num_channels: int, side: int, done: Path, about: dict[str, Any]) -> None:
    needed, free = _estimate(source, num_channels, side), shutil.disk_usage(done.parent).free
    if needed > free:
        raise ValueError(
            f"data.cache_dir={str(done.parent)!r}: {_need(source, needed, free)}; name another folder, set a "
            f"--data.cache_side below {side}, or --data.cache none"
        )
    unfinished = done.with_name(f"unfinished-{done.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(done, ignore_errors=True)  # one that is damaged
    unfinished.mkdir()
    mark(unfinished)
    try:
        with _opened(unfinished / _PIXELS) as pixels, _opened(unfinished / _TABLE) as table:
            num_bad = _decode_all(source, num_channels, side, pixels, table, str(done))
            for file in (pixels, table):
                os.fsync(file.number)
        noted = {"source": source.name, "bad": num_bad, "sha256": _seal(unfinished), **about}
        replace_json(unfinished / _ABOUT, noted)
        unfinished.rename(done)
        flush(done.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextmanager
def _opened(path: Path) -> Iterator[_Descriptor]:
    with path.open("w+b") as file:
        yield _Descriptor(os.dup(file.fileno()))


def _build_in_memory(source: Source, num_channels: int, side: int) -> tuple[_Descriptor, _Descriptor]:
    """Files without a name, which end with the last process that has them open, whatever ends it."""
    if sys.platform != "linux" and num_local_processes() > 1:
        raise ValueError("data.cache='ram': is shared among processes on Linux alone; take disk")
    needed, free = _estimate(source, num_channels, side), free_memory()
    if needed > free:
        raise ValueError(
            f"data.cache='ram': {_need(source, needed, free)}; take disk, set a --data.cache_side below {side}, "
            "or --data.cache none"
        )
    files = _nameless("pixels"), _nameless("table")
    try:
        _decode_all(source, num_channels, side, *files, "memory")
    except OSError as error:
        raise ValueError(f"data.cache='ram': {str(error).strip().splitlines()[-1]}; take disk") from error
    return files


def _nameless(name: str) -> _Descriptor:
    if hasattr(os, "memfd_create"):  # unlike /dev/shm it has no limit of its own, which containers set to 64 MiB
        return _Descriptor(os.memfd_create(f"ssl_vit-{name}"))
    number, path = tempfile.mkstemp(prefix="ssl_vit-")
    Path(path).unlink()
    return _Descriptor(number)


def _path_of(file: _Descriptor) -> str:
    return f"/proc/{os.getpid()}/fd/{file.number}" if sys.platform == "linux" else f"/dev/fd/{file.number}"


def free_memory() -> int:
    """Bytes of memory that are free, on the machine and in the container of this process."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    # What files have in memory is given back where it is needed.
    return free if limit == "max" else min(free, int(limit) - int(used["anon"]) - int(used["shmem"]))


def _need(source: Source, needed: int, free: int) -> str:
    need, have = needed / _GIB, max(free, 0) / _GIB
    return f"{len(source):,} decoded pictures need about {need:.2f} GiB and {have:.2f} GiB are free"


def _estimate(source: Source, num_channels: int, side: int) -> int:
    """Bytes that all pictures will take, from a seeded sample of them."""
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


def _decode_all(
    source: Source, num_channels: int, side: int, pixels: _Descriptor, table: _Descriptor, where: str
) -> int:
    """Fill both files with all CPUs, in whatever order; how many pictures cannot be decoded."""
    num_workers = num_cpus() if num_cpus() > 1 else 0
    chunks = _Chunks(source, num_channels, side, pixels, num_workers)
    loader = DataLoader(
        chunks, batch_size=None, num_workers=num_workers, worker_init_fn=leave_signals_to_the_main_process
    )
    found = np.full((len(source), 3), -1, dtype=np.int64)
    start = time.perf_counter()
    # A log file is given a line now and then.
    every = 0.5 if sys.stderr.isatty() else 30.0
    iterator = iter(loader)
    try:
        with (
            naming_killed_workers(chunks.current, source.where),
            tqdm(total=len(source), desc="decoding", unit="image", mininterval=every, leave=False) as bar,
        ):
            for chunk, places in enumerate(iterator):
                found[chunk * _CHUNK : (chunk + 1) * _CHUNK] = places
                bar.update(len(places))
    finally:
        shut_down(iterator)
    with os.fdopen(os.dup(table.number), "wb") as file:
        np.lib.format.write_array(file, found, version=(1, 0))
    seconds, num_bad = time.perf_counter() - start, int((found[:, 0] < 0).sum())
    bad = f", {num_bad:,} of them bad" if num_bad else ""
    print(
        f"cache      {len(source):,} pictures{bad} in {_size(pixels) / _GIB:.2f} GiB, decoded in {seconds:.0f} s "
        f"({len(source) / seconds:.0f} images/s): {where}",
        flush=True,
    )
    return num_bad


class _Chunks(Dataset[Int64[Tensor, "r 3"]]):
    """Decodes some rows at a time into the file, and gives their places in it: the rows of the table."""

    def __init__(self, source: Source, num_channels: int, side: int, pixels: _Descriptor, num_workers: int) -> None:
        self.source, self.num_channels, self.side, self.pixels = source, num_channels, side, pixels
        self.current = CurrentRows(num_workers)
        self._end = multiprocessing.Value("q", 0)

    def __len__(self) -> int:
        return -(-len(self.source) // _CHUNK)

    def __getitem__(self, chunk: int) -> Int64[Tensor, "r 3"]:
        rows = range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self.source)))
        return torch.tensor([self._keep(row) for row in rows], dtype=torch.int64)

    def _keep(self, row: int) -> tuple[int, int, int]:
        self.current.note(row)
        try:
            image = shrink(self.source.image(row, self.num_channels), self.side)
        except ValueError:
            return -1, 0, 0
        values = memoryview(image.permute(1, 2, 0).contiguous().numpy().tobytes())
        with self._end.get_lock():
            start = self._end.value
            self._end.value += len(values)
        written = 0
        while written < len(values):
            written += os.pwrite(self.pixels.number, values[written:], start + written)
        return start, image.shape[1], image.shape[2]
