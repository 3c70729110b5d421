"""One partition's files to tables of cleaned documents, with a count of everything left out.

A *part* is as many documents as one task holds in memory. Most partitions become one part; one of
a compressed or otherwise indivisible file may become many. The id of a document is the number of
its partition, of its part and of its place there: it follows from the listing and the content.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.config import ImageData, TextData
from cluster.config.cleaning import Columns
from cluster.config.data import OTHERS
from pipelines.data import cleaning, duplicates, images, language, scripts, sources
from pipelines.data.cleaning import Document, Drop, Rejected
from pipelines.data.corpus import PART_BITS, PLACE_BITS
from pipelines.data.privacy import showing
from pipelines.data.privacy.scrub import Scrubbed, Scrubber, applies
from pipelines.data.sources import (
    CODE_EXTENSIONS,
    Lines,
    Payload,
    RawText,
    Reading,
    Reject,
    SourceFile,
)

MAX_BYTES_PER_CHARACTER = 4
"""Of UTF-8: a longer file is longer than `data.max_characters` whatever it holds."""

_LINEAGE = [
    ("document", pa.int64()),
    ("path", pa.string()),
    ("row", pa.int64()),
    ("start", pa.int64()),
    ("end", pa.int64()),
    ("digest", pa.binary(duplicates.DIGEST_BYTES)),
    ("bytes", pa.int64()),
    ("label", pa.string()),
    ("script", pa.string()),
    ("language", pa.string()),
]
_PAYLOAD: dict[Payload, list[tuple[str, pa.DataType]]] = {
    "text": [("text", pa.string()), ("before", pa.string())],
    "image": [
        ("pixels", pa.binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("channels", pa.int32()),
    ],
}
SHOWN_CHARACTERS = 600
"""Of some documents, as they were before cleaning: column `before`, for the corpus's report. Where
personal data is taken out of them, its types stand there."""
SHOWN_FIRST, SHOWN_SHARE = 20, 32
"""The first few of every part, and one in so many others, chosen by digest: to look for personal
data in the beginnings of all would take `prepare` a tenth longer."""
INDEX = ["document", "digest", "bytes", "label", "script", "language"]
"""Columns that the driver needs of every document."""
ORIGIN = ["document", "path", "row", "start", "end", "bytes"]
"""Columns that lead back to the sources: file, row, and the bytes of the record in the
decompressed file; null where the file has no rows or its rows no bytes of their own."""


@dataclass(frozen=True)
class Leavings:
    """What did not make it into the corpus."""

    rejects: tuple[Reject, ...] = ()
    """What could not be read."""
    drops: Counter[str] = field(default_factory=Counter)
    """Documents that were read and are not wanted, by reason."""
    sample: tuple[Rejected, ...] = ()
    """Some of those, each reason's own."""
    lines: Counter[str] = field(default_factory=Counter)
    """Lines of files that several partitions share: `row` counts from the partition's first."""
    personal: Counter[str] = field(default_factory=Counter)
    """Personal values that a surrogate stands for, by type."""

    @property
    def reasons(self) -> Counter[str]:
        """Rejects by reason."""
        return Counter(reject.reason for reject in self.rejects)


def together(leavings: Iterable[Leavings]) -> Leavings:
    """All of them, in an order that does not depend on which came first."""
    rejects: set[Reject] = set()
    drops: Counter[str] = Counter()
    sample: tuple[Rejected, ...] = ()
    lines: Counter[str] = Counter()
    personal: Counter[str] = Counter()
    for one in leavings:
        rejects.update(one.rejects)
        drops.update(one.drops)
        sample = cleaning.sampled([*sample, *one.sample])
        lines.update(one.lines)
        personal.update(one.personal)
    in_order = sorted(rejects, key=lambda r: (r.file, r.row or 0, r.reason))
    return Leavings(tuple(in_order), +drops, sample, lines, personal)


@dataclass(frozen=True)
class Documents:
    table: pa.Table
    """The columns of `families.base`, and `row`, `bytes`, `label`."""
    leavings: Leavings


Outcome = dict[str, Any] | Rejected | Reject | Lines | Scrubbed
"""A document as columns, or why there is none; before it, what was taken out of it."""


_REJECTS_LIMIT = 1 << 16
"""What cannot be read of a part: a file of nothing else would fill memory with it."""
_SAMPLE_LIMIT = 10_000
"""Dropped documents that are held before they are sampled."""


class _Part:
    """A part that is being filled."""

    def __init__(self, partition: int, number: int) -> None:
        self._first = partition << (PART_BITS + PLACE_BITS) | number << PLACE_BITS
        self.rows: list[dict[str, Any]] = []
        self.size = 0
        self._rejects: list[Reject] = []
        self._drops: Counter[str] = Counter()
        self._sample: list[Rejected] = []
        self._lines: Counter[str] = Counter()
        self._personal: Counter[str] = Counter()

    def add(self, outcome: Outcome) -> None:
        if isinstance(outcome, Reject):
            self._rejects.append(outcome)
        elif isinstance(outcome, Rejected):
            self._drops[outcome.reason] += 1
            self._sample.append(outcome)
            if len(self._sample) == _SAMPLE_LIMIT:
                self._sample = list(cleaning.sampled(self._sample))
        elif isinstance(outcome, Lines):
            self._lines[outcome.file] += outcome.count
        elif isinstance(outcome, Scrubbed):
            self._personal.update(outcome.counts)
        else:
            if before := outcome.pop("before", None):
                outcome["before"] = before() if self._is_shown(outcome["digest"]) else None
            self.rows.append({"document": self._first | len(self.rows), **outcome})
            self.size += outcome["bytes"]

    def _is_shown(self, digest: bytes) -> bool:
        return len(self.rows) < SHOWN_FIRST or digest[0] % SHOWN_SHARE == 0

    def is_full(self, size: int) -> bool:
        if len(self._rejects) == _REJECTS_LIMIT:
            return True
        return self.size >= size or len(self.rows) == 1 << PLACE_BITS

    def documents(self, payload: Payload) -> "Documents":
        if payload == "text":
            _tell_languages(self.rows)
        table = pa.Table.from_pylist(self.rows, schema(payload))
        sample = cleaning.sampled(self._sample)
        rejects = tuple(self._rejects)
        leavings = Leavings(rejects, self._drops, sample, self._lines, self._personal)
        return Documents(table, leavings)


def parts(
    files: Sequence[SourceFile], data: TextData | ImageData, partition: int
) -> Iterator[Documents]:
    """Read and clean a partition; at least one part, each of about `data.partition_bytes`."""
    part = _Part(partition, number := 0)
    for file in files:
        for outcome in _outcomes(file, data):
            if part.is_full(data.partition_bytes):
                if number + 1 == 1 << PART_BITS:
                    part.add(_too_large(file, data.partition_bytes))
                    break
                yield part.documents(data.kind)
                part = _Part(partition, number := number + 1)
            part.add(outcome)
    yield part.documents(data.kind)


def read(files: Sequence[SourceFile], data: TextData | ImageData, partition: int) -> Documents:
    """All parts of a partition as one."""
    found = list(parts(files, data, partition))
    table = pa.concat_tables(part.table for part in found)
    return Documents(table, together(part.leavings for part in found))


def part_of(ids: np.ndarray) -> np.ndarray:
    """Numbers of the parts that documents lie in, counted through all partitions."""
    return ids >> PLACE_BITS


def check(data: TextData | ImageData) -> None:
    """
    Raises:
        ConfigError: if a function that the recipe names cannot be imported.
    """
    if isinstance(data, TextData):
        _text_reader(data)


def readings(data: TextData | ImageData) -> dict[str, Reading]:
    """How each source's files become documents."""
    lines = data.lines if isinstance(data, TextData) else ()
    beside = _looked_at(data) if isinstance(data, TextData) else ()
    return {
        source: Reading(
            **data.columns.get(source, data.columns.get(OTHERS, {})),
            lines=source in lines,
            beside=beside,
        )
        for source in data.sources
    }


def _looked_at(data: TextData) -> tuple[str, ...]:
    """Columns that cleaning decides by."""
    steps = [step.settings for step in data.cleaning if isinstance(step.settings, Columns)]
    named = [{*s.required, *s.types, *s.bounds, *s.outliers} for s in steps]
    return tuple(sorted(set().union(*named)))


def _too_large(file: SourceFile, size: int) -> Reject:
    reason = f"over {1 << PART_BITS} times data.partition_bytes {size}: cut it, or raise that"
    return Reject(file.path, None, reason)


def schema(payload: Payload) -> pa.Schema:
    return pa.schema(_LINEAGE + _PAYLOAD[payload])


def _outcomes(file: SourceFile, data: TextData | ImageData) -> Iterator[Outcome]:
    reader = _text_reader(data) if isinstance(data, TextData) else _image_reader(data)
    return reader(file)


def _text_reader(data: TextData) -> Callable[[SourceFile], Iterator[Outcome]]:
    rules = cleaning.rules(data)
    scrubber = Scrubber(data.privacy)
    max_bytes = MAX_BYTES_PER_CHARACTER * data.max_characters

    def read_file(file: SourceFile) -> Iterator[Outcome]:
        for raw in sources.read_texts(file, max_bytes):
            if not isinstance(raw, RawText):
                yield raw
                continue
            document = Document(raw.text, file.path, raw.row, file.extension, raw.beside)
            text = cleaning.clean(document, rules)
            if isinstance(text, Drop):
                yield cleaning.rejected(document, text)
                continue
            before: Callable[[], str | None] = functools.partial(_beginning, raw.text)
            if applies(data.privacy, file.source):
                yield (scrubbed := scrubber.scrub(text))
                before = functools.partial(
                    showing.beginning, raw.text, text, scrubbed, scrubber, SHOWN_CHARACTERS
                )
                text = scrubbed.text
            payload = text.encode()
            yield _origin(file, raw.row, raw.span) | {
                "digest": duplicates.digest(payload),
                "bytes": len(payload),
                "label": None,
                "script": scripts.script(text),
                "language": language.CODE if file.extension in CODE_EXTENSIONS else None,
                "text": text,
                "before": before,
            }

    return read_file


def _beginning(text: str) -> str:
    return text[:SHOWN_CHARACTERS]


def _tell_languages(rows: Sequence[dict[str, Any]]) -> None:
    """Of all documents of a part together, which is faster than one by one."""
    prose = [row for row in rows if row["language"] is None]
    found = language.languages([row["text"] for row in prose])
    for row, name in zip(prose, found, strict=True):
        row["language"] = name


def _image_reader(data: ImageData) -> Callable[[SourceFile], Iterator[Outcome]]:
    def read_file(file: SourceFile) -> Iterator[Outcome]:
        for raw in images.read_images(file, data):
            if isinstance(raw, Reject):
                yield raw
                continue
            height, width, channels = raw.pixels.shape
            yield _origin(file, raw.row, None) | {
                "digest": duplicates.digest(raw.original),
                "bytes": raw.pixels.nbytes,
                "label": raw.label,
                "script": None,
                "language": None,
                "pixels": raw.pixels.tobytes(),
                "height": height,
                "width": width,
                "channels": channels,
            }

    return read_file


def _origin(file: SourceFile, row: int | None, span: tuple[int, int] | None) -> dict[str, Any]:
    start, end = span or (None, None)
    return {"path": file.path, "row": row, "start": start, "end": end}
