"""Lines that many documents hold stay in the first of them, whatever the order and the ranges."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.config import DedupSection, TextData
from cluster.storage import Store
from pipelines.data import documents, duplicates, duplicates_near, ranges
from pipelines.data import duplicates_lines as lines
from pipelines.data.corpus import PART_BITS, PLACE_BITS
from pipelines.data.partitions import Cleaned
from pipelines.data.scratch import Scratch

MENU = "首页 | 新闻 | 体育 | 财经 | 联系我们 | 版权声明 | 隐私政策 | 站点地图"
LICENCE = "Licensed under the Apache License, Version 2.0; see the file."
SETTINGS = DedupSection(lines=3, near=True)


def body(number: int) -> str:
    return f"第{number}篇的正文只在这里出现，不在任何别的文件里出现，一共也就这么一行而已。"


def page(number: int) -> str:
    rows = [MENU, body(number), "return None"]
    return "\n".join(rows + ([LICENCE] if number % 3 == 0 else []))


def expected(number: int, count: int) -> str:
    """Plainly: the first document keeps what more than three hold."""
    menu = [MENU] if number == 0 or count <= 3 else []
    tail = [LICENCE] if number % 3 == 0 and (number == 0 or count <= 9) else []
    return "\n".join([*menu, body(number), "return None", *tail])


def table(numbers: list[int], part: int) -> pa.Table:
    texts = [page(number) for number in numbers]
    rows = [
        {
            "document": part << PLACE_BITS | place,
            "path": f"{number}.txt",
            "row": None,
            "start": None,
            "end": None,
            "digest": duplicates.digest(text.encode()),
            "bytes": len(text.encode()),
            "label": None,
            "text": text,
        }
        for place, (number, text) in enumerate(zip(numbers, texts, strict=True))
    ]
    return pa.Table.from_pylist(rows, documents.schema("text"))


def left_by_reading(scratch: Scratch, count: int, parts: int) -> list[Cleaned]:
    """Each partition is one part."""
    cleaned = []
    size = -(-count // parts)
    for number in range(parts):
        mine = list(range(number * size, min(count, (number + 1) * size)))
        part = number << PART_BITS
        found = table(mine, part)
        scratch.write_table(part, found, lines.RAW)
        lines.leave(scratch, part, found, SETTINGS)
        index = found.select(documents.INDEX)
        cleaned.append(
            Cleaned(
                partition=number,
                source="s",
                index=index,
                drops=Counter(x=1),
                reasons=Counter(),
                with_rejects=(),
                files=(),
                sample=(),
                lines={},
                personal=Counter(),
                contaminated=Counter(),
                overlaps=(),
            )
        )
    return cleaned


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks in this process, in another order than they were given."""

    def over(work: list[object], task: object, tasks: int) -> list[object]:
        shuffled = random.Random(1).sample(work, len(work))
        return [task(piece) for piece in shuffled]  # type: ignore[operator]

    monkeypatch.setattr(lines.streaming, "over_partitions", over)


def thinned(root: Path, count: int, parts: int) -> tuple[dict[str, str], list[Cleaned], int]:
    scratch = Scratch(Store(str(root)).stage("corpus", "demo"))
    data = TextData(sources=("s",), dedup=SETTINGS)
    read = left_by_reading(scratch, count, parts)
    cleaned, shortened = lines.thin(read, data, scratch, 0)
    texts = {}
    for one in cleaned:
        part = one.partition << PART_BITS
        found = scratch.read_table(part)
        assert found.select(documents.INDEX).equals(one.index)
        for row in found.to_pylist():
            assert row["digest"] == duplicates.digest(row["text"].encode())
            assert row["bytes"] == len(row["text"].encode())
            texts[row["path"]] = row["text"]
        bands = ranges.read(scratch, [duplicates_near._name(part)], (0, 2**64 - 1))
        assert bands.num_rows == found.num_rows * SETTINGS.bands
    return texts, cleaned, shortened


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(("parts", "range_rows"), [(1, 10**6), (4, 10**6), (4, 9)])
def test_a_frequent_line_stays_where_it_came_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int, range_rows: int
) -> None:
    monkeypatch.setattr(lines, "RANGE_ROWS", range_rows)
    texts, cleaned, shortened = thinned(tmp_path, 20, parts)
    assert texts == {f"{n}.txt": expected(n, 20) for n in range(20)}
    assert shortened == 19 and [part.drops for part in cleaned] == [{"x": 1}] * parts


@pytest.mark.usefixtures("at_once")
def test_lines_of_few_documents_stay(tmp_path: Path) -> None:
    texts, _, shortened = thinned(tmp_path, 3, 2)
    assert texts == {f"{n}.txt": page(n) for n in range(3)} and shortened == 0


@pytest.mark.usefixtures("at_once")
def test_a_document_of_nothing_else_goes_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "body", lambda n: "")
    texts, cleaned, shortened = thinned(tmp_path, 10, 2)
    assert list(texts) == ["0.txt"] and shortened == 9
    assert sum((part.drops for part in cleaned), Counter()) == {"x": 2, "too_short": 9}
    sample = {one.file for part in cleaned for one in part.sample}
    assert sample == {f"{number}.txt" for number in range(1, 10)}


@pytest.mark.usefixtures("at_once")
def test_what_was_done_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, cleaned, shortened = thinned(tmp_path, 20, 4)
    scratch = Scratch(Store(str(tmp_path)).stage("corpus", "again"))
    data = TextData(sources=("s",), dedup=SETTINGS)
    read = left_by_reading(scratch, 20, 4)
    done, _ = lines.thin(read, data, scratch, 0)
    monkeypatch.setattr(lines, "thin_text", None)
    again, same = lines.thin(read, data, scratch, 0)
    assert again == done and same == shortened


def test_short_lines_and_paragraphs() -> None:
    assert lines.hashes("return None\n}\n", SETTINGS) == [0, 0, 0]
    paragraphs = DedupSection(lines=1, unit="paragraph", unit_characters=10)
    text = "第一段有两行，\n这是第二行。\n\n第二段在这里，也不短。"
    one, two = lines.hashes(text, paragraphs)
    assert one and two and one != two
    assert lines.thin_text(text, 9, {one: 4, two: 9}, paragraphs) == "第二段在这里，也不短。"
    assert lines.thin_text(text, 4, {one: 4, two: 9}, paragraphs) == text.split("\n\n")[0]
    assert lines.thin_text(text, 4, {}, paragraphs) is text


def test_frequent_counts_documents_not_lines() -> None:
    keys = np.array([7, 7, 7, 9, 9], np.uint64)
    table = pa.table({"key": keys, "document": [30, 10, 20, 5, 6]})
    assert lines.frequent(table, 2).to_pylist() == [{"key": 7, "document": 10}]
    assert lines.frequent(table, 1).num_rows == 2
