"""Rows of scratch files brought together by key, without a global sort.

A task leaves a file of its own with rows in order of `key`, a hash. Later, a task for each range of
keys takes its rows out of all files: it reads the row groups that may hold them, and no others.
"""

import math
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.durable import storage_errors
from cluster.storage import FileEntry
from pipelines.data.scratch import Scratch

ROW_GROUP = 1 << 13
"""Rows that are read or left together."""


def write(scratch: Scratch, name: str, table: pa.Table) -> FileEntry:
    """
    Args:
        table: first column `key`, uint64 in order.

    Raises:
        StorageError: if storage does not take it.
    """
    sink = pa.BufferOutputStream()
    sealed = scratch.sealing.writing(f"{scratch.staging.id}/{name}")
    options = {"compression": "none", "use_dictionary": False, "row_group_size": ROW_GROUP}
    pq.write_table(table, sink, **options, **sealed)
    return scratch.write(name, sink.getvalue().to_pybytes())


def cut(rows: int, size: int) -> list[tuple[int, int]]:
    """Ranges of keys, first and last, each for about `size` of so many rows."""
    count = max(1, math.ceil(rows / size))
    edges = [(number << 64) // count for number in range(count + 1)]
    return [(low, high - 1) for low, high in zip(edges, edges[1:], strict=False)]


def read(scratch: Scratch, names: Iterable[str], keys: tuple[int, int]) -> pa.Table:
    """All rows with a key of a range.

    Raises:
        StorageError: if storage does not give them.
    """
    low, high = (pa.scalar(key, pa.uint64()) for key in keys)
    return pa.concat_tables(_read(scratch, name, low, high) for name in names)


def _read(scratch: Scratch, name: str, low: pa.Scalar, high: pa.Scalar) -> pa.Table:
    path = f"{scratch.path}/{name}"
    opened = scratch.sealing.reading(f"{scratch.staging.id}/{name}")
    with (
        storage_errors(f"read {path}"),
        pq.ParquetFile(path, filesystem=scratch.staging.store.filesystem, **opened) as file,
    ):
        groups = [
            number
            for number in range(file.metadata.num_row_groups)
            if _meets(file.metadata.row_group(number).column(0).statistics, low, high)
        ]
        table = file.read_row_groups(groups)
    keys = table.column("key")
    return table.filter(pc.and_(pc.greater_equal(keys, low), pc.less_equal(keys, high)))


def _meets(statistics: Any, low: pa.Scalar, high: pa.Scalar) -> bool:
    """Whether a row group may hold keys of a range; encrypted ones may tell nothing."""
    if statistics is None or not statistics.has_min_max:
        return True
    return bool(statistics.max >= low.as_py() and statistics.min <= high.as_py())
