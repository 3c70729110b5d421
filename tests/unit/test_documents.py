"""A partition becomes parts that fit into memory, with ids and places that follow from it alone."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import loading
from cluster.config import TextData
from pipelines.data import documents, sources
from pipelines.data.corpus import PART_BITS, PLACE_BITS, part_name
from pipelines.data.documents import Documents


def settings(path: Path, **more: Any) -> TextData:
    given: dict[str, Any] = {"sources": (str(path),), "min_characters": 1, "partition_bytes": 1000}
    return TextData(**{**given, **more})


def parts(path: Path, **more: Any) -> list[Documents]:
    data = settings(path, **more)
    found = sources.listing(data.sources, "text", documents.readings(data))
    return list(documents.parts(found.files, data, 5))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A compressed file, which cannot be cut, of 60 documents of about 100 bytes."""
    path = tmp_path / "a.jsonl.gz"
    rows = [json.dumps({"text": f"第{n}行" * 8, "n": n}, ensure_ascii=False) for n in range(60)]
    rows[30] = "{broken"
    path.write_bytes(gzip.compress("\n".join(rows).encode()))
    return path


def test_a_file_that_cannot_be_cut_becomes_parts(packed: Path) -> None:
    found = parts(packed)
    assert len(found) == 4 and all(900 < _size(part) < 1200 for part in found[:-1])
    ids = [i for part in found for i in part.table.column("document").to_pylist()]
    assert ids == sorted(ids) and len(set(ids)) == 59
    assert {i >> (PART_BITS + PLACE_BITS) for i in ids} == {5}
    numbers = documents.part_of(np.array(ids)).tolist()
    assert list(Counter(numbers)) == [5 << PART_BITS | n for n in range(len(found))]
    rows = [row for part in found for row in part.table.column("row").to_pylist()]
    assert rows == [*range(1, 31), *range(32, 61)]
    together = documents.together(part.leavings for part in found)
    assert [reject.row for reject in together.rejects] == [31]


def test_the_place_of_a_document_leads_to_its_record(packed: Path) -> None:
    raw = gzip.decompress(packed.read_bytes())
    for part in parts(packed):
        for row in part.table.to_pylist():
            assert json.loads(raw[row["start"] : row["end"]])["text"] == row["text"]


def test_more_than_can_be_numbered_is_quarantined(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PART_BITS", 1)
    found = parts(packed)
    assert len(found) == 2
    whole = [r for part in found for r in part.leavings.rejects if r.row is None]
    assert [r.reason.split(":")[0] for r in whole] == ["over 2 times data.partition_bytes 1000"]


def test_a_file_of_nothing_but_damage_does_not_fill_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_REJECTS_LIMIT", 50)
    path = tmp_path / "a.jsonl"
    path.write_text("{broken\n" * 180)
    found = parts(path, partition_bytes=10**6)
    assert [len(part.leavings.rejects) for part in found] == [50, 50, 50, 30]


def test_rules_see_the_other_cells_of_a_row(packed: Path) -> None:
    step = {"columns": {"bounds": {"n": (0, 9)}, "required": ("n",)}}
    found = parts(packed, cleaning=(step, "compose"), partition_bytes=10**6)
    assert [part.table.num_rows for part in found] == [10]
    assert found[0].leavings.drops == {"columns.bounds": 49}


def test_tables_with_columns_of_different_names_become_one_schema(tmp_path: Path) -> None:
    """As one recipe says it: the column of each source, and of all others."""
    said = {
        "a": "镜子跟随太阳",
        "b": "der Spiegel folgt",
        "c": "the mirror follows",
        "d": "le miroir",
    }
    web, chats, rest = (tmp_path / name for name in ("web.parquet", "chats.jsonl", "rest.csv"))
    pq.write_table(pa.table({"id": [1], "text": ["not this"], "content": [said["a"]]}), web)
    chats.write_text(json.dumps({"body": said["b"], "text": "not this"}) + "\n" + '{"text": "x"}\n')
    rest.write_text(f"id,text\n1,{said['c']}\n2,{said['d']}\n")
    given = loading.load(
        "gpt-demo",
        [
            f"data.sources=[{web}, {chats}, {rest}]",
            f"data.columns={{'{web}': {{text: content}}, '{chats}': {{text: body}}}}",
            "data.min_characters=1",
        ],
    )
    assert isinstance(given.data, TextData)
    found = sources.listing(given.data.sources, "text", documents.readings(given.data))
    read = documents.read(found.files, given.data, 0)
    assert read.table.schema == documents.schema("text")
    table = read.table.select(["path", "row", "text"]).to_pylist()
    assert {(Path(one["path"]).name, one["row"], one["text"]) for one in table} == {
        ("web.parquet", 1, said["a"]),
        ("chats.jsonl", 1, said["b"]),
        ("rest.csv", 2, said["c"]),
        ("rest.csv", 3, said["d"]),
    }
    (reject,) = read.leavings.rejects
    assert reject.row == 2 and "body" in reject.reason


@pytest.mark.parametrize(
    ("number", "name"),
    [(0, "part-00000.parquet"), (7 << 12, "part-00007.parquet"), (7 << 12 | 3, "part-00007-0003")],
)
def test_parts_have_names_of_their_own(number: int, name: str) -> None:
    assert part_name(number).startswith(name.removesuffix(".parquet"))
    assert part_name(number).endswith(".parquet")


def _size(part: Documents) -> int:
    return sum(part.table.column("bytes").to_pylist())
