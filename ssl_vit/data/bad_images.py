"""Pictures that cannot be decoded: passed over where that is wanted, counted, and written down with the reason."""

import json
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_vit.data.sources import DataConfig, Source
from ssl_vit.data.streaming import BadSample, Stream
from ssl_vit.distributed import process_index, world_size
from ssl_vit.writing import JsonLines, forget_after

BAD_IMAGES_FILE = "bad_images.jsonl"
JUDGED_FROM = 100  # samples; the share among fewer is chance


class BadImages:
    """Rows that a run drew and could not decode, over all its processes.

    Count and rows are those of an undisturbed run: what a killed one noted after its last checkpoint is forgotten,
    since those steps are done again.
    """

    def __init__(
        self,
        source: Source | Stream,
        config: DataConfig,
        folder: Path,
        *,
        metrics: Path,
        start_step: int,
        num_channels: int,
        is_writer: bool,
    ) -> None:
        """Go on at `start_step`; every process calls this.

        Args:
            folder: of the run.
            metrics: the run's metrics.jsonl, whose last count is the one to go on from.
            is_writer: True in the main process alone.
        """
        self.source, self.num_channels, self.max_share = source, num_channels, config.max_bad_share
        self.path, self.is_writer = folder / BAD_IMAGES_FILE, is_writer
        self._file = JsonLines(self.path)
        found: list[tuple[set, int]] = [(set(), 0)]
        if is_writer:
            forget_after(self.path, start_step)
            known = {(record.get("shard"), record["row"]) for record in _records(self.path)}
            counts = [r["bad_images"] for r in _records(metrics) if "bad_images" in r and r["step"] <= start_step]
            found = [(known, counts[-1] if counts else 0)]
        # By shard, None where there are none, and row.
        self.rows, self.count = broadcast_object_list(found)[0]
        self._drawn: list[BadSample] = []

    def note(self, bad: Int64[Tensor, " b"] | list[BadSample]) -> None:
        """Note what was bad in a batch of this process.

        Args:
            bad: of a stream, those that were passed over; else row numbers, -1 = a sample whose own picture was good.
        """
        if isinstance(bad, Tensor):
            bad = [BadSample(None, row) for row in bad[bad >= 0].tolist()]
        self._drawn += bad

    def settle(self, step: int) -> int:
        """Write down new rows and return how many samples were bad so far; every process calls this."""
        drawn = gather_object(self._drawn)
        self._drawn = []
        self.count += len(drawn)
        new = {bad[:2]: bad for bad in drawn if bad[:2] not in self.rows}
        self.rows.update(new)
        if new and self.is_writer:
            self._file.append({"step": step, **self._describe(new[key])} for key in sorted(new))
        return self.count

    def check(self, num_drawn: int) -> None:
        """Stop a run that learns from too little of its source.

        Args:
            num_drawn: samples so far, over all processes.

        Raises:
            ValueError: more than the setting's share of them, or of the source's rows, are bad.
        """
        what, num_samples = None, self.source.num_samples
        if num_samples is not None and len(self.rows) > self.max_share * num_samples:
            what = f"{len(self.rows):,} of the source's {num_samples:,} pictures"
        elif num_drawn >= JUDGED_FROM and self.count > self.max_share * num_drawn:
            what = f"{self.count:,} of the {num_drawn:,} pictures drawn so far"
        if what is not None:
            raise ValueError(
                f"data.max_bad_share={self.max_share}: {what} cannot be decoded; {self.path} says which and why. "
                "Repair or remove them, or allow more with --data.max_bad_share"
            )

    def _describe(self, bad: BadSample) -> dict[str, object]:
        if isinstance(self.source, Stream):
            return bad._asdict()
        row = bad.row
        reason = "was decoded when tried again"
        try:
            self.source.image(row, self.num_channels)
        except ValueError as error:
            reason = str(error.__cause__ or error)
        path = (self.source.rows[row][self.source.image_column] or {}).get("path")
        return {"row": row, "path": path, "reason": reason}


def leave_out_bad(source: Source, num_channels: int, num_workers: int) -> Source:
    """The rows of a source that can be decoded, found by decoding all of them, shared among the processes."""
    mine = np.arange(process_index(), len(source), world_size())
    loader = DataLoader(_Good(source, mine, num_channels), batch_size=256, num_workers=num_workers)
    good = torch.cat([torch.empty(0, dtype=torch.bool), *loader]).numpy()
    bad = gather_object(mine[~good].tolist())
    if not bad:
        return source
    if process_index() == 0:
        print(f"note       {len(bad):,} of the {len(source):,} pictures that judge cannot be decoded and are left out")
    return source.subset(np.setdiff1d(np.arange(len(source)), bad))


class _Good(Dataset):
    """Whether rows of a source can be decoded."""

    def __init__(self, source: Source, rows: np.ndarray, num_channels: int) -> None:
        self.source, self.rows, self.num_channels = source, rows, num_channels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> bool:
        try:
            self.source.image(int(self.rows[position]), self.num_channels)
        except ValueError:
            return False
        return True


def _records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
