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
    },
    "facts": {
        "bytes_per_token": 3.6,
        "vocab_size": 512,
        "by_script": {"Han": {"tokens_per_word": 1.25}},
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
        "1.2%",
        "床前\N{SYMBOL FOR CARRIAGE RETURN}明月光",
    ):
        assert piece in text.words, piece


def test_what_documents_say_is_never_markup() -> None:
    trick = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>"
    text = Text(page(Sample(trick, trick, trick)))
    assert not {"script", "img", "a", "link", "iframe"} & text.tags
    assert text.words.count(trick) == 3


def test_documents_that_may_hold_personal_data_are_shown_after_cleaning_only() -> None:
    text = Text(page(Sample("a", None, "write to [EMAIL_1]")))
    assert "[EMAIL_1]" in text.words and "personal data was to be removed" in text.words


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
    # As it was, a document is shown only if nothing was to be taken out of it.
    assert b'class="pair"' not in found[0] and b'class="pair"' in found[2]
    words = Text(found[0]).words
    assert "定日镜" in words and "Scripts and tokens" in words and "Han" in words
