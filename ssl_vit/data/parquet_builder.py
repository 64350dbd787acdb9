"""Parquet files by their names into the cache of `datasets`, whose own reader takes names for patterns and addresses.

`datasets` replaces what a builder's module calls `open` or `Path`: nothing else belongs in this one.
"""

from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.builder import Key
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from datasets.table import table_cast

_ROWS = 256  # written at once


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
                for part, batch in enumerate(opened.iter_batches(_ROWS)):
                    yield Key(number, part), table_cast(pa.Table.from_batches([batch]), schema)
