"""Exact duplicates: the smallest id stays, whatever the order of arrival."""

import random

import pyarrow as pa
import pytest

from pipelines.data import duplicates


def index(rows: list[tuple[int, str]]) -> pa.Table:
    return pa.table(
        {
            "document": pa.array([number for number, _ in rows], pa.int64()),
            "digest": pa.array([duplicates.digest(t.encode()) for _, t in rows], pa.binary(16)),
            "bytes": pa.array([len(text.encode()) for _, text in rows], pa.int64()),
        }
    )


def test_smallest_id_of_each_content_stays() -> None:
    rows = [(1 << 32 | 3, "诗"), (2, "other"), (7, "诗"), (5, "诗"), (9, "詩"), (8, "other")]
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        kept = duplicates.unique(index(rows))
        assert kept.column("document").to_pylist() == [2, 5, 9]
        assert kept.column("bytes").to_pylist() == [5, 3, 3]


@pytest.mark.parametrize("at_once", [9, 100, 1 << 21])
def test_what_stays_does_not_depend_on_the_ranges(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "RANGE", at_once)
    chance = random.Random(at_once)
    numbers = chance.sample(range(1 << 40), 900)
    rows = [(number, f"第{chance.randrange(400)}首") for number in numbers]
    first: dict[str, int] = {}
    for number, text in sorted(rows):
        first.setdefault(text, number)
    kept = sorted(first.values())
    for given in (rows, sorted(rows)):
        # As the index of many partitions: chunks, some of them empty, some the middle of another.
        pieces = [index(given[:0]), index(given[:300]), index([*given[250:600], given[0]])]
        pieces = [pieces[0], pieces[1], pieces[2].slice(50, 300), index(given[600:])]
        found = duplicates.unique(pa.concat_tables(pieces))
        assert found.column("document").to_pylist() == kept
    assert duplicates.unique(index([])).num_rows == 0
    assert duplicates.unique(index(rows).slice(0, 0)).num_rows == 0


def test_digest_tells_contents_apart() -> None:
    texts = [f"第{number}首 {number}" for number in range(2000)]
    digests = {duplicates.digest(text.encode()) for text in texts}
    assert len(digests) == len(texts)
    assert {len(digest) for digest in digests} == {duplicates.DIGEST_BYTES}
