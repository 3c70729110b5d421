"""The documents that an encoder learns from: every source, language and script, by digest."""

import numpy as np
import pyarrow as pa

STRATA = ("source", "language", "script")
"""Columns whose values the sample is taken from, each its part."""


def sample(index: pa.Table, limit: int) -> pa.Table:
    """About `limit` bytes of documents, at least one of each stratum: chosen by digest from each
    language and script, as many bytes as `shares` gives it."""
    ordered = index.sort_by("digest")
    sizes = ordered.column("bytes").to_numpy()
    stratum = np.zeros(len(sizes), dtype=np.int64)
    for name in STRATA:
        if name in index.column_names:
            codes = _codes(ordered.column(name))
            stratum = stratum * (codes.max(initial=0) + 1) + codes
    stratum = np.unique(stratum, return_inverse=True)[1]
    room = shares(np.bincount(stratum, weights=sizes), limit)
    keep = np.zeros(len(sizes), dtype=bool)
    for number, share in enumerate(room):
        members = np.flatnonzero(stratum == number)
        before = np.cumsum(sizes[members]) - sizes[members]
        keep[members] = (before < share) | (before == 0)
    return ordered.filter(pa.array(keep))


def shares(sizes: np.ndarray, limit: float) -> np.ndarray:
    """`limit` dealt out by the square root of the sizes, nobody more than it has.

    The exponent is that of Conneau and Lample (arXiv:1901.07291): what is rare gets pieces of its
    own without taking the vocabulary over.
    """
    dealt = np.zeros(len(sizes))
    open_ = np.ones(len(sizes), dtype=bool)
    while open_.any():
        weights = np.sqrt(sizes) * open_
        wanted = (limit - dealt[~open_].sum()) * weights / max(weights.sum(), 1e-9)
        full = open_ & (wanted >= sizes)
        dealt = np.where(full, sizes, np.where(open_, wanted, dealt))
        if not full.any():
            break
        open_ &= ~full
    return dealt


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """A number for each value of a column, in the values' order; 0 for none."""
    plain = column.cast(pa.string())
    names = pa.array(sorted(plain.unique().drop_null().to_pylist()), pa.string())
    found = pa.compute.index_in(plain, value_set=names)
    return pa.compute.fill_null(found, -1).to_numpy() + 1
