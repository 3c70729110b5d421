"""Every token leads back to its file and its bytes."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.corpus import PART_BITS, PLACE_BITS, Corpus
from pipelines.data.trace import trace
from tests import fakes, observed_data

SHORT = ("data.sequence_length=32", "data.vocab_size=300", "data.partition_bytes=6000")


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize("model", ["bpe", "wordpiece"])
def test_every_token_leads_back_to_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = fakes.config(
        "gpt-demo",
        *SHORT,
        "data.sources=[docs]",
        f"data.packing={packing}",
        f"data.tokenizer.model={model}",
        root="root",
    )
    corpus = Corpus(observed_data.corpus(config))
    rows = list(corpus.rows("train"))
    seen: dict[str, bytearray] = {}
    for sample in np.random.default_rng(0).permutation(len(rows))[:4].tolist():
        for position in range(int(rows[sample]["used"])):
            origin = trace(corpus, "train", sample, position)
            assert origin.inside is not None
            begin, end = origin.inside
            raw = seen.setdefault(origin.path, bytearray(Path(origin.path).read_bytes()))
            piece = corpus_piece(corpus, int(rows[sample]["tokens"][position]))
            assert raw[begin:end] == piece
            assert (end == begin) == (rows[sample]["tokens"][position] == 0)
        with pytest.raises(IndexError, match="which has"):
            trace(corpus, "train", sample, int(rows[sample]["used"]))
    assert len(seen) > 1
    with pytest.raises(IndexError, match=f"row {len(rows)} of {len(rows)}"):
        trace(corpus, "train", len(rows), 0)
    split = corpus.artifact.manifest.detail["splits"]["train"]
    padded = sum(33 - int(row["used"]) for row in rows)
    assert split["padding"] == padded
    assert 0 < split["padding_share"] < 0.5 and 0 < split["cut_share"] <= 1
    assert split["scripts"]["Han"]["documents"] == split["documents"]


def texts(first: int, count: int) -> list[str]:
    return [f"第{n}篇：定日镜跟随太阳。\n" * (3 + n % 9) for n in range(first, first + count)]


def jsonl(texts: list[str]) -> bytes:
    """With lines between them that are no documents."""
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in texts]
    lines[5::9] = [f"\n{{broken\n{line}" for line in lines[5::9]]
    return "\n".join(lines).encode() + b"\n"


def test_a_token_leads_back_through_files_of_many_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compressed one, one that several partitions share, and a table."""
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    lines = {"docs/a.jsonl.gz": jsonl(texts(0, 60)), "docs/b.jsonl": jsonl(texts(100, 200))}
    Path("docs/a.jsonl.gz").write_bytes(gzip.compress(lines["docs/a.jsonl.gz"]))
    Path("docs/b.jsonl").write_bytes(lines["docs/b.jsonl"])
    rows = texts(400, 60)
    pq.write_table(pa.table({"text": rows}), "docs/c.parquet", row_group_size=7)
    config = fakes.config("gpt-demo", *SHORT, "data.sources=[docs]", root="root")
    corpus = Corpus(observed_data.prepared(config)[0])
    found = list(corpus.rows("train"))
    seen: dict[str, set[int]] = {}
    partitions: dict[str, set[int]] = {}
    for sample in range(0, len(found), 6):
        position = sample % int(found[sample]["used"])
        origin = trace(corpus, "train", sample, position)
        assert origin.row is not None and origin.inside is not None
        if origin.path == "docs/c.parquet":
            text = rows[origin.row - 1].encode()
            assert origin.span is None
        else:
            raw = lines[origin.path]
            assert origin.span is not None
            record = raw[slice(*origin.span)]
            assert raw.split(b"\n")[origin.row - 1] == record
            text = json.loads(record)["text"].encode()
        piece = corpus_piece(corpus, int(found[sample]["tokens"][position]))
        assert text[slice(*origin.inside)] == piece
        seen.setdefault(origin.path, set()).add(origin.row)
        partitions.setdefault(origin.path, set()).add(origin.document >> PART_BITS + PLACE_BITS)
    assert seen.keys() == {"docs/a.jsonl.gz", "docs/b.jsonl", "docs/c.parquet"}
    assert all(len(rows) > 8 for rows in seen.values())
    assert len(partitions["docs/b.jsonl"]) > 3


def corpus_piece(corpus: Corpus, token: int) -> bytes:
    """The bytes that a token stands for."""
    from tokenizers import pre_tokenizers

    from pipelines.data.tokenizer import open_tokenizer

    if token == 0:
        return b""
    tokenizer = open_tokenizer(corpus.artifact.read_bytes("encoder/tokenizer.json").decode())
    # Each byte alone, as the character that stands for it.
    of = {}
    for code in range(256):
        character = chr(code).encode("latin-1")
        of[_stands_for(code)] = character
    assert set(of) == set(pre_tokenizers.ByteLevel.alphabet())
    return b"".join(of[letter] for letter in tokenizer.id_to_token(token) or "")


def _stands_for(byte: int) -> str:
    """GPT-2's table (Radford et al., 2019, encoder.py): printable Latin-1 stays, the rest follows
    from code point 256 on."""
    stays = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in stays:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in stays].index(byte))
