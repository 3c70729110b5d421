"""Pieces of evaluation sets in training text are found, whatever stands between the words."""

import csv
import io
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import DecontaminateSection
from cluster.errors import SourceError
from cluster.storage import Store
from pipelines.data import contamination
from pipelines.data.contamination import Evaluations, Overlap
from pipelines.data.scratch import Scratch

QUESTION = "Which mirror follows the sun through the day and throws its light at one point?"
PROBLEM = "已知一面定日镜整天跟随太阳转动，请问它把阳光反射到高塔顶端的哪一个点上最为合适？"
FILLER = "Nothing of interest is said here, and it is said at some length. 这里什么都没有。"


def evaluations(folder: Path, files: dict[str, bytes], n: int = 8) -> Evaluations:
    folder.mkdir(exist_ok=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    settings = DecontaminateSection(sources=(str(folder),), ngram=n)
    return contamination.collect(contamination.listing(settings), settings)


@pytest.fixture
def found(tmp_path: Path) -> Evaluations:
    rows = [{"q": QUESTION, "choices": ["a mirror", PROBLEM]}]
    table = io.BytesIO()
    pq.write_table(pa.table({"题目": [PROBLEM], "n": [1]}), table)
    cells = io.StringIO()
    csv.writer(cells).writerow(["id", QUESTION])
    return evaluations(
        tmp_path / "tests",
        {
            "a.jsonl": "\n".join(map(json.dumps, rows)).encode(),
            "b.parquet": table.getvalue(),
            "c.csv": cells.getvalue().encode(),
            "d.txt": b"too short to find",
        },
    )


def screened(texts: list[str], found: Evaluations, action: str = "drop") -> contamination.Screened:
    columns = {"text": texts, "path": ["集.txt"] * len(texts), "row": list(range(len(texts)))}
    return contamination.screen(pa.table(columns), found, action)


def names(counts: Counter[str]) -> dict[str, int]:
    return {Path(file).name: count for file, count in counts.items()}


@pytest.mark.parametrize("piece", [QUESTION, PROBLEM, QUESTION.upper().replace(" ", "\n\t")])
def test_a_piece_is_found_and_its_place_told(found: Evaluations, piece: str) -> None:
    texts = [FILLER, FILLER + piece + FILLER, FILLER]
    result = screened(texts, found)
    assert result.table.column("row").to_pylist() == [0, 2] and result.dropped == 1
    for overlap in result.overlaps:
        assert (overlap.file, overlap.row) == ("集.txt", 1)
        told = texts[1][overlap.start : overlap.end]
        assert told == piece.rstrip("?？")
    expected = {"a.jsonl": 1, "b.parquet": 1} if piece == PROBLEM else {"a.jsonl": 1, "c.csv": 1}
    assert names(result.documents) == expected


def test_part_of_a_piece_is_enough_and_less_is_not(found: Evaluations) -> None:
    words = QUESTION.split()
    for count, dropped in ((8, 1), (7, 0)):
        assert screened([f"x {' '.join(words[2 : 2 + count])} y"], found).dropped == dropped
    characters = "一面定日镜整天跟随太阳转动请问它把"
    # Sixteen characters, which are about eight words.
    assert screened([f"啊{characters[:16]}吧"], found).dropped == 1
    assert screened([f"啊{characters[:15]}吧"], found).dropped == 0


def test_a_piece_over_two_documents_is_none(found: Evaluations) -> None:
    words = QUESTION.split()
    halves = [" ".join(words[:7]), " ".join(words[7:14])]
    assert screened(halves, found).dropped == 0
    assert screened([" ".join(halves)], found).dropped == 1


def test_reported_documents_stay(found: Evaluations) -> None:
    result = screened([FILLER, QUESTION + " " + FILLER + QUESTION], found, "report")
    assert result.table.num_rows == 2 and result.dropped == 0
    starts = [o.start for o in result.overlaps if o.evaluation.endswith("a.jsonl")]
    assert starts == [0, len(QUESTION) + 1 + len(FILLER)]
    assert names(result.documents) == {"a.jsonl": 1, "c.csv": 1}


def test_short_texts_are_counted_and_told(found: Evaluations) -> None:
    assert names(+found.texts) == {"a.jsonl": 2, "b.parquet": 1, "c.csv": 1}
    assert names(+found.too_short) == {"a.jsonl": 1, "c.csv": 1, "d.txt": 1}
    tree = contamination.report(found, {found.files[0]: 4}, [Overlap("x", 1, 2, 3, "y")])
    assert tree["evaluations"][found.files[0]] == {"texts": 2, "too_short": 1, "documents": 4}
    assert tree["overlaps"][0]["start"] == 2


def test_tasks_open_what_the_driver_left(tmp_path: Path, found: Evaluations) -> None:
    scratch = Scratch(Store(str(tmp_path / "root")).stage("corpus", "demo"))
    contamination.leave(scratch, found)
    again = contamination.opened(scratch)
    texts = [FILLER, PROBLEM, QUESTION]
    assert again.files == found.files
    assert screened(texts, again).overlaps == screened(texts, found).overlaps


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.jsonl", b'{"q": \n'),
        ("a.parquet", b"PAR1 no"),
        ("a.txt", b"\xff\xfe"),
        ("a.json", b"[" * 100_000),
        ("a.jsonl.gz", b"no gzip"),
    ],
)
def test_an_evaluation_set_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, raw: bytes
) -> None:
    with pytest.raises(
        SourceError, match=f"data.decontaminate: .*{name} cannot be read: "
    ) as caught:
        evaluations(tmp_path / "tests", {name: raw})
    assert "\n" not in str(caught.value)
