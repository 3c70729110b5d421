"""Documents of tokens to rows of one length. Pure numpy and Arrow.

Each document is a chain: end-of-text, its tokens, end-of-text. A row holds `sequence_length + 1`
tokens and predicts all but its first. Chains that follow each other in a row share the end-of-text
between them, and a chain that is cut shares the token at the cut, so that every token of every
chain after its first is predicted once, from what really stood before it.

`split` lays all chains of a partition and split end to end and cuts that stream to rows. `best_fit`
puts each chain into the fullest row that still has room for it, largest first (Ding et al.,
arXiv:2404.10830): only chains longer than a row are cut, and rows end in padding.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Packed:
    """Rows of one partition and split.

    The `segment_` arrays but the first are flat; row r has entries
    `segment_offsets[r]:segment_offsets[r + 1]`. A segment is the part of a document in a row.
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
    segment_places: np.ndarray
    """int64: place in its document's chain of the token that a segment begins with; 0 is the
    end-of-text before it."""

    @property
    def padding(self) -> int:
        """Tokens that are padding, over all rows."""
        return int(self.tokens.size - self.used.sum())

    @property
    def cut_documents(self) -> int:
        """Documents that do not lie in one row."""
        return int((np.unique(self.segment_documents, return_counts=True)[1] > 1).sum())

    @property
    def counts(self) -> dict[str, int]:
        """What `prepare` adds up over all shards."""
        return {
            "tokens": int(self.used.sum()) - len(self.used) + 1,
            "padding": self.padding,
            "cut_documents": self.cut_documents,
            "cuts": int((self.segment_places > 0).sum()),
        }


def token_type(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type that holds every token id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def pack(
    tokens: Sequence[np.ndarray], documents: np.ndarray, sequence_length: int, end_of_text: int
) -> Packed:
    """Rows of one stream, in order: packing `split`.

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
    from_row = starts[which] - np.repeat(begins, counts)
    return Packed(
        tokens=windows[::sequence_length],
        used=used.astype(np.int32),
        segment_offsets=offsets.astype(np.int32),
        segment_starts=np.maximum(from_row, 0).astype(np.int32),
        segment_documents=documents[which].astype(np.int64),
        segment_places=np.maximum(-from_row, 0),
    )


def pack_best_fit(
    tokens: Sequence[np.ndarray], documents: np.ndarray, sequence_length: int, end_of_text: int
) -> Packed:
    """Rows that keep documents whole where they fit, in order of the first document in them.

    Args: as of `pack`.
    """
    assert len(tokens) == len(documents) > 0
    stream, chains = _stream(tokens, end_of_text)
    rows = best_fit([len(ids) + 1 for ids in tokens], sequence_length)
    out = np.full((len(rows), sequence_length + 1), end_of_text, dtype=stream.dtype)
    used = np.ones(len(rows), dtype=np.int32)
    starts, owners, places = [], [], []
    for number, row in enumerate(rows):
        at = 0
        for piece in row:
            begin = chains[piece.document] + piece.place
            out[number, at : at + piece.size + 1] = stream[begin : begin + piece.size + 1]
            starts.append(at)
            owners.append(piece.document)
            places.append(piece.place)
            at += piece.size
        used[number] += at
    return Packed(
        tokens=out,
        used=used,
        segment_offsets=np.cumsum([0, *map(len, rows)]).astype(np.int32),
        segment_starts=np.array(starts, dtype=np.int32),
        segment_documents=documents[owners].astype(np.int64),
        segment_places=np.array(places, dtype=np.int64),
    )


@dataclass(frozen=True, order=True)
class Piece:
    """Part of a document's chain: `size` predictions from `place` on."""

    document: int
    """Its number in the list of documents."""
    place: int
    size: int


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[Piece]]:
    """Which pieces of which documents share a row.

    What continues a document stands first in its row: nothing but its own last token may come
    before it.

    Args:
        sizes: predictions of each document's chain.
        capacity: predictions of a row.
    """
    rows: list[list[Piece]] = []
    tails: list[Piece] = []
    for document, size in enumerate(sizes):
        whole = size // capacity * capacity
        rows += [[Piece(document, place, capacity)] for place in range(0, whole, capacity)]
        if size > whole:
            tails.append(Piece(document, whole, size - whole))
    rows += _binned(tails, capacity)
    for row in rows:
        row.sort(key=lambda piece: (piece.place == 0, piece))
    return sorted(rows, key=lambda row: min(row))


def _binned(pieces: Sequence[Piece], capacity: int) -> list[list[Piece]]:
    """Best fit, decreasing. Bit r of `open_` is set where a row has room for r predictions."""
    with_room: list[list[list[Piece]]] = [[] for _ in range(capacity + 1)]
    rows: list[list[Piece]] = []
    open_ = 0
    # Pieces that continue a document open the rows of their size first: one to a row.
    for piece in sorted(pieces, key=lambda p: (p.place == 0, -p.size, p.document)):
        fitting = open_ >> piece.size if piece.place == 0 else 0
        if fitting:
            room = piece.size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                open_ &= ~(1 << room)
        else:
            room, row = capacity, []
            rows.append(row)
        row.append(piece)
        left = room - piece.size
        with_room[left].append(row)
        open_ |= 1 << left if left else 0
    return rows


def to_table(packed: Packed, segment_bytes: np.ndarray | None = None) -> pa.Table:
    """Columns of a corpus of text: `tokens`, `used`, `segment_starts`, `segment_documents`,
    `segment_places`, and `segment_bytes` where it is known.

    The schema's metadata has `counts`, JSON: what `prepare` adds up over all shards.

    Args:
        segment_bytes: int64 per segment: byte of the cleaned document at which it begins.
    """
    width = packed.tokens.shape[1]
    flat = pa.array(np.ascontiguousarray(packed.tokens).reshape(-1))
    offsets = pa.array(packed.segment_offsets)
    lists = {
        "segment_starts": packed.segment_starts,
        "segment_documents": packed.segment_documents,
        "segment_places": packed.segment_places,
    }
    if segment_bytes is not None:
        lists["segment_bytes"] = segment_bytes
    return pa.table(
        {
            "tokens": pa.FixedSizeListArray.from_arrays(flat, width),
            "used": pa.array(packed.used),
            **{
                name: pa.ListArray.from_arrays(offsets, pa.array(flat_list))
                for name, flat_list in lists.items()
            },
        },
        metadata={"counts": json.dumps(packed.counts)},
    )


def _stream(tokens: Sequence[np.ndarray], end_of_text: int) -> tuple[np.ndarray, np.ndarray]:
    """The stream, and the position of the end-of-text before each document."""
    mark = np.array([end_of_text], dtype=tokens[0].dtype)
    stream = np.concatenate([piece for ids in tokens for piece in (mark, ids)] + [mark])
    lengths = np.array([len(ids) + 1 for ids in tokens])
    return stream, np.concatenate([[0], np.cumsum(lengths)[:-1]])
