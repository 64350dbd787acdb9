"""Copies parquet files into the cache of `datasets`, whose own reader takes file names for patterns and addresses.

`datasets` replaces `open` and `Path` in a builder's module: nothing else belongs in this one.
"""

from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.builder import Key
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from datasets.table import table_cast

from ssl_vit.data.decode.bounds import MAX_IMAGE_BYTES

_ROWS = 256  # rows written at once


class ParquetFiles(datasets.ArrowBasedBuilder):
    """The rows of `data_files["train"]`, as `features` describes them."""

    BUILDER_CONFIG_CLASS = ParquetConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.config.features)  # pyright: ignore[reportAttributeAccessIssue]

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        files = self.config.data_files["train"]  # pyright: ignore[reportOptionalSubscript]
        return [datasets.SplitGenerator(name="train", gen_kwargs={"files": list(files)})]  # pyright: ignore[reportArgumentType]

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Key, pa.Table]]:
        schema = self.info.features.arrow_schema  # pyright: ignore[reportOptionalMemberAccess]
        for number, file in enumerate(files):
            with pq.ParquetFile(file, buffer_size=2**20) as opened:
                for part, batch in enumerate(read_batches(opened, _ROWS, MAX_IMAGE_BYTES)):
                    yield Key(number, part), table_cast(pa.Table.from_batches([batch]), schema)


def read_batches(
    file: pq.ParquetFile, size: int, most: int, start: int = 0, columns: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a file from `start` on, up to `size` at once; fewer where they could take more than `most` bytes.

    A value that a file holds once, in a dictionary, may be the value of a thousand rows.
    """
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        if start >= about.num_rows:
            start -= about.num_rows
            continue
        chunks = [about.column(number) for number in range(about.num_columns)]
        once = [chunk.total_uncompressed_size for chunk in chunks if chunk.has_dictionary_page]
        at_once = max(1, min(size, most // max(1, sum(once))))
        for batch in file.iter_batches(at_once, row_groups=[group], columns=columns, use_threads=False):
            if start < len(batch):
                yield batch.slice(start)
            start = max(0, start - len(batch))
