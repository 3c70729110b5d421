"""Near duplicates across all sources: MinHash signatures, banded (LSH), clusters by union-find.

No step holds the corpus, or sorts it. A reading task writes the bands of its documents to a scratch
file of its own, in order of their keys. A finding task takes one range of keys out of all files,
compares documents that share a band, and answers with pairs. The driver joins pairs to clusters;
of each the smallest document id stays. Files and pairs follow from the documents alone: neither the
number of tasks nor that of ranges changes what is found.

Signatures are rensa's, whose slots agree with the chance of the Jaccard similarity s of two sets of
shingles (Broder 1997). With b bands of r rows, a pair is compared with the chance
`1 - (1 - s**r)**b` (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", 3.4.2); it counts
as the same if its whole signatures then agree in a share of `threshold`.
"""

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from cluster.config import DedupSection, ImageData, TextData
from cluster.storage import FileEntry
from pipelines.data import ranges, shingles, streaming
from pipelines.data.documents import part_of
from pipelines.data.scratch import Scratch

SEED = 1
"""Of the permutations: scratch files of two runs must agree."""
RANGE_ROWS = 1 << 21
"""Bands that one finding task holds; with signatures of 112 slots, 150 MB."""
ROUNDS = 32
"""In one bucket of dissimilar documents: how many become the one that others are compared with."""
SCHEMA_NAMES = ("key", "document", "sketch")


def signatures(texts: Sequence[str], settings: DedupSection) -> tuple[np.ndarray, np.ndarray]:
    """MinHash of each text's shingles.

    Returns:
        uint32 (n, permutations); places of the texts that they belong to, int64 (n,). A text
        without a word has none.
    """
    from rensa import RMinHash

    found, places = [], []
    for first, block in shingles.blocks(texts):
        hashes, offsets = shingles.ngrams(block, settings.ngram)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            hashes, offsets.astype(np.uint64), settings.permutations, SEED
        )
        full = np.flatnonzero(np.diff(offsets))
        found.append(np.array(matrix.to_rows(), dtype=np.uint32)[full])
        places.append(full + first)
    if not found:
        return np.zeros((0, settings.permutations), np.uint32), np.zeros(0, np.int64)
    return np.concatenate(found), np.concatenate(places)


def bands(texts: Sequence[str], ids: np.ndarray, settings: DedupSection) -> pa.Table:
    """What a reading task leaves: a row per document and band, in order of `key`.

    Args:
        ids: int64, the documents of the texts.

    Returns:
        `key` uint64, `document` int64, `sketch` binary: half a byte of each slot.
    """
    found, places = signatures(texts, settings)
    keys = band_keys(found, settings.bands)
    order = np.argsort(keys.ravel(), kind="stable")
    rows = order // settings.bands
    width = settings.permutations // 2
    sketches = np.ascontiguousarray(sketch(found)[rows])
    raw = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(rows), [None, pa.py_buffer(sketches)]
    )
    columns = [pa.array(keys.ravel()[order]), pa.array(ids[places][rows]), raw]
    return pa.table(columns, names=list(SCHEMA_NAMES))


def band_keys(found: np.ndarray, count: int) -> np.ndarray:
    """uint64 (n, bands): equal where all rows of the same band are."""
    rows = found.astype(np.uint64).reshape(len(found), count, found.shape[1] // count)
    keys = np.arange(1, count + 1, dtype=np.uint64)[None, :].repeat(len(found), axis=0)
    for row in range(rows.shape[2]):
        keys = shingles.mix(keys + rows[:, :, row])
    return keys


def sketch(found: np.ndarray) -> np.ndarray:
    """The lowest four bits of each slot, two to a byte (b-bit MinHash, Li and Koenig 2010)."""
    low = (found & 15).astype(np.uint8)
    return low[:, 0::2] << 4 | low[:, 1::2]


def similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Jaccard similarity as sketches tell it, row by row. By chance, one slot in 16 agrees."""
    differs = one ^ other
    same = np.count_nonzero(differs & 0xF0 == 0, axis=1) + np.count_nonzero(
        differs & 0x0F == 0, axis=1
    )
    slots = 2 * one.shape[1]
    return (same / slots - 1 / 16) * (16 / 15)


# ------------------------------------------------------------------ scratch files


def leave(scratch: Scratch, part: int, table: pa.Table, settings: DedupSection) -> list[FileEntry]:
    """In a reading task: a file of the bands of a part's documents, where they are asked for."""
    if not settings.near:
        return []
    ids = table.column("document").to_numpy()
    texts = table.column("text").to_pylist()
    return [ranges.write(scratch, _name(part), bands(texts, ids, settings))]


def find(index: pa.Table, data: TextData | ImageData, scratch: Scratch, tasks: int) -> np.ndarray:
    """Ids of the documents that are nearly the same as one with a smaller id, sorted.

    Raises:
        StorageError: if storage does not give what reading tasks left.
    """
    if not isinstance(data, TextData) or not data.dedup.near or not index.num_rows:
        return np.zeros(0, np.int64)
    settings = data.dedup
    parts = np.unique(part_of(index.column("document").to_numpy())).tolist()
    task = functools.partial(_find_in, parts=parts, settings=settings, scratch=scratch)
    spans = ranges.cut(index.num_rows * settings.bands, RANGE_ROWS)
    return redundant(streaming.over_partitions(spans, task, tasks))


def _find_in(
    keys: tuple[int, int], *, parts: Sequence[int], settings: DedupSection, scratch: Scratch
) -> np.ndarray:
    """In a worker: pairs of one range."""
    return pairs(ranges.read(scratch, map(_name, parts), keys), settings.threshold)


def _name(part: int) -> str:
    return f"bands-{part:08d}.parquet"


def pairs(table: pa.Table, threshold: float) -> np.ndarray:
    """Documents that share a band and are as similar as asked for: int64 (n, 2), smaller id first.

    In a bucket, each document is compared with the smallest; those that are not like it, with the
    smallest among themselves, and so on.
    """
    keys = table.column("key").to_numpy()
    ids = table.column("document").to_numpy()
    order = np.lexsort((ids, keys))
    shared = _shared(keys[order])
    order = order[shared]
    if not len(order):
        return np.zeros((0, 2), np.int64)
    # Only of those that share a key: most are alone.
    chosen = table.column("sketch").take(pa.array(order)).combine_chunks()
    sketches = np.frombuffer(b"".join(chosen.to_pylist()), np.uint8).reshape(len(order), -1)
    keys, ids = keys[order], ids[order]
    found = []
    for _ in range(ROUNDS):
        begins = np.append(True, keys[1:] != keys[:-1])
        heads = np.flatnonzero(begins)[np.cumsum(begins) - 1]
        alike = similarity(sketches, sketches[heads]) >= threshold
        linked = alike & (ids != ids[heads])
        found.append(np.stack([ids[heads][linked], ids[linked]], axis=1))
        left = ~alike
        left &= ~begins
        keys, ids, sketches = keys[left], ids[left], sketches[left]
        if not len(keys):
            break
    return np.unique(np.concatenate(found), axis=0)


def _shared(keys: np.ndarray) -> np.ndarray:
    """Of sorted keys, those that are there more than once."""
    same = np.concatenate(([False], keys[1:] == keys[:-1], [False]))
    return (same[1:] | same[:-1])[: len(keys)]


def redundant(found: Iterable[np.ndarray]) -> np.ndarray:
    """Ids to drop, sorted: all of a cluster but its smallest. Holds the pairs, not the corpus."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = np.concatenate([np.zeros((0, 2), np.int64), *found])
    ids, places = np.unique(edges, return_inverse=True)
    places = places.reshape(-1, 2)
    ones = np.ones(len(places), np.int8)
    graph = coo_array((ones, (places[:, 0], places[:, 1])), shape=(len(ids), len(ids)))
    _, labels = connected_components(graph, directed=False)
    # ids are sorted: the first of a label is its smallest.
    _, first = np.unique(labels, return_index=True)
    return np.delete(ids, first)


# ------------------------------------------------------------------ what to expect


def compared(similarity: float, settings: DedupSection) -> float:
    """Chance that two documents of a Jaccard similarity share a band."""
    rows = settings.permutations // settings.bands
    return 1 - (1 - similarity**rows) ** settings.bands


def found_same(similarity: float, settings: DedupSection) -> float:
    """Chance that they are dropped as the same.

    Slots are independent: of each band all rows agree or not, and the number of slots that agree in
    the others is binomial. The sum over all signatures is taken over the number of agreeing slots
    and whether a band is among them. Half a byte of a slot agrees by chance in 1 of 16.
    """
    slots, rows = settings.permutations, settings.permutations // settings.bands
    by_chance = 1 / 16
    needed = math.ceil(slots * (settings.threshold * (1 - by_chance) + by_chance) - 1e-9)
    return _tail(similarity, by_chance, rows, settings.bands, needed)


def _tail(share: float, by_chance: float, rows: int, count: int, needed: int) -> float:
    """Chance that a whole band agrees and at least `needed` sketched slots do."""
    # Distribution of sketched slots of one band that is whole, and of one that is not.
    whole = np.zeros(rows + 1)
    whole[rows] = share**rows
    seen = share + (1 - share) * by_chance
    anyhow = np.array(
        [math.comb(rows, k) * seen**k * (1 - seen) ** (rows - k) for k in range(rows + 1)]
    )
    broken = anyhow - whole
    total, none = np.ones(1), np.ones(1)
    for _ in range(count):
        total, none = np.convolve(total, anyhow), np.convolve(none, broken)
    return float((total - none)[needed:].sum())
