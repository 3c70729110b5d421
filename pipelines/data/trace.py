"""Where a token of a corpus came from, down to the byte."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import ArtifactError
from pipelines.data.corpus import PLACE_BITS, Columns, Corpus, Split, part_name
from pipelines.data.tokenizer import byte_lengths


@dataclass(frozen=True)
class Origin:
    """Place of one token."""

    document: int
    path: str
    """The file, as the recipe names it."""
    row: int | None
    """Line or row of a file of many documents, counted from 1; None where the file is one."""
    span: tuple[int, int] | None
    """Bytes of the document in its decompressed file; None where the corpus does not know them."""
    inside: tuple[int, int] | None
    """Bytes of the token in the cleaned document, UTF-8; empty for end-of-text, which comes from no
    file. None where the tokens do not spell the document's bytes, as with a tokenizer that
    rewrites text."""


def trace(corpus: Corpus, split: Split, sample: int, position: int) -> Origin:
    """The file and the bytes of one token of a row.

    Where cleaning left the document as it was, the token is bytes `span[0] + inside[0]` to
    `span[0] + inside[1]` of the file.

    Args:
        sample: id of the row in its split.
        position: in the row, from 0.

    Raises:
        IndexError: if there is no such row, or the position is padding.
        ArtifactError: if a file of the corpus is missing or damaged.
    """
    row, number = _row(corpus, split, sample)
    tokens, used = row["tokens"][number], int(row["used"][number])
    if not 0 <= position < used:
        raise IndexError(f"position {position} of row {sample}, which has {used} tokens")
    starts = row["segment_starts"][number]
    segment = int(np.searchsorted(starts, position, side="right")) - 1
    document = int(row["segment_documents"][number][segment])
    inside = None
    begin = int(row["segment_bytes"][number][segment]) if "segment_bytes" in row else -1
    if begin >= 0:
        lengths = byte_lengths(corpus.artifact.read_bytes("encoder/tokenizer.json").decode())
        begin += int(lengths[tokens[starts[segment] : position]].sum())
        inside = (begin, begin + int(lengths[tokens[position]]))
    return _origin(corpus, document, inside)


def _row(corpus: Corpus, split: Split, sample: int) -> tuple[Columns, int]:
    """The row group that holds a row, and the row's number in it."""
    groups = corpus.row_groups(split)
    if not 0 <= sample < groups.starts[-1]:
        raise IndexError(f"row {sample} of {groups.starts[-1]} in {split}")
    number = int(np.searchsorted(groups.starts, sample, side="right")) - 1
    return groups.read(number), sample - groups.starts[number]


def _origin(corpus: Corpus, document: int, inside: tuple[int, int] | None) -> Origin:
    path = f"documents/{part_name(document >> PLACE_BITS)}"
    try:
        table = pq.read_table(
            corpus.artifact.file(path),
            filesystem=corpus.artifact.store.filesystem,
            **corpus.sealing.reading(f"{corpus.artifact.id}/{path}"),
            filters=pa.compute.field("document") == document,
        )
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(f"{corpus.artifact.id}: {path}: {error}") from None
    if table.num_rows != 1:
        raise ArtifactError(f"{corpus.artifact.id}: {path} knows no document {document}")
    (entry,) = table.to_pylist()
    span = (entry["start"], entry["end"]) if entry.get("end") is not None else None
    return Origin(document, entry["path"], entry["row"], span, inside)
