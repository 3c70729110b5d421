"""Lines, or paragraphs, that many documents hold: menus, licences, signatures.

Reading tasks leave the cleaned documents and a file of hashes of their lines. Counting tasks take a
range of hashes each out of all files, and leave those that more documents hold than may. Thinning
tasks read those range by range, take the lines out of every document but the first that holds them,
and write the documents as if they had been read so. No task holds more than a part and a range.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cluster.config import DedupSection, ImageData, TextData
from cluster.storage import FileEntry
from pipelines.data import cleaning, documents, duplicates, duplicates_near, ranges, streaming
from pipelines.data.cleaning import Document, Drop, Rejected
from pipelines.data.corpus import PART_BITS
from pipelines.data.scratch import Scratch

if TYPE_CHECKING:
    from pipelines.data.partitions import Cleaned

RANGE_ROWS = 1 << 23
"""Lines that one counting task holds: 16 bytes each."""
RAW = "raw-"
"""Kind of the scratch tables whose documents still have all of their lines."""
EVERY = (0, 2**64 - 1)
BREAKS = {"line": "\n", "paragraph": "\n\n"}


@dataclass(frozen=True)
class Thinned:
    """What became of a part."""

    part: int
    index: pa.Table
    """Columns `documents.INDEX` of the documents that are left."""
    drops: Counter[str]
    """Documents of which too little is left."""
    sample: tuple[Rejected, ...]
    shortened: int
    """Documents that lost lines, those that were dropped for it among them."""


def hashes(text: str, settings: DedupSection) -> list[int]:
    """Of each line; 0 for those that are too short to count."""
    pieces = text.split(BREAKS[settings.unit])
    return [_hash(piece.strip(), settings.unit_characters) for piece in pieces]


def _hash(piece: str, least: int) -> int:
    if len(piece) < least:
        return 0
    return int.from_bytes(hashlib.blake2b(piece.encode(), digest_size=8).digest())


def leave(scratch: Scratch, part: int, table: pa.Table, settings: DedupSection) -> FileEntry:
    """In a reading task: which documents of a part hold which lines, each once."""
    found = [sorted(set(hashes(t, settings)) - {0}) for t in table.column("text").to_pylist()]
    keys = np.array([key for own in found for key in own], np.uint64)
    ids = np.repeat(table.column("document").to_numpy(), [len(own) for own in found])
    order = np.argsort(keys, kind="stable")
    return ranges.write(
        scratch, _name(part), pa.table({"key": keys[order], "document": ids[order]})
    )


def frequent(table: pa.Table, most: int) -> pa.Table:
    """Lines that more documents hold than may: `key` in order, and the first `document`."""
    counted = table.group_by("key").aggregate([("document", "count"), ("document", "min")])
    often = counted.filter(pa.compute.greater(counted.column("document_count"), most))
    return often.select(["key", "document_min"]).rename_columns(["key", "document"]).sort_by("key")


def thin_text(text: str, document: int, first: dict[int, int], settings: DedupSection) -> str:
    """Without the lines that an earlier document holds.

    Args:
        first: document that keeps each frequent line.
    """
    separator = BREAKS[settings.unit]
    pieces = text.split(separator)
    keys = hashes(text, settings)
    kept = [p for p, key in zip(pieces, keys, strict=True) if first.get(key, document) == document]
    return text if len(kept) == len(pieces) else separator.join(kept)


# ------------------------------------------------------------------ tasks


def thin(
    cleaned: Sequence["Cleaned"], data: TextData | ImageData, scratch: Scratch, tasks: int
) -> tuple[list["Cleaned"], int]:
    """On the driver, between reading and choosing.

    Returns:
        The partitions as they are without frequent lines; how many documents lost some.
    """
    if not isinstance(data, TextData) or not data.dedup.lines:
        return list(cleaned), 0
    ids = np.concatenate([part.index.column("document").to_numpy() for part in cleaned])
    parts = np.unique(documents.part_of(ids)).tolist()
    size = sum(pa.compute.sum(part.index.column("bytes")).as_py() or 0 for part in cleaned)
    # No counted line is shorter.
    spans = list(enumerate(ranges.cut(size // data.dedup.unit_characters, RANGE_ROWS)))
    count = functools.partial(_count, parts=parts, settings=data.dedup, scratch=scratch)
    names = sorted(streaming.over_partitions(spans, count, tasks)) if parts else []
    task = functools.partial(_thin_part, names=names, data=data, scratch=scratch)
    thinned = sorted(streaming.over_partitions(parts, task, tasks), key=lambda one: one.part)
    together = [_with(part, thinned) for part in cleaned]
    return together, sum(one.shortened for one in thinned)


def _with(part: "Cleaned", thinned: Sequence[Thinned]) -> "Cleaned":
    own = [one for one in thinned if one.part >> PART_BITS == part.partition]
    index = [one.index for one in own] or [part.index]
    drops = sum((one.drops for one in own), part.drops)
    sample = cleaning.sampled([*part.sample, *(r for one in own for r in one.sample)])
    return replace(part, index=pa.concat_tables(index), drops=drops, sample=sample)


def _count(
    work: tuple[int, tuple[int, int]],
    *,
    parts: Sequence[int],
    settings: DedupSection,
    scratch: Scratch,
) -> str:
    """In a worker: a file of the frequent lines of a range; its name."""
    number, keys = work
    table = ranges.read(scratch, map(_name, parts), keys)
    ranges.write(scratch, name := f"frequent-{number:05d}.parquet", frequent(table, settings.lines))
    return name


def _thin_part(part: int, *, names: Sequence[str], data: TextData, scratch: Scratch) -> Thinned:
    """In a worker: a part without frequent lines, where encoding looks for it."""
    record = f"thin-{part:08d}"
    if (done := scratch.recorded(record)) is not None:
        index = scratch.read_table(part, documents.INDEX)
        sample = tuple(Rejected(**one) for one in done["sample"])
        return Thinned(part, index, Counter(done["drops"]), sample, done["shortened"])
    table = scratch.read_table(part, kind=RAW)
    first = _first_holders(table, names, data.dedup, scratch)
    rows, dropped, shortened = list[dict[str, Any]](), list[Rejected](), 0
    for row in table.to_pylist():
        text = thin_text(row["text"], row["document"], first, data.dedup)
        if text == row["text"]:
            rows.append(row)
            continue
        shortened += 1
        if drop := too_little(text, data):
            before = Document(row["text"], row["path"], row["row"])
            dropped.append(cleaning.rejected(before, drop))
        else:
            rows.append(row | _payload(text))
    left = pa.Table.from_pylist(rows, table.schema)
    entries = [scratch.write_table(part, left)]
    entries += duplicates_near.leave(scratch, part, left, data.dedup)
    drops, sample = Counter(one.reason for one in dropped), cleaning.sampled(dropped)
    noted = {"drops": drops, "sample": [asdict(one) for one in sample], "shortened": shortened}
    scratch.record(record, noted, entries)
    return Thinned(part, left.select(documents.INDEX), drops, sample, shortened)


def _first_holders(
    table: pa.Table, names: Sequence[str], settings: DedupSection, scratch: Scratch
) -> dict[int, int]:
    """Of the frequent lines of a part, the document that keeps each. Holds one range at a time."""
    texts = table.column("text").to_pylist()
    own = np.array(sorted({key for t in texts for key in hashes(t, settings)}), np.uint64)
    first: dict[int, int] = {}
    for name in names:
        found = ranges.read(scratch, [name], EVERY)
        keys, holders = found.column("key").to_numpy(), found.column("document").to_numpy()
        here = np.isin(keys, own)
        first.update(zip(keys[here].tolist(), holders[here].tolist(), strict=True))
    return first


def too_little(text: str, data: TextData) -> Drop | None:
    result = cleaning.not_empty(text)
    result = result if isinstance(result, Drop) else cleaning.at_least(data.min_characters)(text)
    return result if isinstance(result, Drop) else None


def _payload(text: str) -> dict[str, Any]:
    raw = text.encode()
    return {"text": text, "digest": duplicates.digest(raw), "bytes": len(raw)}


def _name(part: int) -> str:
    return f"lines-{part:08d}.parquet"
