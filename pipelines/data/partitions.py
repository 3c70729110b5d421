"""The two passes over the partitions, as a worker does them: read and clean; encode and write.

Each piece of work is done once: what an earlier run finished is found in the scratch folder.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.config import ImageData, TextData
from cluster.storage import FileEntry, Staging
from pipelines.data import documents
from pipelines.data.cleaning import Rejected
from pipelines.data.corpus import PART_BITS, SPLITS, Split, part_name
from pipelines.data.documents import Leavings
from pipelines.data.scratch import Scratch
from pipelines.data.sources import Reject, SourceFile
from pipelines.families.base import Encoder

LINEAGE_ROWS = 1 << 16
"""Rows per row group of a lineage file."""


@dataclass(frozen=True)
class Cleaned:
    """What became of a partition."""

    partition: int
    index: pa.Table
    """Columns `documents.INDEX` of its documents."""
    drops: Counter[str]
    reasons: Counter[str]
    """Rows that could not be read, by reason; which ones lies in the scratch folder."""
    files: tuple[Reject, ...]
    """Files that could not be read."""
    sample: tuple[Rejected, ...]
    """Some of the documents that were dropped."""
    lines: Mapping[str, int]
    """As in `Leavings`."""


@dataclass(frozen=True)
class Shard:
    """What one part and split became."""

    split: Split
    part: int
    row_groups: tuple[int, ...]
    """Rows of each row group."""
    entry: FileEntry
    counts: Mapping[str, int]
    """What the encoder counted, such as `tokens` and `padding`."""


@dataclass(frozen=True)
class Encoding:
    """A part's work of the second pass."""

    part: int
    members: Mapping[Split, np.ndarray]
    """Ids of the documents of each split."""
    lines_before: Mapping[str, int]
    """Lines of a file that earlier partitions hold."""


# ------------------------------------------------------------------ read and clean


def read(
    work: tuple[int, Sequence[SourceFile]], *, data: TextData | ImageData, staging: Staging
) -> Cleaned:
    """Cleaned documents of a partition to scratch files."""
    partition, files = work
    scratch, name = Scratch(staging), f"read-{partition:05d}"
    if (done := scratch.recorded(name)) is not None:
        return _read_again(scratch, partition, done)
    index, leavings, entries = [], [], list[FileEntry]()
    for number, part in enumerate(documents.parts(files, data, partition)):
        entries.append(scratch.write_table(partition << PART_BITS | number, part.table))
        index.append(part.table.select(documents.INDEX))
        leavings.append(part.leavings)
    together = documents.together(leavings)
    entries.append(scratch.write(rejects_name(partition), _as_lines(together.rejects)))
    cleaned = _cleaned(partition, pa.concat_tables(index), together)
    tree = {
        "parts": len(index),
        "drops": cleaned.drops,
        "reasons": cleaned.reasons,
        "rejects": [asdict(reject) for reject in cleaned.files],
        "sample": [asdict(one) for one in cleaned.sample],
        "lines": cleaned.lines,
    }
    scratch.record(name, tree, entries)
    return cleaned


def rejects_name(partition: int) -> str:
    return f"rejects-{partition:05d}.jsonl"


def _cleaned(partition: int, index: pa.Table, left: Leavings) -> Cleaned:
    rows = [reject for reject in left.rejects if reject.row is not None]
    files = tuple(reject for reject in left.rejects if reject.row is None)
    reasons = Counter(reject.reason for reject in rows)
    return Cleaned(partition, index, left.drops, reasons, files, left.sample, left.lines)


def _as_lines(rejects: Sequence[Reject]) -> bytes:
    rows = (asdict(reject) for reject in rejects if reject.row is not None)
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def _read_again(scratch: Scratch, partition: int, done: Mapping[str, Any]) -> Cleaned:
    first = partition << PART_BITS
    index = [
        scratch.read_table(part, documents.INDEX) for part in range(first, first + done["parts"])
    ]
    return Cleaned(
        partition,
        pa.concat_tables(index),
        Counter(done["drops"]),
        Counter(done["reasons"]),
        tuple(Reject(**reject) for reject in done["rejects"]),
        tuple(Rejected(**one) for one in done["sample"]),
        done["lines"],
    )


def load(work: tuple[int, np.ndarray], *, staging: Staging) -> pa.Table:
    """Some cleaned documents of a part, in order of id."""
    part, ids = work
    table = Scratch(staging).read_table(part)
    return table.filter(pc.is_in(table.column("document"), pa.array(ids)))


# ------------------------------------------------------------------ encode and write


def encode(
    work: Encoding, *, staging: Staging, encoder: Encoder, row_group_rows: int
) -> tuple[list[Shard], FileEntry]:
    """The shards of one part, and its lineage file."""
    # One core per task: threads of the tokenizer's own would only fight over it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    scratch, name = Scratch(staging), f"encode-{work.part:08d}"
    key = _key(work, encoder, row_group_rows)
    if (done := scratch.recorded(name)) is not None and done["key"] == key:
        *entries, origin = (FileEntry(**entry) for entry in done["files"])
        pairs = zip(entries, done["shards"], strict=True)
        return [_shard(work.part, entry, noted) for entry, noted in pairs], origin
    shards: list[Shard] = []
    lineage: list[pa.Table] = []
    for split in SPLITS:
        table = load((work.part, work.members[split]), staging=staging)
        if not table.num_rows:
            continue
        rows = encoder.encode(table)
        entry = _write(staging, rows, f"{split}/{part_name(work.part)}", row_group_rows)
        groups = _row_groups(rows.num_rows, row_group_rows)
        noted = {"split": split, "row_groups": groups, "counts": _counted(rows)}
        shards.append(_shard(work.part, entry, noted))
        lineage.append(_lineage(table, split, work.lines_before))
    everything = pa.concat_tables(lineage).sort_by("document")
    origin = _write(staging, everything, f"documents/{part_name(work.part)}", LINEAGE_ROWS)
    notes = [{"split": s.split, "row_groups": s.row_groups, "counts": s.counts} for s in shards]
    scratch.record(name, {"key": key, "shards": notes}, [*(s.entry for s in shards), origin])
    return shards, origin


def _key(work: Encoding, encoder: Encoder, row_group_rows: int) -> str:
    """What the shards of a part follow from, beside its documents."""
    told = (repr(encoder), row_group_rows, sorted(work.lines_before.items()))
    digest = hashlib.sha256(repr(told).encode())
    for split in SPLITS:
        digest.update(b"%d " % len(work.members[split]) + work.members[split].tobytes())
    return digest.hexdigest()


def _shard(part: int, entry: FileEntry, noted: Mapping[str, Any]) -> Shard:
    return Shard(noted["split"], part, tuple(noted["row_groups"]), entry, noted["counts"])


def _lineage(table: pa.Table, split: Split, lines_before: Mapping[str, int]) -> pa.Table:
    origin = table.select(documents.ORIGIN)
    if lines_before:
        before = [lines_before.get(path, 0) for path in origin.column("path").to_pylist()]
        rows = pc.add(origin.column("row"), pa.array(before, pa.int64()))
        origin = origin.set_column(origin.column_names.index("row"), "row", rows)
    return origin.append_column("split", pa.array([split] * table.num_rows))


def _row_groups(rows: int, size: int) -> tuple[int, ...]:
    return tuple(min(size, rows - start) for start in range(0, rows, size))


def _counted(rows: pa.Table) -> dict[str, int]:
    counts: dict[str, int] = json.loads((rows.schema.metadata or {}).get(b"counts", b"{}"))
    return counts


def _write(staging: Staging, table: pa.Table, path: str, row_group_rows: int) -> FileEntry:
    sink = pa.BufferOutputStream()
    # Dictionaries spread a page's values over two places: zstd alone packs tokens a fifth smaller.
    options = {"compression": "zstd", "use_dictionary": False}
    pq.write_table(table, sink, row_group_size=row_group_rows, **options)
    return staging.write(path, sink.getvalue().to_pybytes())
