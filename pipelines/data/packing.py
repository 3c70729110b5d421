"""Documents of tokens to rows of one length. Pure numpy and Arrow.

All documents of a partition and split form one stream: end-of-text, document, end-of-text,
document, ..., end-of-text. A row holds `sequence_length + 1` tokens of it and shares its first one
with the end of the row before, so that every token after the stream's first is predicted once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Packed:
    """Rows of one stream.

    `segment_starts` and `segment_documents` are flat; row r has entries
    `segment_offsets[r]:segment_offsets[r + 1]`.
    """

    tokens: np.ndarray
    """[rows, sequence_length + 1], padded with end-of-text."""
    used: np.ndarray
    """int32[rows]: tokens of the row that are not padding, at least 2."""
    segment_offsets: np.ndarray
    segment_starts: np.ndarray
    """int32: positions in the row where a document begins, with the end-of-text before it; the
    first one of a row is 0."""
    segment_documents: np.ndarray
    """int64: ids of those documents."""

    @property
    def padding(self) -> int:
        """Tokens that are padding, over all rows."""
        return int(self.tokens.size - self.used.sum())


def token_type(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type that holds every token id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def pack(
    tokens: Sequence[np.ndarray], documents: np.ndarray, sequence_length: int, end_of_text: int
) -> Packed:
    """Rows of one stream, in order.

    Args:
        tokens: token ids per document, all of one unsigned type.
        documents: int64 id per document.
    """
    assert len(tokens) == len(documents) > 0
    stream, starts = _stream(tokens, end_of_text)
    rows = -(-(len(stream) - 1) // sequence_length)
    begins = np.arange(rows) * sequence_length
    used = np.minimum(len(stream) - begins, sequence_length + 1)
    padded = np.full(rows * sequence_length + 1, end_of_text, dtype=stream.dtype)
    padded[: len(stream)] = stream
    windows = np.lib.stride_tricks.sliding_window_view(padded, sequence_length + 1)
    # Documents that a row touches: from the one that its first token is in, to its last token's.
    first = np.searchsorted(starts, begins, side="right") - 1
    last = np.searchsorted(starts, begins + used - 1, side="right") - 1
    counts = last - first + 1
    offsets = np.concatenate([[0], np.cumsum(counts)])
    which = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - first, counts)
    positions = np.maximum(starts[which] - np.repeat(begins, counts), 0)
    return Packed(
        tokens=windows[::sequence_length],
        used=used.astype(np.int32),
        segment_offsets=offsets.astype(np.int32),
        segment_starts=positions.astype(np.int32),
        segment_documents=documents[which].astype(np.int64),
    )


def to_table(packed: Packed) -> pa.Table:
    """Columns of a corpus of text: `tokens`, `used`, `segment_starts`, `segment_documents`.

    The schema's metadata has `counts`, JSON: what `prepare` adds up over all shards.
    """
    width = packed.tokens.shape[1]
    tokens = int(packed.used.sum()) - (len(packed.used) - 1)  # rows overlap by one
    counts = {"tokens": tokens, "padding": packed.padding}
    flat = pa.array(np.ascontiguousarray(packed.tokens).reshape(-1))
    offsets = pa.array(packed.segment_offsets)
    return pa.table(
        {
            "tokens": pa.FixedSizeListArray.from_arrays(flat, width),
            "used": pa.array(packed.used),
            "segment_starts": pa.ListArray.from_arrays(offsets, pa.array(packed.segment_starts)),
            "segment_documents": pa.ListArray.from_arrays(
                offsets, pa.array(packed.segment_documents)
            ),
        },
        metadata={"counts": json.dumps(counts)},
    )


def _stream(tokens: Sequence[np.ndarray], end_of_text: int) -> tuple[np.ndarray, np.ndarray]:
    """The stream, and the position of the end-of-text before each document."""
    mark = np.array([end_of_text], dtype=tokens[0].dtype)
    stream = np.concatenate([piece for ids in tokens for piece in (mark, ids)] + [mark])
    lengths = np.array([len(ids) + 1 for ids in tokens])
    return stream, np.concatenate([[0], np.cumsum(lengths)[:-1]])
