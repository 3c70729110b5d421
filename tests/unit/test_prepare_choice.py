"""Which documents stay, which are held out and which teach the encoder: pure decisions."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from cluster.config import RunConfig
from cluster.errors import SourceError
from pipelines.data import choice, documents, duplicates, sampling
from tests import fakes

TEXTS = [f"第{n}篇 document number {n}" for n in range(400)]


def index(texts: list[str], labels: list[str] | None = None) -> pa.Table:
    rows = [
        {
            "document": number,
            "digest": duplicates.digest(text.encode()),
            "bytes": len(text.encode()),
            "label": labels[number] if labels else None,
        }
        for number, text in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows, documents.schema("text")).select(documents.INDEX)


def choose(table: pa.Table, *overrides: str) -> choice.Chosen:
    config = settings(*overrides)
    return choice.choose(config, table, choice.Left(drops=Counter(too_short=2)))


def settings(*overrides: str) -> RunConfig:
    return fakes.config("gpt-demo", "data.heldout_fraction=0.25", *overrides)


def heldout_texts(texts: list[str], *overrides: str) -> set[str]:
    chosen = choose(index(texts), *overrides)
    return {texts[i] for i in chosen.splits["heldout"].column("document").to_pylist()}


def test_a_document_keeps_its_side_when_others_come_and_go() -> None:
    everything = heldout_texts(TEXTS)
    assert 60 < len(everything) < 140
    fewer = TEXTS[100:300][::-1]
    assert heldout_texts(fewer) == everything & set(fewer)
    assert heldout_texts(TEXTS, "seed=7") != everything
    assert heldout_texts(TEXTS, "data.heldout_fraction=0.1") < everything


def test_copies_never_land_on_both_sides() -> None:
    chosen = choose(index(TEXTS * 2))
    assert sum(table.num_rows for table in chosen.splits.values()) == len(TEXTS)
    assert chosen.left.drops == {"duplicate": 400, "too_short": 2}


def test_label_that_training_never_sees_is_dropped_and_counted() -> None:
    plain = choose(index(TEXTS))
    alone = plain.splits["heldout"].column("document").to_pylist()[0]
    labels = ["rare" if n == alone else "common" for n in range(400)]
    chosen = choose(index(TEXTS, labels))
    assert chosen.labels == ["common"]
    assert chosen.left.drops["label_not_in_training"] == 1
    assert alone not in chosen.splits["heldout"].column("document").to_pylist()


@pytest.mark.parametrize(
    ("fraction", "empty"), [("0.000001", "held-out"), ("0.999999", "training")]
)
def test_empty_split_is_refused_with_the_cure(fraction: str, empty: str) -> None:
    with pytest.raises(SourceError, match=f"leaves no {empty} document: give more documents"):
        choose(index(TEXTS), f"data.heldout_fraction={fraction}")


def test_sample_is_about_the_size_asked_for_and_does_not_follow_the_order() -> None:
    table = index(TEXTS)
    limit = 2000
    taken = sampling.sample(table, limit)
    assert limit <= sum(taken.column("bytes").to_pylist()) < limit + 40
    shuffled = sampling.sample(table.take(list(reversed(range(400)))), limit)
    assert shuffled.equals(taken)
    assert taken.column("document").to_pylist() != sorted(taken.column("document").to_pylist())
    assert sampling.sample(table, 1).num_rows == 1


def test_every_source_and_script_is_in_the_sample() -> None:
    scripts = ["Han"] * 4 + ["Cyrillic"] * 36 + ["Latin"] * 360
    table = index(TEXTS).drop_columns("script").append_column("script", pa.array(scripts))
    taken = sampling.sample(table, 3000)
    counted = Counter(taken.column("script").to_pylist())
    assert counted["Han"] == 4  # all there is
    assert 36 * 3000 / 11_000 < counted["Cyrillic"] < counted["Latin"]
    assert 3000 <= sum(taken.column("bytes").to_pylist()) < 3100


def test_languages_of_one_script_are_each_in_the_sample() -> None:
    languages = ["de"] * 4 + ["fr"] * 36 + ["en"] * 360
    table = index(TEXTS).drop_columns("language").append_column("language", pa.array(languages))
    counted = Counter(sampling.sample(table, 3000).column("language").to_pylist())
    assert counted["de"] == 4  # all there is
    assert 36 * 3000 / 11_000 < counted["fr"] < counted["en"]


@pytest.mark.parametrize(
    ("sizes", "limit", "dealt"),
    [
        ([100.0, 100.0], 50, [25.0, 25.0]),
        ([1.0, 10_000.0], 150, [1.0, 149.0]),
        ([400.0, 100.0], 300, [200.0, 100.0]),
        ([5.0, 7.0], 100, [5.0, 7.0]),
        ([], 10, []),
    ],
)
def test_shares_are_by_the_root_of_the_size_and_never_more_than_there_is(
    sizes: list[float], limit: float, dealt: list[float]
) -> None:
    assert sampling.shares(np.array(sizes), limit).tolist() == pytest.approx(dealt)
