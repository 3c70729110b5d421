"""One partition's files to a table of cleaned documents, with a count of everything left out."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from cluster.config import ImageData, TextData
from pipelines.data import cleaning, duplicates, images, sources
from pipelines.data.cleaning import Document, Drop, Rejected
from pipelines.data.sources import Payload, Reject, SourceFile

MAX_BYTES_PER_CHARACTER = 4
"""Of UTF-8: a longer file is longer than `data.max_characters` whatever it holds."""

_LINEAGE = [
    ("document", pa.int64()),
    ("path", pa.string()),
    ("row", pa.int64()),
    ("digest", pa.binary(duplicates.DIGEST_BYTES)),
    ("bytes", pa.int64()),
    ("label", pa.string()),
]
_PAYLOAD: dict[Payload, list[tuple[str, pa.DataType]]] = {
    "text": [("text", pa.string())],
    "image": [
        ("pixels", pa.binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("channels", pa.int32()),
    ],
}
INDEX = [name for name, _ in _LINEAGE if name not in ("path", "row")]
"""Columns that the driver needs of every document."""


@dataclass(frozen=True)
class Leavings:
    """What did not make it into the corpus."""

    rejects: tuple[Reject, ...] = ()
    """What could not be read."""
    drops: Counter[str] = field(default_factory=Counter)
    """Documents that were read and are not wanted, by reason."""
    sample: tuple[Rejected, ...] = ()
    """Some of those, each reason's own."""

    @property
    def reasons(self) -> Counter[str]:
        """Rejects by reason."""
        return Counter(reject.reason for reject in self.rejects)


def together(leavings: Iterable[Leavings]) -> Leavings:
    """All of them, in an order that does not depend on which came first."""
    rejects: set[Reject] = set()
    drops: Counter[str] = Counter()
    sample: tuple[Rejected, ...] = ()
    for one in leavings:
        rejects.update(one.rejects)
        drops.update(one.drops)
        sample = cleaning.sampled([*sample, *one.sample])
    in_order = sorted(rejects, key=lambda r: (r.file, r.row or 0, r.reason))
    return Leavings(tuple(in_order), +drops, sample)


@dataclass(frozen=True)
class Documents:
    table: pa.Table
    """The columns of `families.base`, and `row`, `bytes`, `label`."""
    leavings: Leavings


Outcome = dict[str, Any] | Rejected | Reject
"""A document as columns, or why there is none."""


def read(files: Sequence[SourceFile], data: TextData | ImageData, partition: int) -> Documents:
    """Read and clean a partition. Ids are `partition << 32 | place among its documents`."""
    rows: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    dropped: list[Rejected] = []
    for outcome in _outcomes(files, data):
        if isinstance(outcome, Reject):
            rejects.append(outcome)
        elif isinstance(outcome, Rejected):
            dropped.append(outcome)
        else:
            rows.append({"document": partition << 32 | len(rows), **outcome})
    drops = Counter(one.reason for one in dropped)
    leavings = Leavings(tuple(rejects), drops, cleaning.sampled(dropped))
    return Documents(pa.Table.from_pylist(rows, schema(data.kind)), leavings)


def schema(payload: Payload) -> pa.Schema:
    return pa.schema(_LINEAGE + _PAYLOAD[payload])


def _outcomes(files: Sequence[SourceFile], data: TextData | ImageData) -> Iterator[Outcome]:
    read_file: Callable[[SourceFile], Iterator[Outcome]]
    read_file = _text_reader(data) if isinstance(data, TextData) else _image_reader(data)
    for file in files:
        yield from read_file(file)


def _text_reader(data: TextData) -> Callable[[SourceFile], Iterator[Outcome]]:
    rules = cleaning.rules(data)
    max_bytes = MAX_BYTES_PER_CHARACTER * data.max_characters

    def read_file(file: SourceFile) -> Iterator[Outcome]:
        for raw in sources.read_texts(file, max_bytes):
            if isinstance(raw, Reject):
                yield raw
                continue
            document = Document(raw.text, file.path, raw.row, file.extension)
            text = cleaning.clean(document, rules)
            if isinstance(text, Drop):
                yield cleaning.rejected(document, text)
                continue
            payload = text.encode()
            yield _lineage(file, raw.row, payload, len(payload)) | {"text": text}

    return read_file


def _image_reader(data: ImageData) -> Callable[[SourceFile], Iterator[Outcome]]:
    def read_file(file: SourceFile) -> Iterator[Outcome]:
        for raw in images.read_images(file, data):
            if isinstance(raw, Reject):
                yield raw
                continue
            height, width, channels = raw.pixels.shape
            yield _lineage(file, raw.row, raw.original, raw.pixels.nbytes) | {
                "label": raw.label,
                "pixels": raw.pixels.tobytes(),
                "height": height,
                "width": width,
                "channels": channels,
            }

    return read_file


def _lineage(file: SourceFile, row: int | None, payload: bytes, size: int) -> dict[str, Any]:
    return {
        "path": file.path,
        "row": row,
        "digest": duplicates.digest(payload),
        "bytes": size,
        "label": None,
    }
