"""Packing: every token is predicted once, and every row knows its documents."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data import packing

EOT = 0


def pack(lengths: list[int], sequence_length: int) -> tuple[packing.Packed, list[np.ndarray]]:
    tokens = [np.arange(1, n + 1, dtype=np.uint16) + 100 * i for i, n in enumerate(lengths)]
    ids = np.array([1 << 32 | i for i in range(len(lengths))])
    return packing.pack(tokens, ids, sequence_length, EOT), tokens


def stream_of(packed: packing.Packed) -> list[int]:
    """What a reader gets back: rows without padding, overlap counted once."""
    rows = [row[:used].tolist() for row, used in zip(packed.tokens, packed.used, strict=True)]
    return rows[0] + [token for row in rows[1:] for token in row[1:]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 17))
def test_rows_give_back_the_stream(lengths: list[int], sequence_length: int) -> None:
    packed, tokens = pack(lengths, sequence_length)
    expected = [EOT]
    for ids in tokens:
        expected += [*ids.tolist(), EOT]
    assert stream_of(packed) == expected
    assert packed.tokens.shape[1] == sequence_length + 1
    assert packed.used.min() >= 2
    assert (packed.used[:-1] == sequence_length + 1).all()
    for left, right in zip(packed.tokens[:-1], packed.tokens[1:], strict=True):
        assert left[-1] == right[0]
    assert (packed.tokens[-1][packed.used[-1] :] == EOT).all()
    assert packed.padding == sequence_length + 1 - packed.used[-1]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 17))
def test_segments_name_the_document_of_every_token(
    lengths: list[int], sequence_length: int
) -> None:
    packed, tokens = pack(lengths, sequence_length)
    owners = [i for i, ids in enumerate(tokens) for _ in range(len(ids) + 1)] + [len(tokens) - 1]
    table = packing.to_table(packed).to_pylist()
    for number, row in enumerate(table):
        starts = row["segment_starts"]
        assert starts[0] == 0
        assert starts == sorted(set(starts))
        assert starts[-1] < row["used"]
        bounds = [*starts, row["used"]]
        said = [
            document - (1 << 32)
            for document, a, b in zip(row["segment_documents"], bounds, bounds[1:], strict=False)
            for _ in range(b - a)
        ]
        begin = number * sequence_length
        assert said == owners[begin : begin + row["used"]]


def test_table_carries_types_and_counts() -> None:
    packed, _ = pack([3, 9, 1], 8)
    table = packing.to_table(packed)
    assert str(table.schema.field("tokens").type) == "fixed_size_list<item: uint16>[9]"
    assert [str(table.schema.field(n).type) for n in ("used", "segment_starts")] == [
        "int32",
        "list<item: int32>",
    ]
    counts = json.loads(table.schema.metadata[b"counts"])
    assert counts == {"tokens": 13 + 4, "padding": int(packed.padding)}


@pytest.mark.parametrize(("size", "name"), [(65_536, "uint16"), (65_537, "uint32")])
def test_smallest_type_that_holds_every_id(size: int, name: str) -> None:
    assert np.dtype(packing.token_type(size)).name == name
    assert np.iinfo(packing.token_type(size)).max >= size - 1
