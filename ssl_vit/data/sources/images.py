"""The images of a source by row: undecoded ones, decoded one at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import datasets
import numpy as np
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

from ssl_vit.data.decode.bounds import MAX_IMAGE_BYTES, read_file
from ssl_vit.data.decode.decode import Pages, decode
from ssl_vit.data.decode.formats import note_of_dropped
from ssl_vit.data.sampler import Mixture
from ssl_vit.data.sources.stored import Roots, find_stored

MAX_TRIES = 50  # rows among which an image that can be decoded is sought
_LOOKED_AT = 32  # images whose headers show which of their contents are not used
_Candidate = TypeVar("_Candidate")


@dataclass(frozen=True, eq=False)
class Source:
    """An indexable set of undecoded images."""

    name: str
    """`data.source` as the user wrote it."""
    rows: datasets.Dataset
    """The image column alone, as `Image(decode=False)`: `{"bytes": ..., "path": ...}` per row."""
    image_column: str
    """Name of that column."""
    labels: Int64[np.ndarray, " n"] | None = None
    """Index into `class_names` of each row, -1 = no label; None if no row has a label."""
    class_names: tuple[str, ...] = ()
    """Names of the classes; () when there are no labels."""
    groups: Int64[np.ndarray, " n"] | None = None
    """Rows of one group are pages or tiles of one file and stay on one side of any split; None = each row is alone."""
    columns: datasets.Dataset | None = None
    """The other columns of the same rows; None where there are none."""
    attribution: str | None = None
    """Text that the images' licence asks to be shown with them."""
    max_image_bytes: int = MAX_IMAGE_BYTES
    """Images that take more are refused."""
    pages: Literal["first", "channels"] | Int64[np.ndarray, " n"] = "first"
    """What of an image of several pages is decoded; an array holds the page of each row."""
    mixture: Mixture | None = None
    """The source that each row comes from; None where there is only one."""
    roots: tuple[Roots, ...] = ((),)
    """The files that rows may open, for each source of the mixture or the only one."""
    notes: tuple[str, ...] = ()
    """Sentences for the user before the first step: files left aside, classes found."""
    unlabelled: str = ""
    """Why there are no labels, and what to do; "" where there are."""
    root: str | None = None
    """The folder of images, or of its split, below which paths tell them apart; None for other sources."""
    tiles: Int32[np.ndarray, "n 5"] | None = None
    """Number of the image that each row is a tile of, and the tile's top, left, height and width in its upright pixels;
    rows of one image follow one another. None = rows are whole images."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_samples(self) -> int:
        """Images in an epoch."""
        return len(self)

    @property
    def num_classes(self) -> int:
        """Number of classes that have images."""
        return 0 if self.labels is None else len(np.unique(self.labels[self.labels >= 0]))

    def subset(self, rows: Int64[np.ndarray, " r"]) -> "Source":
        """The source with the given rows alone, in their order."""
        return replace(
            self,
            rows=self.rows.select(rows),
            columns=None if self.columns is None else self.columns.select(rows),
            labels=None if self.labels is None else self.labels[rows],
            groups=None if self.groups is None else self.groups[rows],
            pages=self.pages if isinstance(self.pages, str) else self.pages[rows],
            mixture=None if self.mixture is None else self.mixture.subset(rows),
            tiles=None if self.tiles is None else self.tiles[rows],
        )

    def image(self, index: int, num_channels: int) -> UInt8[Tensor, "{num_channels} h w"]:
        """Decode the image of one row, see `decode`.

        Raises:
            ValueError: the image cannot be decoded; names the source, the row and, if any, the path.
        """
        try:
            return self.decode(index, self.file(index), num_channels)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.where(index)}: {error}") from error

    def file(self, index: int) -> bytes | Path:
        """The encoded image of a row, or its file; errors hold the reason alone, see `find_stored`."""
        return find_stored(self.rows[index][self.image_column], self.roots[self.part(index)], self.max_image_bytes)

    def encoded(self, index: int) -> bytes:
        """The encoded image of a row, read from its file if it has one."""
        data = self.file(index)
        return data if isinstance(data, bytes) else read_file(data, self.max_image_bytes)

    def part(self, index: int) -> int:
        """The number of a row's source in the mixture; 0 where there is only one."""
        return 0 if self.mixture is None else int(self.mixture.origin[index])

    def decode(self, index: int, data: bytes | Path, num_channels: int) -> UInt8[Tensor, "{num_channels} h w"]:
        """Decode the file of a row by the source's settings; errors hold the reason alone."""
        return self.cut(self.decode_whole(index, data, num_channels), index)

    def decode_whole(self, index: int, data: bytes | Path, num_channels: int) -> UInt8[Tensor, "{num_channels} h w"]:
        """Decode the whole image that a row is, or is a tile of."""
        return decode(data, num_channels, self.max_image_bytes, self.page(index))

    def page(self, index: int) -> Pages:
        """What of the file of a row is its image."""
        return self.pages if isinstance(self.pages, str) else int(self.pages[index])

    def cut(self, image: UInt8[Tensor, "c h w"], index: int) -> UInt8[Tensor, "c h2 w2"]:
        """The tile of a row, as an image of its own in memory; the image as it is where rows are whole images.

        Raises:
            ValueError: the image has another size than its header said.
        """
        if self.tiles is None or not self.tiles[index, 3]:
            return image
        _, top, left, height, width = self.tiles[index].tolist()
        tile = image[:, top : top + height, left : left + width]
        if tile.shape[1:] != (height, width):
            raise ValueError(f"{image.shape[1]} x {image.shape[2]} pixels, and its header promised more; store it anew")
        return tile.permute(1, 2, 0).contiguous().permute(2, 0, 1)

    def note_of_dropped(self, num_channels: int) -> str | None:
        """A sentence on contents of a few images that are not used, by their headers; None where all are."""
        if not isinstance(self.pages, str):
            return None
        rows = np.unique(np.linspace(0, len(self) - 1, _LOOKED_AT).astype(int)).tolist()
        files = filter(None, map(self._file_or_none, rows))
        return note_of_dropped(files, num_channels, self.pages, self.max_image_bytes)

    def _file_or_none(self, index: int) -> bytes | Path | None:
        try:
            return self.file(index)
        except (ValueError, OSError):
            return None

    def _origin(self, index: int) -> tuple[str, int]:
        """The name of a row's source, and the number of the row, or of the image that it is a tile of, there."""
        rows = np.arange(len(self)) if self.tiles is None else self.tiles[:, 0]
        if self.mixture is None:
            return self.name, int(rows[index])
        origin = self.mixture.origin
        before = (origin[:index] == origin[index]) & (rows[:index] != rows[index])
        return self.mixture.names[origin[index]], len(np.unique(rows[:index][before]))

    def where(self, index: int) -> str:
        """The beginning of an error about the image of a row: source, row and, if any, path."""
        path = (self.rows[index][self.image_column] or {}).get("path")
        name, row = self._origin(index)
        page = "" if isinstance(self.pages, str) else f", page {self.pages[index]}"
        page += "" if self.tiles is None else ", tile at {1}, {2}".format(*self.tiles[index])
        return f"data.source={name!r}: row {row}" + (f" ({path}{page})" if path else page)

    def next_image(
        self, index: int, num_channels: int, at: Callable[[int], None] | None = None
    ) -> tuple[UInt8[Tensor, "{num_channels} h w"], int]:
        """Decode `index` or the next decodable row (wrapping); return image and row.

        In a mixture the next row is one of the same source. Of tiles it is one of the next image.

        Args:
            at: called with each row before it is decoded.

        Raises:
            ValueError: none of `MAX_TRIES` rows can be decoded. Names the first.
        """

        def rows() -> Iterator[int]:
            yield index
            following = np.roll(np.arange(len(self)), -index) if self.mixture is None else self.mixture.alike(index)
            yield from self._of_others(following).tolist()

        def decode(row: int) -> Tensor:
            if at is not None:
                at(row)
            return self.image(row, num_channels)

        return decode_first(rows(), decode)

    def _of_others(self, rows: Int64[np.ndarray, " r"]) -> Int64[np.ndarray, " t"]:
        """The rows after the first one; of tiles one of each image after its own, in which all tiles fail together."""
        if self.tiles is None:
            return rows[1:MAX_TRIES]
        starts = np.flatnonzero(np.diff(self.tiles[rows, 0])) + 1  # where the tiles of another image begin
        counts = np.diff(np.append(starts, len(rows)))[: MAX_TRIES - 1]
        return rows[starts[: len(counts)] + int(rows[0]) % np.maximum(counts, 1)]


def decode_first(
    candidates: Iterator[_Candidate],
    decode: Callable[[_Candidate], Tensor],
    skipped: Callable[[_Candidate, ValueError], None] | None = None,
) -> tuple[UInt8[Tensor, "c h w"], _Candidate]:
    """Decode the first candidate that can be decoded; return image and candidate.

    Args:
        skipped: called with each candidate that cannot be decoded, and why.

    Raises:
        ValueError: none of `MAX_TRIES` can be decoded. Names the first.
    """
    first, tried = None, 0
    for candidate in islice(candidates, MAX_TRIES):
        tried += 1
        try:
            return decode(candidate), candidate
        except ValueError as error:
            first = first or error
            if skipped is not None:
                skipped(candidate, error)
    others = f"; nor can any of the next {tried - 1} be decoded" if tried > 1 else ""
    raise ValueError(f"{first}{others}") from first
