"""Exact duplicates: the smallest id stays, whatever the order of arrival."""

import random

import pyarrow as pa

from pipelines.data import duplicates


def index(rows: list[tuple[int, str]]) -> pa.Table:
    return pa.table(
        {
            "document": pa.array([number for number, _ in rows], pa.int64()),
            "digest": pa.array([duplicates.digest(t.encode()) for _, t in rows], pa.binary(16)),
            "bytes": pa.array([len(text.encode()) for _, text in rows]),
        }
    )


def test_smallest_id_of_each_content_stays() -> None:
    rows = [(1 << 32 | 3, "诗"), (2, "other"), (7, "诗"), (5, "诗"), (9, "詩"), (8, "other")]
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        kept = duplicates.unique(index(rows))
        assert kept.column("document").to_pylist() == [2, 5, 9]
        assert kept.column("bytes").to_pylist() == [5, 3, 3]


def test_digest_tells_contents_apart() -> None:
    texts = [f"第{number}首 {number}" for number in range(2000)]
    digests = {duplicates.digest(text.encode()) for text in texts}
    assert len(digests) == len(texts)
    assert {len(digest) for digest in digests} == {duplicates.DIGEST_BYTES}
