"""Near duplicates: what is found follows the formula, and from nothing but the documents."""

import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster import loading
from cluster.config import DedupSection
from cluster.errors import ConfigError
from cluster.storage import Store
from pipelines.data import duplicates_near as near
from pipelines.data import ranges, shingles
from pipelines.data.scratch import Scratch

SETTINGS = DedupSection(near=True)
HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]


def poem(rng: random.Random, length: int = 300) -> str:
    return "".join(rng.choices(HAN, k=length))


def prose(rng: random.Random, length: int = 300) -> str:
    return " ".join(f"w{rng.randrange(5000)}" for _ in range(length))


def edited(text: str, rng: random.Random, edits: int) -> str:
    """With some words, or characters of Chinese, replaced by new ones."""
    words = text.split(" ") if " " in text else list(text)
    for place in rng.sample(range(len(words)), edits):
        words[place] = f"new{rng.randrange(10**9)}" if " " in text else rng.choice(HAN)
    return (" " if " " in text else "").join(words)


def shingled(text: str, n: int = 5) -> set[tuple[str, ...]]:
    """As plain Python has it."""
    words = text.lower().split() if " " in text else list(text)
    return set(zip(*(words[i:] for i in range(n)), strict=False)) or {tuple(words)}


def dropped(texts: list[str], ids: list[int] | None = None) -> list[int]:
    table = near.bands(texts, np.array(ids or range(len(texts)), np.int64), SETTINGS)
    return near.redundant([near.pairs(table, SETTINGS.threshold)]).tolist()


# ------------------------------------------------------------------ shingles


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The mirror, the sun!", "the  MIRROR\tthe sun"),
        ("定日镜，跟随太阳。", "定日镜 跟随 太阳"),
        ("Größe ÉTÉ", "größe été"),
        ("a_b c1", "(a_b) -- c1"),
        ("한국어 문장", "한국어; 문장."),
    ],
)
def test_words_are_the_same_whatever_stands_between(one: str, other: str) -> None:
    first, second = (shingles.tokens([text]).hashes.tolist() for text in (one, other))
    assert first == second


def test_words_know_their_places() -> None:
    texts = ["ab 定日 c", "", "𠀀x é", " "]
    found = shingles.tokens(texts)
    joined = "\n".join(texts)
    words = [joined[a:b] for a, b in zip(found.starts, found.ends, strict=True)]
    assert words == ["ab", "定", "日", "c", "𠀀", "x", "é"]
    assert found.offsets.tolist() == [0, 4, 4, 7, 7]
    assert [joined[start:][:1] for start in found.origins[:3]] == ["a", "\n", "𠀀"]


def test_runs_of_words_are_those_of_plain_python() -> None:
    rng = random.Random(0)
    texts = [poem(rng, n) for n in (0, 1, 4, 5, 6, 60)] + [prose(rng, n) for n in (1, 4, 5, 80)]
    hashes, offsets = shingles.ngrams(shingles.tokens(texts), 5)
    seen: dict[int, tuple[str, ...]] = {}
    for text, start, end in zip(texts, offsets, offsets[1:], strict=False):
        expected = shingled(text) if text else set()
        assert len(set(hashes[start:end].tolist())) == len(expected)
        assert end - start == (
            max(len(text.split() if " " in text else text) - 4, 1) if text else 0
        )
        for number in hashes[start:end].tolist():
            seen.setdefault(number, ())
    one, _ = shingles.ngrams(shingles.tokens([texts[5]]), 5)
    assert one.tolist() == hashes[offsets[5] : offsets[6]].tolist()


def test_blocks_hold_every_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shingles, "BLOCK", 50)
    texts = [f"第{n}篇 text " * (n % 7) for n in range(40)]
    whole = shingles.tokens(texts).hashes.tolist()
    parts = list(shingles.blocks(texts))
    assert len(parts) > 5
    assert [number for _, part in parts for number in part.hashes.tolist()] == whole


# ------------------------------------------------------------------ the curve


@pytest.mark.parametrize("write", [poem, prose], ids=["Chinese", "English"])
def test_pairs_are_found_as_often_as_the_formula_says(write: object) -> None:
    """300 pairs at each of several similarities, of sets as plain Python has them."""
    rng = random.Random(7)
    for edits in (4, 12, 20, 40):
        first = [write(rng) for _ in range(300)]  # type: ignore[operator]
        second = [edited(text, rng, edits) for text in first]
        sets = [(shingled(a), shingled(b)) for a, b in zip(first, second, strict=True)]
        true = [len(a & b) / len(a | b) for a, b in sets]
        told, _ = near.signatures(first, SETTINGS)
        other, _ = near.signatures(second, SETTINGS)
        assert abs((told == other).mean() - np.mean(true)) < 0.01
        keys, others = (near.band_keys(x, SETTINGS.bands) for x in (told, other))
        expected = np.mean([near.compared(j, SETTINGS) for j in true])
        assert abs((keys == others).any(axis=1).mean() - expected) < 0.07
        alike = near.similarity(near.sketch(told), near.sketch(other)) >= SETTINGS.threshold
        found = ((keys == others).any(axis=1) & alike).mean()
        expected = np.mean([near.found_same(j, SETTINGS) for j in true])
        assert abs(found - expected) < 0.07


def test_the_curve_of_the_documentation() -> None:
    table = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    for percent in (30, 40, 50, 60, 65, 70, 75, 80, 85, 90, 95):
        share = percent / 100
        chances = near.compared(share, SETTINGS), near.found_same(share, SETTINGS)
        row = f"| {share:.2f} | {chances[0]:.4f} | {chances[1]:.4f} |"
        assert row in table, row


def test_found_same_by_another_way() -> None:
    """Simulated slots: the sum over distributions is right."""
    rng = np.random.default_rng(3)
    rows = SETTINGS.permutations // SETTINGS.bands
    for share in (0.6, 0.7, 0.8):
        agree = rng.random((20_000, SETTINGS.permutations)) < share
        band = agree.reshape(len(agree), SETTINGS.bands, rows).all(2).any(1)
        sketched = agree | (rng.random(agree.shape) < 1 / 16)
        told = (sketched.mean(1) - 1 / 16) * 16 / 15
        simulated = (band & (told >= SETTINGS.threshold - 1e-12)).mean()
        assert abs(simulated - near.found_same(share, SETTINGS)) < 0.015
        assert abs(band.mean() - near.compared(share, SETTINGS)) < 0.015


# ------------------------------------------------------------------ clusters


def test_the_smallest_id_of_each_cluster_stays() -> None:
    rng = random.Random(1)
    one, two = poem(rng), prose(rng)
    texts = [edited(two, rng, 3), edited(one, rng, 3), one, two, edited(one, rng, 3), poem(rng)]
    ids = [50, 7 << 32, 9, 60, 3, 1]
    assert dropped(texts, ids) == [9, 60, 7 << 32]


def test_a_chain_is_one_cluster() -> None:
    edges = [np.array([[5, 9], [2, 5]]), np.array([[9, 11], [20, 21]]), np.zeros((0, 2), np.int64)]
    assert near.redundant(edges).tolist() == [5, 9, 11, 21]
    assert near.redundant([]).tolist() == []


def test_different_documents_stay_apart() -> None:
    rng = random.Random(2)
    texts = [poem(rng, 60) for _ in range(300)] + [prose(rng, 60) for _ in range(300)]
    assert dropped(texts) == []
    assert dropped(["", " ", "。", "!!"]) == []
    assert dropped(["短 句", "短句", "另一", "短，句"]) == [1, 3]


def test_a_bucket_of_several_clusters_is_taken_apart() -> None:
    rng = random.Random(3)
    texts = [poem(rng) for _ in range(5)]
    texts += [edited(text, rng, 1) for text in texts]
    table = near.bands(texts, np.arange(10, dtype=np.int64), SETTINGS)
    rows = table.group_by("document").aggregate([("sketch", "min")]).sort_by("document")
    bucket = rows.rename_columns(["document", "sketch"]).append_column(
        "key", pa.array([7] * 10, pa.uint64())
    )
    assert near.pairs(bucket, SETTINGS.threshold).tolist() == [[n, n + 5] for n in range(5)]


@pytest.mark.parametrize("cut", [1, 3, 17])
def test_what_is_found_does_not_depend_on_files_and_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    rng = random.Random(4)
    texts = [poem(rng, 80) for _ in range(60)]
    texts += [edited(rng.choice(texts), rng, 2) for _ in range(40)]
    expected = dropped(texts)
    assert 30 < len(expected) <= 40
    monkeypatch.setattr(ranges, "ROW_GROUP", 100)
    scratch = Scratch(Store(str(tmp_path)).stage("corpus", "demo"))
    for number in range(cut):
        part = pa.table(
            {"document": np.arange(number, 100, cut), "text": pa.array(texts[number::cut])}
        )
        near.leave(scratch, number, part, SETTINGS)
    spans = ranges.cut(100 * SETTINGS.bands, 1 + 1600 // cut)
    assert len(spans) == cut and spans[0][0] == 0 and spans[-1][1] == 2**64 - 1
    names = [near._name(part) for part in reversed(range(cut))]
    tables = [ranges.read(scratch, names, span) for span in spans]
    assert sum(table.num_rows for table in tables) == 100 * SETTINGS.bands
    found = [near.pairs(table, SETTINGS.threshold) for table in tables]
    assert near.redundant(reversed(found)).tolist() == expected


def test_scratch_files_are_the_same_twice(tmp_path: Path) -> None:
    rng = random.Random(5)
    texts = [poem(rng) for _ in range(20)]
    part = pa.table({"document": np.arange(20), "text": texts})
    scratch = Scratch(Store(str(tmp_path)).stage("corpus", "demo"))
    (one,), (other,) = (near.leave(scratch, 7, part, SETTINGS) for _ in range(2))
    assert one == other
    assert near.leave(scratch, 7, part, DedupSection()) == []


def test_near_pairs_of_a_crowd_are_those_of_plain_python() -> None:
    rng = random.Random(6)
    texts = [poem(rng, 120) for _ in range(40)]
    texts += [edited(texts[n], rng, 1) for n in range(40)]
    sets = [shingled(text) for text in texts]
    same = {
        (a, b)
        for a, b in combinations(range(80), 2)
        if len(sets[a] & sets[b]) / len(sets[a] | sets[b]) > 0.85
    }
    assert dropped(texts) == sorted(b for _, b in same)


def test_bands_must_divide_the_signature() -> None:
    with pytest.raises(ConfigError, match="bands 15: take 120 permutations"):
        loading.load("gpt-demo", ["data.dedup.bands=15"])
