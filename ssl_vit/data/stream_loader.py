"""From a stream to batches on the training device, and back to the same sample after a stop."""

import itertools
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from einops import rearrange
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from ssl_vit.data.config import DataConfig
from ssl_vit.data.loader import reading
from ssl_vit.data.sampler import sample_rng
from ssl_vit.data.sources.images import decode_first
from ssl_vit.data.sources.stream import BadSample, ReaderState, Sample, ShardSchedule, Stream, choose_num_readers
from ssl_vit.data.transform import Transform
from ssl_vit.data.workers import CurrentRows, leave_signals_to_the_main_process

_MOST_ROWS = 2**40  # of a shard, to note shard and row as one number


class Chunk(NamedTuple):
    """What a worker gives to a micro-batch."""

    samples: dict[str, Tensor]
    bad: list[BadSample]  # passed over on the way to them
    states: Int64[Tensor, "r 5"]  # of the worker's readers after them


@dataclass
class StreamLoader:
    """The readers of a process, and how far they have come by the last batch that was taken.

    Sample n of the run belongs to reader n % num_readers, and that reader to process n % num_processes and to one of
    its workers. So with the same number of readers neither number changes what a step learns from, and a run goes on
    with any number of processes that divides it. A run with another number of processes may begin with other readers,
    see `choose_num_readers`.
    """

    schedule: ShardSchedule
    process_index: int
    num_processes: int
    states: Int64[np.ndarray, "r 5"]
    """A `ReaderState` for each of the process's readers."""

    @classmethod
    def open(
        cls,
        stream: Stream,
        config: DataConfig,
        seed: int,
        process_index: int,
        num_processes: int,
        state: dict[str, Any] | None = None,
    ) -> "StreamLoader":
        """Begin, or go on from a checkpoint's `state`.

        Raises:
            ValueError: this number of processes, or this source, cannot go on from there.
        """
        if state is None:
            num_readers = choose_num_readers(len(stream.shards), config.num_readers, num_processes)
            states = np.tile(np.array(ReaderState(), dtype=np.int64), (num_readers, 1))
        else:
            num_readers, states = state["num_readers"], np.array(state["places"], dtype=np.int64)
            if state["num_shards"] != len(stream.shards):
                raise ValueError(
                    f"data.source={stream.name!r}: has {len(stream.shards)} shards, and the run began with "
                    f"{state['num_shards']}; give it the same ones, or start anew with --fresh"
                )
            if num_readers % num_processes:
                fits = ", ".join(str(n) for n in range(1, num_readers + 1) if num_readers % n == 0)
                raise ValueError(
                    f"data.streaming=True: {num_processes} processes cannot share the {num_readers} readers that the "
                    f"run began with; start one of these numbers of processes: {fits}"
                )
        schedule = ShardSchedule(stream, seed, num_readers, -(-config.shuffle_buffer // num_readers))
        return cls(schedule, process_index, num_processes, states[process_index::num_processes])

    def notes(self) -> list[str]:
        """What the user should know before the first batch."""
        num_shards, num_readers = len(self.schedule.stream.shards), self.schedule.num_readers
        if self.schedule.stream.counts is None and (num_shards % num_readers or num_shards < num_readers):
            return [
                f"{num_shards} shards do not divide among {num_readers} readers, so that some begin their next epoch "
                "earlier than others"
            ]
        return []

    def state(self) -> dict[str, Any]:
        """The state of all readers of all processes, for `open`; every process calls this."""
        gathered = gather_object([(self.process_index, self.states.tolist())])
        by_process = [states for _, states in sorted(gathered)]
        states = [state for together in zip(*by_process, strict=True) for state in together]
        num_readers, num_shards = self.schedule.num_readers, len(self.schedule.stream.shards)
        return {"num_readers": num_readers, "num_shards": num_shards, "places": states}

    def choose_num_workers(self, wanted: int, size: int) -> int:
        """The most workers, up to `wanted`, that share the readers and micro-batches of `size` samples evenly."""
        most = math.gcd(len(self.states), size)
        return max((n for n in range(1, wanted + 1) if most % n == 0), default=0)

    def batches(
        self,
        transform: Transform,
        *,
        batch_size: int,
        num_steps: int,
        start_step: int,
        num_micro: int,
        num_channels: int,
        num_workers: int,
        device: torch.device,
        note_bad: Callable[[list[BadSample]], None] | None = None,
    ) -> Generator[dict[str, Tensor], None, None]:
        """Micro-batches of this process on `device`, as the objective takes them.

        Close it (`contextlib.closing`) to end its workers.

        Args:
            num_workers: the most that are started.
            note_bad: called with the images passed over because they cannot be decoded. None = they raise.

        Raises:
            ValueError: a shard cannot be read, or an image cannot be decoded.
        """
        size = batch_size // (num_micro * self.num_processes)
        fitting = self.choose_num_workers(num_workers, size)
        if fitting < num_workers and self.process_index == 0:
            print(f"note       {fitting} of {num_workers} loader workers start, so that they share the stream evenly")
        parts = max(fitting, 1)
        chunks = _Chunks(
            self,
            transform,
            num_channels=num_channels,
            first=start_step * batch_size // self.num_processes // parts,
            num_chunks=(num_steps - start_step) * num_micro,
            chunk_size=size // parts,
            skip_bad=note_bad is not None,
            current=CurrentRows(fitting),
        )
        loader = DataLoader(
            chunks,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=fitting,
            prefetch_factor=4 if fitting else None,
            worker_init_fn=leave_signals_to_the_main_process,
        )
        with reading(loader, chunks.current, chunks.where) as read:
            while taken := list(itertools.islice(read, parts)):
                for worker, chunk in enumerate(taken):
                    self.states[worker::parts] = chunk.states.numpy()
                if note_bad is not None:
                    note_bad([bad for chunk in taken for bad in chunk.bad])
                batch = {
                    name: rearrange([chunk.samples[name] for chunk in taken], "w s ... -> (s w) ...")
                    for name in taken[0].samples
                }
                if device.type == "cuda":
                    batch = {name: values.pin_memory() for name, values in batch.items()}
                yield transform.on_device(batch, device)


@contextmanager
def passing_errors_on(batches: Generator[Any, None, None]) -> Iterator[Any]:
    """Close `batches` at the end, and pass them the errors of the block, so that they name a worker that was killed."""
    with closing(batches):
        try:
            yield batches
        except (RuntimeError, OSError, EOFError) as error:
            batches.throw(error)


def _unchanged(chunk: Any) -> Chunk:
    return chunk


@dataclass(eq=False)
class _Chunks(IterableDataset[Chunk]):
    """The chunks of one worker, or of the process where there is none."""

    loader: StreamLoader
    transform: Transform
    num_channels: int
    first: int
    """Samples that each worker has given before."""
    num_chunks: int
    chunk_size: int
    skip_bad: bool
    current: CurrentRows

    def where(self, number: int) -> str:
        """The beginning of an error about an image, by the number that `current` holds."""
        return self.loader.schedule.stream.where(*divmod(number, _MOST_ROWS))

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        loader, schedule = self.loader, self.loader.schedule
        states = loader.states[worker::num_workers].copy()
        numbers = range(loader.process_index, schedule.num_readers, loader.num_processes)[worker::num_workers]
        readers = [
            schedule.samples(number, ReaderState(*state))
            for number, state in zip(numbers, states.tolist(), strict=True)
        ]
        draws = itertools.count(self.first)
        for _ in range(self.num_chunks):
            samples, bad = [], []
            for _ in range(self.chunk_size):
                reader = next(draws) % len(readers)
                sample, states[reader] = self._next_good(readers[reader], bad)
                samples.append(sample)
            yield Chunk(default_collate(samples), bad, torch.from_numpy(states.copy()))

    def _next_good(
        self, reader: Iterator[tuple[Sample, ReaderState]], bad: list[BadSample]
    ) -> tuple[dict[str, Tensor], ReaderState]:
        """The reader's next sample that can be decoded, transformed; those before it are added to `bad`."""
        stream, seed = self.loader.schedule.stream, self.loader.schedule.seed

        def decode(read: tuple[Sample, ReaderState]) -> Tensor:
            sample = read[0]
            self.current.note(sample.shard * _MOST_ROWS + sample.row)
            return stream.decode(sample.shard, sample.row, sample.stored, self.num_channels)

        def note(read: tuple[Sample, ReaderState], error: ValueError) -> None:
            if not self.skip_bad:
                raise error
            sample, reason = read[0], str(error.__cause__ or error)
            bad.append(BadSample(stream.shards[sample.shard], sample.row, sample.stored.get("path"), reason))

        image, (sample, state) = decode_first(reader, decode, note)
        return self.transform(image, sample_rng(seed, sample.key)), state
