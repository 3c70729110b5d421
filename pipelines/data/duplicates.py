"""Duplicates: of documents with the same content, the one with the smallest id stays.

Ids follow from the listing, so what stays does not depend on who read what first.
"""

import hashlib

import pyarrow as pa

DIGEST_BYTES = 16
"""At a billion documents, two different ones share a digest with a chance below 2e-21."""


def digest(payload: bytes) -> bytes:
    """BLAKE2b of a normalised payload."""
    return hashlib.blake2b(payload, digest_size=DIGEST_BYTES).digest()


def unique(index: pa.Table) -> pa.Table:
    """The rows of an index without duplicates, sorted by document id.

    Args:
        index: `document` int64, `digest` binary[16] and any other columns.
    """
    first = index.select(["document", "digest"]).group_by("digest").aggregate([("document", "min")])
    keep = first.column("document_min").combine_chunks()
    mask = pa.compute.is_in(index.column("document"), value_set=keep)
    return index.filter(mask).sort_by("document")
