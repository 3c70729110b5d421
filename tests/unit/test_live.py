"""A stream's rows, and where it stands: at least once, by partition."""

from collections.abc import Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import RunConfig, TextData
from cluster.errors import CapacityError, ConfigError, SourceError
from cluster.session import Session
from pipelines.data import contamination, live, tokenizer
from pipelines.data.live import Piece, Place
from pipelines.data.sources import SourceFile, listing, partition
from pipelines.data.tokenizer import TextEncoder
from pipelines.training import stream
from tests import fakes
from tests.unit.test_tokenizer import TEXTS, sample

ONCE = [1.0] * 5
SHORT = ("data.vocab_size=300", "data.sequence_length=16", "data.partition_bytes=900")


@settings(deadline=None)
@given(
    st.integers(0, 2**23 - 1), st.integers(1, live.MOST_ROWS), st.integers(0, live.MOST_ROWS - 1)
)
def test_a_place_is_one_number(partition: int, rows: int, row: int) -> None:
    place = Place(partition, rows, min(row, rows - 1))
    assert 0 <= place.id < 2**63
    assert Place.of(place.id) == place


def ids(partition: int, rows: int, taken: Sequence[int]) -> list[int]:
    return [Place(partition, rows, row).id for row in taken]


def test_a_partition_is_done_when_each_of_its_rows_was_seen() -> None:
    whole, open_, twice = ids(3, 4, [2, 0, 3, 1]), ids(5, 3, [0, 2]), ids(0, 2, [0, 0])
    seen = np.array([*whole, *open_, *twice, *ids(3, 4, [1])])
    epoch = np.array([1] * (len(seen) - 1) + [2])
    assert live.finished(epoch, seen) == {Piece(1, 3)}


def test_what_is_left_begins_with_the_epoch_that_was_open() -> None:
    order = list(islice(live.epochs(ONCE, seed=1), 10))
    assert [piece.epoch for piece in order] == [0] * 5 + [1] * 5
    assert {piece.partition for piece in order[:5]} == set(range(5))
    assert order[:5] != [Piece(0, piece.partition) for piece in order[5:]]
    done = frozenset([order[0], order[2], order[6]])
    left = list(islice(stream.Standing(done, 7).pending(ONCE, seed=1), 8))
    assert left[:7] == [piece for piece in order if piece not in done]
    assert left[7].epoch == 2


def test_an_epoch_passes_over_a_source_as_often_as_it_weighs(tmp_path: Path) -> None:
    parts = [[SourceFile("", "", "", 1, 0, "", name)] for name in ("诗", "诗", "b", "c", "d")]
    weights = live.weights(parts, {"诗/": 2.5, "b": 0.25, "c": 0})
    assert weights == [2.5, 2.5, 0.25, 0, 1]
    seen = [0] * 5
    for piece in takewhile(lambda piece: piece.epoch < 8, live.epochs(weights, seed=3)):
        seen[piece.partition % 5] += 1
    assert seen == [20, 20, 2, 0, 8]
    first = list(takewhile(lambda piece: piece.epoch < 2, live.epochs(weights, seed=3)))
    assert len(set(first)) == len(first)
    again = list(takewhile(lambda piece: piece.epoch < 2, live.epochs(weights, seed=3)))
    assert again == first


def test_more_passes_than_can_be_numbered_are_refused() -> None:
    parts = [[SourceFile("", "", "", 1, 0, "", "a")]] * 10_000
    with pytest.raises(SourceError, match="raise data.partition_bytes"):
        live.weights(parts, {"a": 999.0})


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    for n in range(30):
        # The last ten repeat what stands before them.
        text = f"第{n % 20}篇：定日镜跟随太阳，把光投向一点。line {n % 20} of it\n" * 3
        (tmp_path / f"{n:02d}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def parts_of(docs: Path, config: RunConfig) -> list[list[SourceFile]]:
    return partition(listing([str(docs)], "text").files, config.data.partition_bytes)


def test_rows_of_a_partition(docs: Path) -> None:
    given = (f"data.sources=[{docs}]", "data.heldout_fraction=0.2")
    config = fakes.config("gpt-demo", *SHORT, *given)
    encoder = tokenizer.fit(config, sample(TEXTS))
    parts = parts_of(docs, config)
    assert len(parts) > 4
    tables = [
        live.rows(files, Piece(0, number), config, encoder) for number, files in enumerate(parts)
    ]
    everything = [row for table in tables for row in live.as_rows(table)]
    text = documents_in(encoder, tables)
    assert 8 < len(set(text)) < 20  # some are held out, wherever they stand
    held = {n for n in range(20) if not any(f"line {n} " in one for one in text)}
    assert not any(f"第{n}篇" in one for n in held for one in text)
    seen = np.array([row["id"] for row in everything])
    assert len(set(seen)) == len(seen)
    assert live.finished(np.zeros_like(seen), seen) == {
        Piece(0, number) for number, table in enumerate(tables) if table.num_rows
    }
    later = live.rows(parts[0], Piece(1, 0), config, encoder)
    assert later.column("id").to_pylist() != tables[0].column("id").to_pylist()
    assert sorted(later.column("id").to_pylist()) == sorted(tables[0].column("id").to_pylist())


def test_what_a_stream_cannot_read_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [f'{{"text": "第{n}篇：line {n}"}}' for n in range(4)]
    (tmp_path / "文.jsonl").write_text("\n".join([lines[0], "{broken", *lines[1:], "[1]"]), "utf-8")
    config = fakes.config("gpt-demo", *SHORT, f"data.sources=[{tmp_path}]", "data.min_characters=1")
    encoder = tokenizer.fit(config, sample(TEXTS))
    (files,) = parts_of(tmp_path, config)
    assert live.rows(files, Piece(0, 0), config, encoder).num_rows
    (said,) = caplog.messages
    assert "文.jsonl row 2" in said and "broken" not in said
    assert sum(int(word) for word in said.split() if word.isdigit()) >= 2
    live.rows(files, Piece(1, 0), config, encoder)
    assert len(caplog.messages) == 1


def test_rows_without_pieces_of_evaluation_sets(docs: Path, tmp_path_factory: Any) -> None:
    sets = tmp_path_factory.mktemp("sets") / "题.txt"
    sets.write_text("第3篇：定日镜跟随太阳，把光投向一点。line 3", encoding="utf-8")
    against = (f"data.decontaminate.sources=[{sets}]", "data.decontaminate.ngram=9")
    config = fakes.config("gpt-demo", *SHORT, f"data.sources=[{docs}]", *against)
    encoder = tokenizer.fit(config, sample(TEXTS))
    assert isinstance(config.data, TextData)
    grams = contamination.evaluations(config.data.decontaminate)
    found = {}
    for screened in (None, grams):
        tables = [
            live.rows(files, Piece(0, number), config, encoder, screened)
            for number, files in enumerate(parts_of(docs, config))
        ]
        found[screened is None] = "".join(documents_in(encoder, tables))
    assert "第3篇" in found[True] and "第3篇" not in found[False]
    assert "第4篇" in found[False]


def documents_in(encoder: TextEncoder, tables: Sequence[object]) -> list[str]:
    found = []
    for table in tables:
        rows = sorted(live.as_rows(table), key=lambda row: row["id"])  # type: ignore[arg-type]
        tokens: list[int] = []
        for row in rows:
            tokens += row["tokens"][1 if tokens else 0 : row["used"]].tolist()
        decoded = encoder.tokenizer.decode(tokens, skip_special_tokens=False)
        found += [text for text in decoded.split(tokenizer.END_OF_TEXT) if text]
    return found


def test_prepare_looks_at_a_sample(docs: Path) -> None:
    config = fakes.config("gpt-demo", *SHORT, "data.tokenizer_bytes=500")
    parts = parts_of(docs, config)
    some = live.sampled(parts, config)
    assert 1 < len(some) < len(parts)
    assert all(part in parts for part in some)
    assert live.sampled(parts, config) == some


def test_a_stream_needs_text_and_a_cpu_to_prepare_on() -> None:
    with pytest.raises(ConfigError, match="stream is for text"):
        fakes.config("digits-cnn", "train.input=stream")
    for also in ("data.encrypt=true", "data.dedup.near=true", "data.dedup.lines=3"):
        with pytest.raises(ConfigError, match="store the"):
            fakes.config("gpt-demo", "train.input=stream", also)
    config = fakes.config("gpt-demo", "train.input=stream", "train.workers=2")
    with pytest.raises(CapacityError, match="beside the 2 of the workers, and the cluster has 2"):
        stream.check(Session(True, "", 2, 0, ("a",)), config)
    stream.check(Session(True, "", 3, 0, ("a",)), config)
