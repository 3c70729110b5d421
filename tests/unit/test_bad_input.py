"""Whatever is wrong with a file is quarantined with file, row and reason: no crash, no silence."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import resource
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import SourceError
from pipelines import prepare
from pipelines.data import sources
from pipelines.data.sources import RawText, Reading, Reject
from tests import fakes, piles

SECRET = "机密secret"
"""Stands in bad rows: no reason may show it."""


def parquet(table: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(table), sink, **options)
    return sink.getvalue()


def arrow(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def tagged(name: str) -> bytes:
    """A column of an extension type."""
    field = pa.field("other", pa.binary(), metadata={"ARROW:extension:name": name})
    schema = pa.schema([pa.field("text", pa.string()), field])
    return arrow(pa.table([["文"], [b"cos\nsystem\n(S'true'\ntR."]], schema=schema))


def nested_tag() -> bytes:
    inner = pa.field("x", pa.binary(), metadata={"ARROW:extension:name": "ray.data.arrow_pickled"})
    schema = pa.schema(
        [pa.field("text", pa.string()), pa.field("deep", pa.list_(pa.struct([inner])))]
    )
    return arrow(pa.table([["文"], [[{"x": b"p"}]]], schema=schema))


def not_utf8_in_parquet() -> bytes:
    broken = pa.array([b"ok", f"{SECRET}".encode("gb18030")]).cast(pa.binary())
    view = pa.StringArray.from_buffers(2, *broken.buffers()[1:])
    return parquet({"text": view})


def damaged_page() -> bytes:
    raw = bytearray(parquet({"text": [f"{n}{SECRET}" * 40 for n in range(200)]}))
    raw[60:400] = bytes(340)
    return bytes(raw)


LINE = json.dumps({"text": "好的 a good line"}, ensure_ascii=False).encode() + b"\n"


NOISE = os.urandom(400_000).replace(b"\n", b"-")


@dataclass(frozen=True)
class Bad:
    name: str
    content: Callable[[], bytes]
    reason: str
    rows: tuple[int | None, ...] = (None,)
    """Where the rejects are."""
    good: int = 0
    """Documents that are read all the same."""


def bad(name: str, content: bytes | Callable[[], bytes], reason: str, *rest: Any) -> Bad:
    return Bad(name, content if callable(content) else lambda: content, reason, *rest)


CASES = (
    # text
    bad("a.txt", f"naïve {SECRET}".encode("gb18030"), "not UTF-8"),
    bad("a.txt", SECRET.encode("utf-16"), "UTF-16"),
    bad("a.txt", SECRET.encode("utf-16-be"), "NUL"),
    bad("a.txt", b"ab\0cd", "NUL"),
    bad("a.txt", b"x" * 1001, "over 1000 bytes"),
    # packed
    bad("a.txt.gz", b"not gzip at all", "damaged gzip"),
    bad("a.txt.zst", b"not zstandard", "damaged zstd"),
    bad("a.txt.bz2", b"not bzip2 at all", "damaged bzip2"),
    bad("a.txt.xz", b"not xz at all", "damaged xz"),
    *(
        bad(
            f"a.jsonl{ending}",
            lambda pack=pack: pack(LINE + NOISE + b"\n" + LINE)[:-9],
            "damaged",
            (2, None),
            None,
        )
        for ending, pack in piles.PACKED.items()
        if ending
    ),
    bad("a.txt.gz", lambda: gzip.compress(b"\n" * 10_000_000), "over 1000 bytes"),
    bad("a.jsonl.gz", lambda: gzip.compress(LINE + b" " * 80_000_000), "bomb", (2, None), 1),
    # Four members of 20 MB: bz2 takes seconds over one of 80.
    bad(
        "a.jsonl.bz2",
        lambda: bz2.compress(LINE) + 4 * bz2.compress(b" " * 20_000_000),
        "bomb",
        (2, None),
        1,
    ),
    bad("a.txt.zst", lambda: piles.zstandard(b"\n" * 10_000_000), "over 1000 bytes"),
    bad("a.jsonl.zst", lambda: piles.zstandard(LINE + b" " * 80_000_000), "bomb", (2, None), 1),
    bad("a.csv.xz", lambda: lzma.compress(b"text\n" + b"z" * 80_000_000), "bomb", (None,), 0),
    bad(
        "a.txt.xz", lambda: lzma.compress(b"x", filters=[{"id": 0x21, "dict_size": 1 << 30}]), "xz"
    ),
    # JSON lines
    bad("a.jsonl", b"", "empty: no line"),
    bad("a.jsonl", b"\xef\xbb\xbf", "", (1,)),
    bad("a.ndjson", b"\n \r\n\n", "empty: no line"),
    bad("a.jsonl.gz", lambda: gzip.compress(b""), "empty: no line"),
    bad("a.jsonl.zst", b"", "empty: no line"),
    bad("a.jsonl", LINE + b"{broken\n" + LINE, "not JSON", (2,), 2),
    bad("a.jsonl", LINE + b"[1, 2]\n\n5\nnull\n", "no field `text`", (2, 4, 5), 1),
    bad("a.jsonl", b'{"text": 5}\n{"text": null}\n{}\n', "no field `text`", (1, 2, 3)),
    bad("a.jsonl", b'{"text": "\xff"}\n' + LINE, "not UTF-8", (1,), 1),
    bad("a.jsonl", b'{"text": "a\0b"}\n', "NUL", (1,)),
    bad("a.jsonl", b'{"text": "\\ud800"}\n', "", (1,)),
    bad("a.jsonl", b'{"text": NaN}\n', "not JSON", (1,)),
    bad("a.jsonl", b'"' + b"y" * 5000 + b'"\n' + LINE, "over 1000 bytes", (1,), 1),
    bad("a.jsonl", SECRET.encode("utf-16"), "UTF-16"),
    # CSV
    bad("a.csv", b"", "not even a header"),
    bad("a.csv", b"id,text\n", "empty: not a single row"),
    bad("a.csv", b"id,text\n\n\n", "empty: not a single row"),
    bad("a.csv", b"text,id\nb\n", "cells below a header", (2,)),
    bad("a.csv", "id,标题\n1,2\n".encode(), "no column `text` among the 2.*data.columns"),
    bad("a.tsv", f"{SECRET}\t1\n文\t2\n".encode(), "no column `text` among the 2"),
    bad("a.csv", "text,id\n好,1\nb\nc,2,3\n好,4\n".encode(), "cells below a header", (3, 4), 2),
    bad("a.csv", b"text,id\n,1\n" + "文,2\n".encode(), "nothing in column", (2,), 1),
    bad("a.csv", b"text,id\n\xff\xff,1\n" + "文,2\n".encode(), "not UTF-8", (2,), 1),
    bad("a.csv", b"text,id\na\0b,1\n" + "文,2\n".encode(), "NUL", (2,), 1),
    bad("a.csv", b'text,id\n"never closed ' + b"a,1\n" * 200, "never closed", (2,)),
    bad("a.csv", b'text,id\n"never closed ' + b"a,1\n" * 600, "never closed", (2,), None),
    bad("a.csv", b"text,id\n" + b"z" * 4000 + "\n文,2\n".encode(), "over 1000 bytes", (2,), 1),
    bad("a.csv", "text\n文\n".encode("utf-16"), "UTF-16"),
    bad("a.csv", b"\xff\xfa,text\n", "not UTF-8"),
    # Parquet, Arrow
    bad("a.parquet", b"", "damaged"),
    bad("a.parquet", lambda: parquet({"text": pa.array([], pa.string())}), "empty: not a single"),
    bad("a.parquet", b"PAR1 this is no parquet PAR1", "damaged"),
    bad("a.parquet", lambda: parquet({"text": ["文"] * 99})[:-20], "damaged"),
    bad("a.parquet", damaged_page, "damaged", (None,), None),
    bad("a.parquet", lambda: parquet({"body": ["文"]}), "no column `text`.*body"),
    bad("a.parquet", lambda: parquet({"text": [1, 2]}), "holds int64, not text"),
    bad("a.parquet", lambda: parquet({"text": [["a"]]}), "holds list.*, not text"),
    bad("a.parquet", lambda: parquet({"text": ["文", None, "x" * 1001]}), "", (2, 3), 1),
    bad("a.parquet", not_utf8_in_parquet, "not UTF-8", (2,), 1),
    bad(
        "a.parquet",
        lambda: parquet({"text": ["文" * 300] * 200_000}),
        "bomb",
        (None,),
        None,
    ),
    bad("a.arrow", b"", "damaged"),
    bad("a.arrow", lambda: arrow(pa.table({"text": pa.array([], pa.string())})), "empty: not a"),
    bad("a.arrow", b"ARROW1 no arrow at all", "damaged"),
    bad("a.arrow", lambda: arrow(pa.table({"text": ["文" * 200] * 9}))[:-300], "damaged"),
    bad("a.arrow", lambda: tagged("arrow.py_extension_type"), "would run code: refused"),
    bad("a.arrow", lambda: tagged("ray.data.arrow_pickled_object"), "would run code: refused"),
    bad("a.arrow", nested_tag, "would run code: refused"),
    # what is never opened
    bad("a.pkl", b"cos\nsystem\n(S'true'\ntR.", "a pickle: never opened"),
    bad("a.tar.gz", lambda: gzip.compress(b"../../etc/passwd"), "an archive"),
    bad("a.zip", b"PK\3\4", "an archive"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}: {case.reason[:24]}")
def test_bad_input_is_quarantined_with_its_place_and_no_content(case: Bad, tmp_path: Path) -> None:
    (tmp_path / case.name).write_bytes(case.content())
    (tmp_path / "zz.md").write_text("# 好的\n\na good file\n", encoding="utf-8")
    items = piles.read(tmp_path)
    rejects = piles.rejects(items)
    assert [reject.row for reject in rejects] == list(case.rows)
    for reject in rejects:
        assert reject.file == f"{tmp_path}/{case.name}"
        assert SECRET not in reject.reason and len(reject.reason) < 200
    assert any(re.search(case.reason, r.reason) for r in rejects)
    if case.good is not None:
        assert len(piles.texts(items)) == case.good + 1


def test_files_of_one_folder_may_have_different_schemas(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["一"], "id": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": ["x"], "text": ["二"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"content": ["三"]}), tmp_path / "c.parquet")
    items = piles.read(tmp_path)
    assert [text for _, text in piles.texts(items)] == ["一", "二"]
    assert [Path(r.file).name for r in piles.rejects(items)] == ["c.parquet"]


def test_nothing_is_unpickled_when_ray_knows_the_type(tmp_path: Path) -> None:
    import numpy as np
    import ray.data  # noqa: F401 (registers its extension types)
    from ray.data._internal.tensor_extensions.arrow import ArrowTensorArray

    column = ArrowTensorArray.from_numpy(np.zeros((2, 2)))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    (reject,) = piles.rejects(piles.read(tmp_path))
    assert "extension type" in reject.reason


@pytest.mark.parametrize(
    ("name", "size"), [("a.jsonl", 10**9), ("a.csv", 10**9), ("a.txt", 2 * 10**8)]
)
def test_a_line_of_a_gigabyte_does_not_come_into_memory(
    tmp_path: Path, name: str, size: int
) -> None:
    path = tmp_path / name
    with path.open("wb") as stream:
        stream.write(b"text\n" if name == "a.csv" else LINE)
        stream.truncate(size)
        stream.seek(0, os.SEEK_END)
        stream.write(b"\n" + (LINE if name == "a.jsonl" else "文\n".encode()))
    tracemalloc.start()
    items = piles.read(path, 1 << 16, Reading(lines=True))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [reject.row for reject in piles.rejects(items)] == [2]
    assert len(piles.texts(items)) == (1 if name == "a.csv" else 2)
    assert peak < 20_000_000


def test_deeply_nested_line_is_no_crash(tmp_path: Path) -> None:
    deep = b'{"a":' * 150_000 + b"1" + b"}" * 150_000
    (tmp_path / "a.jsonl").write_bytes(
        b"[" * 200_000 + b"]" * 200_000 + b"\n" + deep + b"\n" + LINE
    )
    items = piles.read(tmp_path, max_bytes=2_000_000)
    assert [reject.reason for reject in piles.rejects(items)] == [
        "JSON that is nested too deeply"
    ] * 2
    assert len(piles.texts(items)) == 1


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + piles.CHINESE.encode())
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + LINE)
    assert [text for _, text in piles.texts(piles.read(tmp_path))] == [
        piles.CHINESE,
        "好的 a good line",
    ]


def test_file_that_changes_under_the_reader_is_quarantined(tmp_path: Path) -> None:
    for name in ("a.txt", "a.parquet", "a.jsonl.gz"):
        path = tmp_path / name
        path.write_text("here")
        (listed,) = sources.listing([str(path)], "text").files
        path.write_text("longer by now")
        (changed,) = sources.read_texts(listed, 100)
        assert isinstance(changed, Reject) and "changed after it was listed" in changed.reason
        path.unlink()
        (gone,) = sources.read_texts(listed, 100)
        assert isinstance(gone, Reject) and "vanished" in gone.reason
        os.mkfifo(path)
        (pipe,) = sources.read_texts(listed, 100)
        assert isinstance(pipe, Reject) and "not a regular file" in pipe.reason
        path.unlink()
        path.mkdir()
        (folder,) = sources.read_texts(listed, 100)
        assert isinstance(folder, Reject)
        path.rmdir()


CHANGES: dict[str, Callable[[Path], object]] = {
    "shrinks": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "vanishes from its end": lambda path: os.truncate(path, 0),
    "grows": lambda path: path.write_bytes(path.read_bytes() + LINE),
    "is written again": lambda path: path.write_bytes(path.read_bytes()[::-1]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet", "a.arrow"])
def test_file_that_changes_while_it_is_read_is_told(tmp_path: Path, name: str, change: str) -> None:
    path = tmp_path / name
    rows = [NOISE[n : n + 40].hex() for n in range(0, len(NOISE), 40)]
    table = pa.table({"text": rows})
    records = b"".join(json.dumps({"text": row}).encode() + b"\n" for row in rows)
    path.write_bytes(
        {
            "a.jsonl": lambda: records,
            "a.jsonl.gz": lambda: gzip.compress(records, 1),
            "a.csv": lambda: "\n".join(["text", *rows, ""]).encode(),
            "a.parquet": lambda: parquet(table, row_group_size=1000, use_dictionary=False),
            "a.arrow": lambda: arrow(table),
        }[name]()
    )
    (listed,) = sources.listing([str(path)], "text").files
    reading = sources.read_texts(listed, 1000)
    assert isinstance(next(reading), RawText)
    CHANGES[change](path)
    *_, last = reading
    assert isinstance(last, Reject) and last.row is None
    packed = name in ("a.jsonl.gz", "a.parquet", "a.arrow")
    assert re.search("while it was read" + "|damaged" * packed, last.reason), last.reason


@pytest.mark.parametrize("change", CHANGES)
def test_parts_of_a_file_that_changes_tell_it_too(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE * 20_000)
    (listed,) = sources.listing([str(path)], "text").files
    for span in ((0, listed.size // 2), (listed.size // 2, listed.size)):
        path.write_bytes(LINE * 20_000)
        os.utime(path, ns=(listed.mtime_ns, listed.mtime_ns))
        reading = sources.read_texts(replace(listed, span=span), 1000)
        next(reading)
        CHANGES[change](path)
        *_, last = reading
        assert isinstance(last, Reject) and "while it was read" in last.reason


def test_whole_document_that_changes_while_it_is_read_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("here")
    (listed,) = sources.listing([str(path)], "text").files
    changed = pytest.raises(sources.Unreadable, match="while it was read")
    with changed, sources.open_binary(listed) as stream:
        stream.read()
        path.write_text("longer")


def test_file_that_vanishes_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE * 20_000)
    (listed,) = sources.listing([str(path)], "text").files
    reading = sources.read_texts(listed, 1000)
    next(reading)
    path.unlink()
    assert len(piles.texts(list(reading))) == 19_999


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_without_permission_is_quarantined(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("here")
    path.chmod(0)
    (reject,) = piles.read(tmp_path)
    assert isinstance(reject, Reject) and "Permission" in reject.reason


def test_everything_empty_is_refused_or_dropped_later(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no text files"):
        piles.read(tmp_path)
    for name in ("a.txt", "b.jsonl", "c.txt.gz", "d.xz"):
        (tmp_path / name).write_bytes(b"")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "e.parquet")
    items = piles.read(tmp_path)
    assert {text for _, text in piles.texts(items)} == {""}
    assert {Path(r.file).name: r.reason for r in piles.rejects(items)} == {
        "b.jsonl": "empty: no line with anything on it",
        "e.parquet": "empty: not a single row",
    }


def test_nothing_but_refused_files_is_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    os.mkfifo(tmp_path / "b.txt")
    config = fakes.config("gpt-demo", f"data.sources=[{tmp_path}]")
    told = "no usable text .*1 x an archive: unpack it first.*such as .*give others"
    with pytest.raises(SourceError, match=told):
        prepare.check(config)


def test_memory_of_a_packed_file_is_bounded(tmp_path: Path) -> None:
    """What libraries allocate counts too."""
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(bytes(100_000_000)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (reject,) = piles.read(tmp_path)
    assert isinstance(reject, Reject)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
