"""Duplicates: of documents with the same content, the one with the smallest id stays.

Ids follow from the listing, so what stays does not depend on who read what first.
"""

import hashlib

import numpy as np
import pyarrow as pa

DIGEST_BYTES = 16
"""At a billion documents, two different ones share a digest with a chance below 2e-21."""
RANGE = 1 << 21
"""Documents that are compared at once, about: it takes 100 bytes of memory for each."""


def digest(payload: bytes) -> bytes:
    """BLAKE2b of a normalised payload."""
    return hashlib.blake2b(payload, digest_size=DIGEST_BYTES).digest()


def unique(index: pa.Table) -> pa.Table:
    """The rows of an index without duplicates, sorted by document id.

    Copies share their digest, so that one range of digests after the other is looked at.

    Args:
        index: `document` int64, `digest` binary[16] and any other columns.
    """
    compared = index.select(["document", "digest"])
    ranges = _ranges(index.column("digest"), 1 + index.num_rows // RANGE)
    keep = np.zeros(index.num_rows, dtype=bool)
    for number in np.unique(ranges).tolist():
        rows = np.flatnonzero(ranges == number)
        own = compared.take(pa.array(rows))
        first = own.group_by("digest").aggregate([("document", "min")]).column("document_min")
        keep[rows] = pa.compute.is_in(own.column("document"), value_set=first.combine_chunks())
    kept = index.filter(pa.array(keep))
    ids = kept.column("document").to_numpy()
    return kept if (ids[1:] > ids[:-1]).all() else kept.sort_by("document")


def _ranges(digests: pa.ChunkedArray, count: int) -> np.ndarray:
    """The number of the range that each digest lies in, of ranges that are as good as equal."""
    heads = [np.zeros(0, dtype=np.uint32)]
    for chunk in digests.chunks:
        raw = np.frombuffer(chunk.buffers()[1] or b"", dtype=np.uint8)
        first, end = chunk.offset * DIGEST_BYTES, (chunk.offset + len(chunk)) * DIGEST_BYTES
        own = raw[first:end].reshape(-1, DIGEST_BYTES)
        heads.append(own[:, 0] * np.uint32(256) + own[:, 1])
    return (np.concatenate(heads) * np.uint64(count) >> np.uint64(16)).astype(np.uint16)
