"""Pieces of evaluation sets in training text: shared runs of words.

The driver reads the evaluation sets and leaves a table of their n-grams in scratch; every reading
task opens it and looks each n-gram of its documents up. n = 13 words is GPT-3's (Brown et al. 2020,
appendix C); of text without spaces between words, 2n characters. Words are those of `shingles`:
case, punctuation and white space do not matter. A text of fewer words than n cannot be found, and
is counted.
"""

import csv
import functools
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

from cluster.config import DecontaminateSection, ImageData, TextData
from cluster.errors import SourceError
from pipelines.data import shingles, sources
from pipelines.data.scratch import Scratch
from pipelines.data.sources import Listing, SourceFile, open_binary
from pipelines.data.words import words

NAME = "evaluations.npz"
_FAR = 1 << 40
"""More words than a block has."""
SPANS = 1000
"""Overlaps of one part that are reported with their place; all are counted."""


@dataclass(frozen=True)
class Evaluations:
    """The n-grams of evaluation sets."""

    files: tuple[str, ...]
    grams: dict[int, tuple[np.ndarray, np.ndarray]]
    """By length: uint64 hashes in order, and the number of the file of each."""
    texts: Counter[str] = field(default_factory=Counter)
    """Texts of each file that are looked for."""
    too_short: Counter[str] = field(default_factory=Counter)
    """Texts of each file that are not."""


@dataclass(frozen=True)
class Overlap:
    """Where a document shares words with an evaluation set. Holds no content."""

    file: str
    row: int | None
    start: int
    """First character of the document after cleaning."""
    end: int
    evaluation: str


def begin(data: TextData | ImageData, scratch: Scratch) -> Evaluations | None:
    """On the driver: what no document may hold a piece of, for the reading tasks; None if nothing.

    Raises:
        SourceError: as `listing` and `collect`.
    """
    if not isinstance(data, TextData) or not data.decontaminate.sources:
        return None
    found = evaluations(data.decontaminate)
    leave(scratch, found)
    return found


def evaluations(settings: DecontaminateSection) -> Evaluations:
    """
    Raises:
        SourceError: as `listing` and `collect`.
    """
    return collect(listing(settings), settings)


def summary(settings: DecontaminateSection) -> dict[str, Any]:
    """What a corpus follows from, as `sources.summary` says it."""
    if not settings.sources:
        return {}
    against = sources.summary(settings.sources, listing(settings))
    return {f"without {source}": of for source, of in against.items()}


def listing(settings: DecontaminateSection) -> Listing:
    """
    Raises:
        SourceError: if a source does not exist or holds no file of text.
    """
    return sources.listing(settings.sources, "text")


def collect(found: Listing, settings: DecontaminateSection) -> Evaluations:
    """
    Raises:
        SourceError: if a file cannot be read: it would be missed in silence.
    """
    for reject in found.rejects:
        raise SourceError(f"data.decontaminate: {reject.file} cannot be read: {reject.reason}")
    texts, too_short = Counter[str](), Counter[str]()
    grams: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for number, file in enumerate(found.files):
        for text in dict.fromkeys(_texts(file)):
            n = settings.ngram * (2 if words(text).mostly_unspaced else 1)
            rolled = shingles.roll(shingles.tokens([text]).hashes, n)
            (texts if len(rolled) else too_short)[file.path] += 1
            owners = np.full(len(rolled), number, np.int32)
            grams.setdefault(n, []).append((rolled, owners))
    tables = {n: _in_order(pieces) for n, pieces in sorted(grams.items())}
    return Evaluations(tuple(file.path for file in found.files), tables, texts, too_short)


def _in_order(pieces: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    hashes = np.concatenate([hashes for hashes, _ in pieces])
    owners = np.concatenate([owners for _, owners in pieces])
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    first = np.ones(len(hashes), bool)
    first[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
    return hashes[first], owners[first]


def _texts(file: SourceFile) -> Iterator[str]:
    """Every string of an evaluation set: questions and answers alike."""
    try:
        with open_binary(file) as stream:
            raw = stream.read()
        yield from _strings(file.extension, raw)
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise SourceError(f"data.decontaminate: {file.path} cannot be read: {reason}") from None


def _strings(extension: str, raw: bytes) -> Iterator[str]:
    if extension == ".parquet":
        yield from _leaves(_cells(pq.read_table(io.BytesIO(raw))))
    elif extension in (".arrow", ".feather"):
        yield from _leaves(_cells(feather.read_table(io.BytesIO(raw))))
    elif extension in (".jsonl", ".ndjson"):
        for line in raw.decode("utf-8-sig").splitlines():
            yield from _leaves(json.loads(line) if line.strip() else None)
    elif extension == ".json":
        yield from _leaves(json.loads(raw.decode("utf-8-sig")))
    elif extension in (".csv", ".tsv"):
        lines = io.StringIO(raw.decode("utf-8-sig"), newline="")
        for row in csv.reader(lines, delimiter="\t" if extension == ".tsv" else ","):
            yield from row
    else:
        yield raw.decode("utf-8-sig")


def _cells(table: pa.Table) -> list[Any]:
    # Else pyarrow follows damaged offsets out of the process's memory.
    table.validate(full=True)
    cells: list[Any] = table.to_pylist()
    return cells


def _leaves(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value)


# ------------------------------------------------------------------ scratch


def leave(scratch: Scratch, found: Evaluations) -> None:
    """For reading tasks on any node."""
    arrays: dict[str, Any] = {"files": np.array(found.files, dtype=np.str_)}
    for n, (hashes, owners) in found.grams.items():
        arrays |= {f"h{n}": hashes, f"o{n}": owners}
    sink = io.BytesIO()
    np.savez(sink, **arrays)
    scratch.write(NAME, sink.getvalue())


def opened(scratch: Scratch) -> Evaluations:
    """What the driver left, read once per process."""
    info = scratch.staging.store.filesystem.get_file_info(f"{scratch.path}/{NAME}")
    # A process may outlive a run, and the next one have the same folder.
    return _opened(scratch, info.size, info.mtime_ns)


@functools.lru_cache(maxsize=1)
def _opened(scratch: Scratch, size: int, changed: int) -> Evaluations:
    raw = scratch.staging.store.read(f"{scratch.path}/{NAME}")
    assert raw is not None, "the driver leaves it before any task starts"
    with np.load(io.BytesIO(raw), allow_pickle=False) as found:
        lengths = sorted(int(name[1:]) for name in found.files if name[0] == "h")
        grams = {n: (found[f"h{n}"], found[f"o{n}"]) for n in lengths}
        return Evaluations(tuple(found["files"].tolist()), grams)


def report(
    found: Evaluations, documents: Mapping[str, int], overlaps: Iterable[Overlap]
) -> dict[str, Any]:
    """What a corpus says of it.

    Args:
        documents: documents that overlap, by file of the evaluation sets.
    """
    files = {
        file: {
            "texts": found.texts[file],
            "too_short": found.too_short[file],
            "documents": documents.get(file, 0),
        }
        for file in found.files
    }
    return {"evaluations": files, "overlaps": [asdict(overlap) for overlap in overlaps]}


# ------------------------------------------------------------------ looking up


@dataclass(frozen=True)
class Screened:
    """A part's documents beside the evaluation sets."""

    table: pa.Table
    """The documents that stay."""
    dropped: int
    documents: Counter[str]
    """Documents that overlap, by file of the evaluation sets."""
    overlaps: tuple[Overlap, ...]
    """The first `SPANS` of them."""


def screen(table: pa.Table, found: Evaluations, action: str) -> Screened:
    """
    Args:
        table: columns `text`, `path`, `row` and any others.
    """
    hits = list(_overlaps(table.column("text").to_pylist(), found))
    by_file = Counter(found.files[file] for _, file in {(text, file) for text, file, _, _ in hits})
    paths, rows = table.column("path"), table.column("row")
    overlaps = tuple(
        Overlap(paths[text].as_py(), rows[text].as_py(), start, end, found.files[file])
        for text, file, start, end in hits[:SPANS]
    )
    keep = np.ones(table.num_rows, bool)
    if action == "drop":
        keep[[text for text, _, _, _ in hits]] = False
    stay = table if keep.all() else table.filter(pa.array(keep))
    return Screened(stay, int((~keep).sum()), by_file, overlaps)


def _overlaps(texts: Sequence[str], found: Evaluations) -> Iterator[tuple[int, int, int, int]]:
    """Text, file of the evaluation sets, first character, one past the last; in order."""
    for first, block in shingles.blocks(texts):
        runs = _joined([_matches(block, n, *pair) for n, pair in found.grams.items()])
        for text, file, start, end in runs.tolist():
            origin = int(block.origins[text])
            yield (
                text + first,
                file,
                int(block.starts[start]) - origin,
                int(block.ends[end]) - origin,
            )


def _matches(block: shingles.Tokens, n: int, hashes: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """int64 (matches, 4): text, file, first word, last word."""
    rolled = shingles.roll(block.hashes, n)
    places = np.flatnonzero(np.isin(rolled, hashes))
    texts = np.searchsorted(block.offsets, places, "right") - 1
    inside = places + n <= block.offsets[texts + 1]
    places, texts = places[inside], texts[inside]
    # An n-gram that several files hold is there once for each.
    low = np.searchsorted(hashes, rolled[places], "left")
    count = np.searchsorted(hashes, rolled[places], "right") - low
    ends = np.cumsum(count)
    which = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - count - low, count)
    places, texts = np.repeat(places, count), np.repeat(texts, count)
    return np.stack([texts, owners[which], places, places + n - 1], axis=1).astype(np.int64)


def _joined(spans: Sequence[np.ndarray]) -> np.ndarray:
    """Runs of a text and file that overlap or touch are one; in order."""
    found = np.concatenate([np.zeros((0, 4), np.int64), *spans])
    found = found[np.lexsort(found.T[::-1])]
    starts, ends = found[:, 2], found[:, 3]
    other = np.append(True, (found[1:, :2] != found[:-1, :2]).any(axis=1))[: len(found)]
    # The furthest word so far of the same text and file: what comes later is numbered far above.
    far = np.maximum.accumulate(ends + np.cumsum(other) * _FAR) - np.cumsum(other) * _FAR
    other[1:] |= starts[1:] > far[:-1] + 1
    first = np.flatnonzero(other)
    last = np.append(first[1:], len(found))[: len(first)] - 1
    return np.column_stack([found[first, :3], far[last]])
