"""The two passes over the partitions, as a worker does them: read and clean; encode and write.

Each piece of work is done once: what an earlier run finished is found in the scratch folder.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.config import ImageData, TextData
from cluster.storage import FileEntry, Staging
from pipelines.data import contamination, documents, duplicates_lines, duplicates_near
from pipelines.data.cleaning import Rejected
from pipelines.data.contamination import Overlap, Screened
from pipelines.data.corpus import PART_BITS, SPLITS, Split, part_name
from pipelines.data.documents import Documents, Leavings
from pipelines.data.scratch import Scratch
from pipelines.data.sealing import Sealing
from pipelines.data.sources import Reject, SourceFile
from pipelines.families.base import Encoder

LINEAGE_ROWS = 1 << 16
"""Rows per row group of a lineage file."""


@dataclass(frozen=True)
class Cleaned:
    """What became of a partition."""

    partition: int
    source: str
    """The one that its files lie in, as the recipe names it."""
    index: pa.Table
    """Columns `documents.INDEX` of its documents."""
    drops: Counter[str]
    reasons: Counter[str]
    """Rows that could not be read, by reason."""
    with_rejects: tuple[int, ...]
    """Parts for which the scratch folder says which rows those are."""
    files: tuple[Reject, ...]
    """Files that could not be read."""
    sample: tuple[Rejected, ...]
    """Some of the documents that were dropped."""
    lines: Mapping[str, int]
    """As in `Leavings`."""
    personal: Counter[str]
    """As in `Leavings`."""
    contaminated: Counter[str]
    """Documents that overlap with each file of the evaluation sets."""
    overlaps: tuple[Overlap, ...]

    def index_with_source(self) -> pa.Table:
        name = pa.DictionaryArray.from_arrays(
            pa.array(np.zeros(self.index.num_rows, dtype=np.int32)), pa.array([self.source])
        )
        return self.index.append_column("source", name)


def indexed(cleaned: Sequence[Cleaned]) -> pa.Table:
    """The index of all partitions, with the column `source`."""
    return pa.concat_tables(part.index_with_source() for part in cleaned).unify_dictionaries()


@dataclass(frozen=True)
class Shard:
    """What one part and split became."""

    split: Split
    part: int
    row_groups: tuple[int, ...]
    """Rows of each row group."""
    entry: FileEntry
    counts: Mapping[str, Any]
    """What the encoder counted, such as `tokens` and `padding`."""
    source: str


@dataclass(frozen=True)
class Encoding:
    """A part's work of the second pass."""

    part: int
    members: Mapping[Split, np.ndarray]
    """Ids of the documents of each split."""
    lines_before: Mapping[str, int]
    """Lines of a file that earlier partitions hold."""
    source: str


# ------------------------------------------------------------------ read and clean


def read(
    work: tuple[int, Sequence[SourceFile]], *, data: TextData | ImageData, staging: Staging
) -> Cleaned:
    """Cleaned documents of a partition to scratch files."""
    partition, files = work
    scratch, name = Scratch(staging, Sealing(data.encrypt)), f"read-{partition:05d}"
    if (done := scratch.recorded(name)) is not None:
        return _cleaned(work, _read_again(scratch, partition, done["parts"], _kind(data)), done)
    index, entries, told = list[pa.Table](), list[FileEntry](), list[Leavings]()
    reasons = Counter[str]()
    with_rejects: list[int] = []
    contaminated, overlaps = Counter[str](), list[Overlap]()
    for number, part in enumerate(documents.parts(files, data, partition)):
        if isinstance(data, TextData) and data.decontaminate.sources:
            part, screened = _without_evaluations(part, data, scratch)
            contaminated.update(screened.documents)
            overlaps += screened.overlaps
        place = partition << PART_BITS | number
        entries += _leave(place, part.table, data, scratch)
        index.append(part.table.select(documents.INDEX))
        rows = [reject for reject in part.leavings.rejects if reject.row is not None]
        if rows:
            entries.append(scratch.write(rejects_name(place), _as_lines(rows)))
            with_rejects.append(place)
        reasons.update(reject.reason for reject in rows)
        whole = tuple(reject for reject in part.leavings.rejects if reject.row is None)
        told.append(replace(part.leavings, rejects=whole))
    left = documents.together(told)
    tree = {
        "parts": len(index),
        "drops": left.drops,
        "reasons": reasons,
        "with_rejects": with_rejects,
        "rejects": [asdict(reject) for reject in left.rejects],
        "sample": [asdict(one) for one in left.sample],
        "lines": left.lines,
        "personal": left.personal,
        "contaminated": contaminated,
        "overlaps": [asdict(overlap) for overlap in overlaps],
    }
    scratch.record(name, tree, entries)
    return _cleaned(work, pa.concat_tables(index), tree)


def _kind(data: TextData | ImageData) -> str:
    return duplicates_lines.RAW if isinstance(data, TextData) and data.dedup.lines else ""


def _leave(
    part: int, table: pa.Table, data: TextData | ImageData, scratch: Scratch
) -> list[FileEntry]:
    """A part's documents, and what tells which of them are said twice."""
    documents = [scratch.write_table(part, table, _kind(data))]
    if not isinstance(data, TextData):
        return documents
    if data.dedup.lines:
        return [*documents, duplicates_lines.leave(scratch, part, table, data.dedup)]
    return documents + duplicates_near.leave(scratch, part, table, data.dedup)


def _without_evaluations(
    part: Documents, data: TextData, scratch: Scratch
) -> tuple[Documents, Screened]:
    evaluations = contamination.opened(scratch)
    screened = contamination.screen(part.table, evaluations, data.decontaminate.action)
    drops = Counter(contaminated=screened.dropped)
    leavings = documents.together([part.leavings, Leavings(drops=drops)])
    return Documents(screened.table, leavings), screened


def rejects_name(part: int) -> str:
    return f"rejects-{part:08d}.jsonl"


def _cleaned(
    work: tuple[int, Sequence[SourceFile]], index: pa.Table, noted: Mapping[str, Any]
) -> Cleaned:
    partition, files = work
    return Cleaned(
        partition,
        files[0].source,
        index,
        Counter(noted["drops"]),
        Counter(noted["reasons"]),
        tuple(noted["with_rejects"]),
        tuple(Reject(**reject) for reject in noted["rejects"]),
        tuple(Rejected(**one) for one in noted["sample"]),
        noted["lines"],
        Counter(noted["personal"]),
        Counter(noted["contaminated"]),
        tuple(Overlap(**overlap) for overlap in noted["overlaps"]),
    )


def _as_lines(rejects: Sequence[Reject]) -> bytes:
    rows = map(asdict, rejects)
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def _read_again(scratch: Scratch, partition: int, parts: int, kind: str) -> pa.Table:
    first = partition << PART_BITS
    own = range(first, first + parts)
    return pa.concat_tables(scratch.read_table(part, documents.INDEX, kind) for part in own)


def load(work: tuple[int, np.ndarray], *, scratch: Scratch) -> pa.Table:
    """Some cleaned documents of a part, in order of id."""
    part, ids = work
    return _chosen(scratch.read_table(part), ids)


def _chosen(table: pa.Table, ids: np.ndarray) -> pa.Table:
    return table.filter(pc.is_in(table.column("document"), pa.array(ids)))


# ------------------------------------------------------------------ encode and write


def encode(
    work: Encoding, *, scratch: Scratch, encoder: Encoder, row_group_rows: int
) -> tuple[list[Shard], FileEntry]:
    """The shards of one part, and its lineage file."""
    # One core per task: threads of the tokenizer's own would only fight over it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    name = f"encode-{work.part:08d}"
    key = _key(work, encoder, row_group_rows)
    if (done := scratch.recorded(name)) is not None and done["key"] == key:
        *entries, origin = (FileEntry(**entry) for entry in done["files"])
        pairs = zip(entries, done["shards"], strict=True)
        return [_shard(work, entry, noted) for entry, noted in pairs], origin
    everything = scratch.read_table(work.part)
    lineage: list[pa.Table] = []
    writing: list[tuple[dict[str, Any], Future[FileEntry]]] = []
    with ThreadPoolExecutor(1) as storage:  # it is waited for while the next split is encoded
        for split in SPLITS:
            table = _chosen(everything, work.members[split])
            if not table.num_rows:
                continue
            rows = encoder.encode(table)
            groups = _row_groups(rows.num_rows, row_group_rows)
            noted = {"split": split, "row_groups": groups, "counts": _counted(rows)}
            path = f"{split}/{part_name(work.part)}"
            written = storage.submit(_write, scratch, rows, path, row_group_rows)
            writing.append((noted, written))
            lineage.append(_lineage(table, split, work.lines_before))
        together = pa.concat_tables(lineage).sort_by("document")
        origin = _write(scratch, together, f"documents/{part_name(work.part)}", LINEAGE_ROWS)
    shards = [_shard(work, done.result(), noted) for noted, done in writing]
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


def _shard(work: Encoding, entry: FileEntry, noted: Mapping[str, Any]) -> Shard:
    groups = tuple(noted["row_groups"])
    return Shard(noted["split"], work.part, groups, entry, noted["counts"], work.source)


def _lineage(table: pa.Table, split: Split, lines_before: Mapping[str, int]) -> pa.Table:
    origin = table.select(documents.ORIGIN)
    if lines_before:
        before = [lines_before.get(path, 0) for path in origin.column("path").to_pylist()]
        rows = pc.add(origin.column("row"), pa.array(before, pa.int64()))
        origin = origin.set_column(origin.column_names.index("row"), "row", rows)
    return origin.append_column("split", pa.array([split] * table.num_rows))


def _row_groups(rows: int, size: int) -> tuple[int, ...]:
    return tuple(min(size, rows - start) for start in range(0, rows, size))


def _counted(rows: pa.Table) -> dict[str, Any]:
    counts: dict[str, Any] = json.loads((rows.schema.metadata or {}).get(b"counts", b"{}"))
    return counts


def _write(scratch: Scratch, table: pa.Table, path: str, row_group_rows: int) -> FileEntry:
    """A file of the corpus."""
    sink = pa.BufferOutputStream()
    # Dictionaries spread a page's values over two places: zstd alone packs tokens a fifth smaller.
    options = {"compression": "zstd", "use_dictionary": False, "row_group_size": row_group_rows}
    sealed = scratch.sealing.writing(f"{scratch.staging.id}/{path}")
    pq.write_table(table, sink, **options, **sealed)
    return scratch.staging.write(path, sink.getvalue().to_pybytes())
