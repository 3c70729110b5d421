"""What documents are written in: one by one, side by side, and as a column of the index."""

import random
from pathlib import Path

import pytest

from cluster.config import TextData
from pipelines.data import documents, language, sources
from tests.prose import CHINESE, ENGLISH

GERMAN = "Der Spiegel folgt der Sonne durch den Tag und wirft ihr Licht auf einen Punkt des Turms. "
FRENCH = "Le miroir suit le soleil toute la journée et jette sa lumière sur un point de la tour. "
TEXTS = {
    "en": ENGLISH,
    "zh": CHINESE,
    "de": GERMAN * 3,
    "fr": FRENCH,
    "ja": "これは日本語で書かれた短い文章です。鏡は一日中太陽を追いかけます。",
    "ru": "Зеркало весь день следует за солнцем и бросает его свет в одну точку.",
}


def test_texts_of_one_script_are_told_apart() -> None:
    assert language.languages(list(TEXTS.values())) == list(TEXTS)
    assert language.languages([text[:60] for text in TEXTS.values()]) == list(TEXTS)


@pytest.mark.parametrize(
    "text", ["", "12 %", "a b", "\ud800", "第1", "Anna Smith, Bob Müller, Chen Wang"]
)
def test_where_nothing_tells_it_is_undetermined(text: str) -> None:
    assert language.languages([text]) == ["und"]


def test_side_by_side_is_the_same_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own way is the measure, for texts of any length in any company."""
    draw = random.Random(0)
    whole = list(TEXTS.values())
    texts = [draw.choice(whole)[draw.randint(0, 40) :][: draw.randint(0, 500)] for _ in range(300)]
    texts += ["GROSSE BUCHSTABEN SIND AUCH DEUTSCH UND WERDEN GELESEN", "e\u0301te\u0301 " * 9]
    found = language.languages(texts)
    for text, name in zip(texts, found, strict=True):
        alone, confidence = language.identify(text)
        if abs(confidence - language.MIN_CONFIDENCE) > 1e-3:
            assert name == (alone if confidence >= language.MIN_CONFIDENCE else "und")
    monkeypatch.setattr(language, "_BESIDE", 7)
    assert language.languages(texts) == found
    assert [language.languages([text])[0] for text in texts] == found


def test_documents_know_their_language(tmp_path: Path) -> None:
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.md").write_text(text, encoding="utf-8")
    (tmp_path / "a.py").write_text("def f(x):\n    return x  # the mirror follows the sun\n" * 9)
    data = TextData(sources=(str(tmp_path),), min_characters=1)
    found = sources.listing(data.sources, "text", documents.readings(data))
    table = documents.read(found.files, data, 0).table
    told = {Path(row["path"]).name: row["language"] for row in table.to_pylist()}
    assert told == {"a.py": "code", **{f"{name}.md": name for name in TEXTS}}
    assert table.select(documents.INDEX).column("language").null_count == 0
