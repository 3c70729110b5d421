"""The page about a corpus: complete, safe, the same each time."""

from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.data import corpus_report
from pipelines.data.corpus_report import Sample
from tests import fakes, observed_data

REPORT = {
    "counts": {
        "files": 3,
        "file_bytes": 12_000,
        "documents": 30,
        "bytes": 9_000,
        "tokens": 2_500,
        "dropped": {"duplicate": 10, "gopher_quality.min_words": 2},
        "quarantined": {"not UTF-8": 1},
        "ignored": {".png": 4},
        "personal": {"email": 17},
        "scripts": {
            "Latin": {"documents": 20, "bytes": 6_000, "tokens": 1_500},
            "Han": {"documents": 10, "bytes": 3_000, "tokens": 1_000},
        },
        "languages": {
            "de": {"documents": 12, "bytes": 4_000, "tokens": 1_000},
            "zh": {"documents": 10, "bytes": 3_000, "tokens": 1_000},
            **{f"x{n:02d}": {"documents": 1, "bytes": 100, "tokens": 40} for n in range(30)},
        },
    },
    "facts": {
        "bytes_per_token": 3.6,
        "vocab_size": 512,
        "by_script": {"Han": {"tokens_per_word": 1.25}},
        "by_language": {"de": {"tokens_per_word": 2.75}},
    },
    "splits": {
        "train": {"documents": 28, "bytes": 8_000, "rows": 40, "padding_share": 0.012},
        "heldout": {"documents": 2, "bytes": 1_000, "rows": 5},
    },
    "sources": {"docs/<诗>": {"files": 3, "bytes": 12_000}, "train.input": "stream"},
}


class Text(HTMLParser):
    """What a reader sees, and the tags; fails where a tag is left open."""

    VOID = {"meta", "br"}

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.words = ""
        self.feed(page.decode())
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += f"{data}|"


def page(*samples: Sample) -> bytes:
    bins = corpus_report.length_bins(pa.table({"bytes": [1, 5, 6, 900, 70_000]}))
    return corpus_report.page("corpus/诗@1", REPORT, bins, samples)


def test_everything_that_is_known_is_said() -> None:
    text = Text(page(Sample("诗/1.txt", "床前\r明月光", "床前\n明月光")))
    for piece in (
        "corpus/诗@1",
        "docs/<诗>",
        "gopher_quality.min_words",
        "not UTF-8",
        ".png",
        "email|17",
        "23.8%",  # 10 copies of 42 documents
        "Han|10|3.0 kB|3.00|1.25",
        "Languages|Told from the start",
        "de|12|4.0 kB|4.00|2.75",
        "zh|10|3.0 kB|3.00|",
        "7 others|7|700 B|2.50|",
        "1.2%",
        "床前\N{SYMBOL FOR CARRIAGE RETURN}明月光",
    ):
        assert piece in text.words, piece


def test_what_documents_say_is_never_markup() -> None:
    trick = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>"
    text = Text(page(Sample(trick, trick, trick)))
    assert not {"script", "img", "a", "link", "iframe"} & text.tags
    assert text.words.count(trick) == 3


def test_documents_that_would_show_personal_data_are_shown_after_cleaning_only() -> None:
    text = Text(page(Sample("a", None, "write to [EMAIL_1]")))
    assert "[EMAIL_1]" in text.words and "personal data would have been seen" in text.words
    assert "its type is shown" in text.words


def test_bins_double_and_leave_no_gap() -> None:
    assert corpus_report.length_bins(pa.table({"bytes": [1, 5, 6, 40]})) == [
        (1.0, 1),
        (2.0, 0),
        (4.0, 2),
        (8.0, 0),
        (16.0, 0),
        (32.0, 1),
    ]
    assert corpus_report.length_bins(pa.table({"bytes": pa.array([], pa.int64())})) == []


def test_documents_that_cleaning_changed_are_shown_first() -> None:
    table = pa.table(
        {
            "path": ["a", "b", "c", "d"],
            "row": pa.array([None, 7, None, None], pa.int64()),
            "text": ["same", "clean", "x", "hidden"],
            "before": pa.array(["same", "cl\x00ean", "x", None]),
        }
    )
    assert [s.place for s in corpus_report.samples(table)] == ["b:7", "a", "c"]
    nothing = table.set_column(3, "before", pa.array([None] * 4, pa.string()))
    assert [s.before for s in corpus_report.samples(nothing)] == [None] * 4


def test_a_corpus_carries_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for folder, apply in (("one", "auto"), ("two", "auto"), ("three", "never")):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        given = ("data.sources=[docs]", "data.vocab_size=300", f"data.privacy.apply={apply}")
        config = fakes.config("gpt-demo", *given, root="root")
        found.append(observed_data.corpus(config).read_bytes("report.html"))
    assert found[0] == found[1]
    assert all(one.count(b'class="pair"') == corpus_report.SAMPLES for one in found)
    words = Text(found[0]).words
    assert "定日镜" in words and "|Scripts|" in words and "|Han|" in words and "|zh|" in words


TALKS = {
    "en": "The mirror follows the sun all day and throws its light at one point. Mail {} then.\n",
    "de": "Der Spiegel folgt den ganzen Tag der Sonne und wirft ihr Licht. Dann an {} schreiben.\n",
    "zh": "定日镜整天跟随太阳转动，把阳光反射到高塔顶端的同一个点上。请发邮件到{}联系。\n",
}


@pytest.mark.parametrize("apply", ["auto", "never"])
def test_ten_documents_are_shown_before_and_after_and_no_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apply: str
) -> None:
    monkeypatch.chdir(tmp_path)
    docs, values = tmp_path / "docs", []
    docs.mkdir()
    for n in range(36):
        name = list(TALKS)[n % 3]
        values += [f"anna.no{n}@example.org", f"page.no{n}@example.org"]
        text = "".join(TALKS[name].format(value) for value in values[-2:]) + f"No. {n}\x07 {name}"
        (docs / f"{n}.txt").write_text(text, encoding="utf-8")
    given = ("data.sources=[docs]", "data.vocab_size=300", f"data.privacy.apply={apply}")
    given += ("data.heldout_fraction=0.2",)
    made, _ = observed_data.prepared(fakes.config("gpt-demo", *given, root="root"))
    report = made.read_bytes("report.html")
    words = Text(report).words
    assert report.count(b'class="pair"') == corpus_report.SAMPLES
    assert words.count("\N{SYMBOL FOR BELL}") == corpus_report.SAMPLES  # as they came
    assert ("[EMAIL]" in words) == ("[EMAIL_1]" in words) == (apply == "auto")
    assert any(value in words for value in values) == (apply == "never")
    found = made.manifest.detail
    assert {name: one["documents"] for name, one in found["counts"]["languages"].items()} == {
        name: 12 for name in TALKS
    }
    assert set(found["facts"]["by_language"]) == set(TALKS)
    assert all(f"|{name}|12|" in words for name in TALKS)
