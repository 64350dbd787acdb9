"""Images that cannot be decoded: counted and listed with the reason, and looked for before the first step."""

import math
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from jaxtyping import Int64
from torch import Tensor

from ssl_vit.core.distributed import process_index, world_size
from ssl_vit.core.reading import entry, read_metrics, read_records
from ssl_vit.core.text import plain
from ssl_vit.core.writing import JsonLines, forget_after
from ssl_vit.data.config import DataConfig
from ssl_vit.data.decode.bounds import check_size
from ssl_vit.data.decode.headers import JPEG_SIGNATURE, PNG_SIGNATURE, read_jpeg, read_png
from ssl_vit.data.decoded import DecodedSource
from ssl_vit.data.sources.images import MAX_TRIES, Source
from ssl_vit.data.sources.stream import BadSample, Stream
from ssl_vit.data.workers import in_workers

BAD_IMAGES_FILE = "bad_images.jsonl"
JUDGED_FROM = 100  # samples; the share among fewer says little
LOOKED_AT, SECONDS = 256, 2.0  # most images, and most time, for the look before the first step
CHANCE = 1e-4  # that this look refuses a source with just the allowed share of bad images


class BadImages:
    """Rows that a run drew and could not decode, over all its processes.

    Count and rows are those of an undisturbed run: what a killed run noted after its last checkpoint is dropped, since
    those steps are done again.
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
        """Continue at `start_step`; every process calls this.

        Args:
            folder: the run's.
            metrics: the run's metrics.jsonl, whose last count is continued.
            is_writer: True in the main process alone.
        """
        self.source, self.num_channels, self.max_share = source, num_channels, config.max_bad_share
        self.path, self.is_writer = folder / BAD_IMAGES_FILE, is_writer
        self._file = JsonLines(self.path)
        noted: list[tuple[set, int]] = [(set(), 0)]
        if is_writer:
            forget_after(self.path, start_step)
            known = {(record.get("shard"), entry(record, "row", int, self.path)) for record in read_records(self.path)}
            counts = [r["bad_images"] for r in read_metrics(metrics) if "bad_images" in r and r["step"] <= start_step]
            noted = [(known, counts[-1] if counts else 0)]
        # (shard, row); the shard is None where there are none.
        self.rows, self.count = broadcast_object_list(noted)[0]
        self._drawn: list[BadSample] = []

    def note(self, bad: Int64[Tensor, " b"] | list[BadSample]) -> None:
        """Note the bad images of a batch of this process.

        Args:
            bad: of a stream, the images passed over; else row numbers, -1 = a sample whose own image was good.
        """
        if isinstance(bad, Tensor):
            bad = [BadSample(None, row) for row in bad[bad >= 0].tolist()]
        self._drawn += bad

    def settle(self, step: int) -> int:
        """Write new rows and return how many samples were bad so far; every process calls this."""
        drawn = gather_object(self._drawn)
        self._drawn = []
        self.count += len(drawn)
        new = {bad[:2]: bad for bad in drawn if bad[:2] not in self.rows}
        self.rows.update(new)
        if new and self.is_writer:
            self._file.append({"step": step, **self._describe(new[key])} for key in sorted(new))
        return self.count

    def check(self, num_drawn: int) -> None:
        """Stop a run that meets too many bad images.

        Args:
            num_drawn: samples so far, over all processes.

        Raises:
            ValueError: more than the setting's share of them, or of the source's rows, are bad.
        """
        what, num_samples = None, self.source.num_samples
        if num_samples is not None and len(self.rows) > self.max_share * num_samples:
            what = f"{len(self.rows):,} of the source's {num_samples:,} images"
        elif num_drawn >= JUDGED_FROM and self.count > self.max_share * num_drawn:
            what = f"{self.count:,} of the {num_drawn:,} images drawn so far"
        if what is not None:
            raise ValueError(
                f"data.max_bad_share={self.max_share}: {what} cannot be decoded; {self.path} says which and why. "
                "Repair or remove them, or allow more with --data.max_bad_share"
            )

    def _describe(self, bad: BadSample) -> dict[str, object]:
        if isinstance(self.source, Stream):
            return bad._asdict()
        return describe_bad(self.source, bad.row, self.num_channels)


def describe_bad(source: Source, row: int, num_channels: int) -> dict[str, object]:
    """Row, path and reason of an image that could not be decoded, for `bad_images.jsonl`."""
    reason = "was decoded when tried again"
    try:
        source.image(row, num_channels)
    except ValueError as error:
        reason = str(error.__cause__ or error)
    path = (source.rows[row][source.image_column] or {}).get("path")
    return {"row": row, "path": path, "reason": reason}


def look_beforehand(source: Source | Stream, config: DataConfig, num_channels: int) -> None:
    """Check a seeded sample of a source by its headers, and by decoding where headers do not tell, before a run begins.

    Images that were decoded beforehand are known, and bad ones of them tried again; of a stream the first few are
    decoded.

    Raises:
        ValueError: none can be decoded, such as with another number of channels than the encoder has; or so many
            cannot that the source has more than `max_bad_share` of them, by more than chance.
    """
    start, num_seen, bad = time.perf_counter(), 0, []
    if isinstance(source, DecodedSource):
        num_seen = len(source)
        rows = np.flatnonzero(source.decoded.table[:, 0] < 0).tolist()
        tried = rows[:: -(-len(rows) // LOOKED_AT) or 1]
        # Some may only have been out of reach when all were decoded.
        problems = [problem for row in tried if (problem := _decoding_problem(source, row, num_channels)) is not None]
        bad = problems[:1] * round(len(rows) * len(problems) / max(1, len(tried)))
    elif isinstance(source, Stream):
        images = ((shard, *read) for shard in range(len(source.shards)) for read in source.read(shard))
        for shard, row, stored in islice(images, MAX_TRIES):
            num_seen += 1
            try:
                source.decode(shard, row, stored, num_channels)
            except ValueError as error:
                bad.append(str(error))
    else:
        for row in np.random.default_rng(0).permutation(len(source))[:LOOKED_AT].tolist():
            num_seen += 1
            if (problem := _find_problem(source, row, num_channels)) is not None:
                bad.append(problem)
            if time.perf_counter() - start > SECONDS:
                break
    if not bad:
        return
    num_bad, share, is_all = len(bad), config.max_bad_share, num_seen == source.num_samples
    if num_bad == num_seen:
        raise ValueError(
            f"{bad[0]}; none of the {num_seen:,} images looked at can be decoded with encoder.in_chans={num_channels}"
        )
    found = f"{num_bad:,} of " + (f"the source's {num_seen:,} images" if is_all else f"{num_seen:,} images looked at")
    too_many = num_bad > share * num_seen and (is_all or _chance_of(num_bad, num_seen, share) < CHANCE)
    if config.on_bad_image == "skip" and too_many:
        raise ValueError(
            f"data.max_bad_share={share}: {found} cannot be decoded; the first: {bad[0]}. Repair or remove them, or "
            "allow more with --data.max_bad_share"
        )
    if not isinstance(source, DecodedSource):  # whose images were looked at before they were decoded
        print(f"note       {found} cannot be decoded; the first: {plain(bad[0])}")


def _chance_of(num_bad: int, num_seen: int, share: float) -> float:
    """The probability that at least `num_bad` of `num_seen` images are bad, where `share` of all are."""
    return sum(math.comb(num_seen, k) * share**k * (1 - share) ** (num_seen - k) for k in range(num_bad, num_seen + 1))


def _find_problem(source: Source, row: int, num_channels: int) -> str | None:
    """Why the image of a row cannot be decoded, as far as its header tells; None where it seems sound."""
    try:
        data = source.encoded(row)
        if num_channels in (1, 3, 4):  # any image is converted to these
            if data.startswith(PNG_SIGNATURE):
                png = read_png(data)
                return check_size(png.height, png.width, png.bytes_a_pixel, source.max_image_bytes)
            if data.startswith(JPEG_SIGNATURE) and (jpeg := read_jpeg(data)) is not None:
                return check_size(jpeg.height, jpeg.width, jpeg.bytes_a_pixel, source.max_image_bytes)
    except Exception:
        pass  # the full error follows
    return _decoding_problem(source, row, num_channels)


def _decoding_problem(source: Source, row: int, num_channels: int) -> str | None:
    try:
        source.image(row, num_channels)
    except ValueError as error:
        return str(error)
    return None


def leave_out_bad(source: Source, num_channels: int, num_workers: int) -> Source:
    """The rows of a source that can be decoded, found by decoding all of them, shared among the processes."""
    rows = range(process_index(), len(source), world_size())
    with in_workers(partial(_is_good, source, num_channels), rows, source.where, num_workers=num_workers) as good:
        bad = gather_object([row for row, is_good in zip(rows, good, strict=True) if not is_good])
    if not bad:
        return source
    if process_index() == 0:
        print(f"note       {len(bad):,} of the {len(source):,} evaluation images cannot be decoded and are left out")
    return source.subset(np.setdiff1d(np.arange(len(source)), bad))


def _is_good(source: Source, num_channels: int, row: int) -> bool:
    return _decoding_problem(source, row, num_channels) is None
