"""Packing: every token is predicted once, and every row knows its documents."""

import json
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data import packing, tokenizer
from tests import fakes

EOT = 0


Packer = Callable[..., packing.Packed]


def pack(
    lengths: list[int], sequence_length: int, packer: Packer = packing.pack
) -> tuple[packing.Packed, list[np.ndarray]]:
    tokens = [np.arange(1, n + 1, dtype=np.uint16) + 100 * i for i, n in enumerate(lengths)]
    ids = np.array([1 << 32 | i for i in range(len(lengths))])
    return packer(tokens, ids, sequence_length, EOT), tokens


def stream_of(packed: packing.Packed) -> list[int]:
    """What a reader gets back: rows without padding, overlap counted once."""
    rows = [row[:used].tolist() for row, used in zip(packed.tokens, packed.used, strict=True)]
    return rows[0] + [token for row in rows[1:] for token in row[1:]]


@settings(deadline=None)
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


@settings(deadline=None)
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
    assert counts == {
        "tokens": 13 + 4,
        "padding": int(packed.padding),
        "cut_documents": 1,  # the second one, which takes eleven tokens
        "cuts": 1,
    }


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=14)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_best_fit_predicts_every_token_once_from_what_stood_before_it(
    lengths: list[int], sequence_length: int
) -> None:
    packed, tokens = pack(lengths, sequence_length, packing.pack_best_fit)
    expected = sorted(
        pair
        for ids in tokens
        for pair in zip([EOT, *ids.tolist()], [*ids.tolist(), EOT], strict=True)
    )
    rows = [row[:used].tolist() for row, used in zip(packed.tokens, packed.used, strict=True)]
    assert sorted(pair for row in rows for pair in zip(row, row[1:], strict=False)) == expected
    assert all(
        (row[used:] == EOT).all() for row, used in zip(packed.tokens, packed.used, strict=True)
    )
    assert packed.counts["tokens"] == len(expected) + 1


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_best_fit_cuts_only_what_is_longer_than_a_row(
    lengths: list[int], sequence_length: int
) -> None:
    packed, _ = pack(lengths, sequence_length, packing.pack_best_fit)
    assert packed.cut_documents == sum(length + 1 > sequence_length for length in lengths)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 17), st.sampled_from([packing.pack, packing.pack_best_fit]))
def test_places_lead_back_into_the_document(
    lengths: list[int], sequence_length: int, packer: Packer
) -> None:
    packed, tokens = pack(lengths, sequence_length, packer)
    for row in packing.to_table(packed).to_pylist():
        bounds = [*row["segment_starts"], row["used"]]
        for number, document in enumerate(row["segment_documents"]):
            chain = [EOT, *tokens[document - (1 << 32)].tolist(), EOT]
            place = row["segment_places"][number]
            part = row["tokens"][bounds[number] : bounds[number + 1]]
            assert part == chain[place : place + len(part)]


TEXTS = [
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "短",
    "定日镜整天跟随太阳转动，把阳光反射到高塔顶端的同一个点上。\n" * 6,
    "mixed 混合 текст 𠮷 🌞",
    "１２３４年，王芳",
]
"""Of characters of one to four bytes; the third is longer than any row."""
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
"""Bytes that stand for themselves in a vocabulary of bytes, as GPT-2 has it; the others follow from
256 on."""


@pytest.mark.parametrize("layout", ["split", "best_fit"])
@pytest.mark.parametrize("vocab_size", [257, 400])
def test_no_character_of_chinese_is_lost(layout: str, vocab_size: int) -> None:
    """Every byte of every text stands in one place of one row, also where a row ends inside of a
    character: with 257 pieces, each byte is a token."""
    sizes = [len(text.encode()) for text in TEXTS]
    table = pa.table({"document": range(7, 12), "text": TEXTS, "bytes": sizes})
    given = (f"data.vocab_size={vocab_size}", f"data.packing={layout}", "data.sequence_length=16")
    encoder = tokenizer.fit(fakes.config("gpt-demo", *given), table)
    lengths = tokenizer.byte_lengths(encoder.serialized)
    vocabulary = {number: piece for piece, number in encoder.tokenizer.get_vocab().items()}
    byte_of = {chr(n): n for n in PRINTED} | {
        chr(256 + place): n for place, n in enumerate(sorted(set(range(256)) - set(PRINTED)))
    }
    found = [bytearray(size) for size in sizes]
    covered = [0] * len(TEXTS)
    for row in encoder.encode(table).to_pylist():
        bounds = [*row["segment_starts"], row["used"]]
        for number, document in enumerate(row["segment_documents"]):
            place = row["segment_bytes"][number]
            tokens = row["tokens"][bounds[number] : bounds[number + 1]]
            # The last token of a row is the first of the next: it is predicted once.
            overlap = number == 0 and row["segment_places"][0] > 0
            for at, token in enumerate(tokens):
                size = int(lengths[token])
                piece = bytes(byte_of[c] for c in vocabulary[token]) if size else b""
                assert len(piece) == size
                whole = TEXTS[document - 7].encode()
                assert whole[place : place + size] == piece
                found[document - 7][place : place + size] = piece
                covered[document - 7] += 0 if overlap and at == 0 else size
                place += size
    assert [bytes(one).decode() for one in found] == TEXTS
    assert covered == sizes


def test_best_fit_fills_rows() -> None:
    rng = np.random.default_rng(0)
    packed, tokens = pack(rng.integers(5, 200, 600).tolist(), 256, packing.pack_best_fit)
    assert packed.padding / packed.tokens.size < 0.02
    assert packed.cut_documents == 0
    split, _ = pack([len(ids) for ids in tokens], 256)
    assert split.cut_documents > 150


@pytest.mark.parametrize(("size", "name"), [(65_536, "uint16"), (65_537, "uint32")])
def test_smallest_type_that_holds_every_id(size: int, name: str) -> None:
    assert np.dtype(packing.token_type(size)).name == name
    assert np.iinfo(packing.token_type(size)).max >= size - 1
