"""Every format that is read, packed in every way, gives the same documents and their places."""

import csv
import gzip
import http.server
import io
import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs

from cluster.errors import SourceError
from pipelines.data import images, sources
from pipelines.data.images import RawImage
from pipelines.data.sources import Lines, RawText, Reading, Reject, opening
from tests import fakes, piles
from tests.buckets import s3_server

__all__ = ["s3_server"]

TEXTS = [piles.CHINESE, 'quoted "text", with commas;\nand two lines', "第三篇"]


def table() -> pa.Table:
    return pa.table({"id": [1, 2, 3], "content": TEXTS})


def jsonl() -> bytes:
    rows = [{"id": n, "content": text} for n, text in enumerate(TEXTS)]
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def delimited(delimiter: str) -> bytes:
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, delimiter=delimiter)
    writer.writerows([["id", "content"], *enumerate(TEXTS)])
    return b"\xef\xbb\xbf" + sink.getvalue().encode()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(table(), sink, row_group_size=2)
    return sink.getvalue()


def arrow() -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)
    return sink.getvalue()


def feathered() -> bytes:
    sink = io.BytesIO()
    feather.write_feather(table(), sink)
    return sink.getvalue()


FORMS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": jsonl,
    "a.csv": lambda: delimited(","),
    "b.csv": lambda: delimited(";"),
    "a.tsv": lambda: delimited("\t"),
    "a.parquet": parquet,
    "a.arrow": arrow,
    "a.feather": feathered,
}


@pytest.mark.parametrize("packed", piles.PACKED)
@pytest.mark.parametrize("name", FORMS)
def test_a_table_gives_its_column_row_by_row(tmp_path: Path, name: str, packed: str) -> None:
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(piles.PACKED[packed](FORMS[name]()))
    items = piles.read(path, reading=Reading(text="content"))
    found = piles.texts(items)
    assert [text.replace("\r\n", "\n") for _, text in found] == TEXTS
    # The header of a CSV is line 1, and two of its cells span lines.
    assert [row for row, _ in found] == ([2, 5, 7] if "sv" in name else [1, 2, 3])
    assert len(items) == 3


def test_an_unpacked_table_is_no_file_that_others_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(parquet()))
    (folder := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(opening, "FREE_EXPANSION", 64)
    (file,) = sources.listing([str(tmp_path / "a.parquet.gz")], "text").files
    with opening.open_seekable(file) as stream:
        assert stream.read(4) == b"PAR1" and not list(folder.iterdir())
    monkeypatch.setattr(opening, "FREE_EXPANSION", 1 << 20)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with opening.open_seekable(file) as stream:
        assert stream.read(4) == b"PAR1", "in memory"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_columns_of_a_table_without_header_have_numbers(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "a.tsv"
    raw = mark + "第一行\t1\nsecond line\t0\n\t1\n".encode()
    path.write_bytes(raw)
    items = piles.read(path, reading=Reading(text="#1"))
    assert piles.texts(items) == [(1, "第一行"), (2, "second line")]
    assert [reject.row for reject in piles.rejects(items)] == [3]
    spans = [item.span for item in items if isinstance(item, RawText)]
    assert [raw[slice(*span)] for span in spans if span] == raw.splitlines(keepends=True)[:2]
    assert piles.texts(piles.read(path, reading=Reading(text="#2")))[1] == (2, "0")
    assert len(piles.rejects(piles.read(path, reading=Reading(text="#3")))) == 3


def test_a_pattern_may_name_files_of_a_kind_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "train.zh.gz").write_bytes(gzip.compress("第一句\n第二句\n".encode()))
    (tmp_path / "train.en.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    items = piles.read(f"{tmp_path}/*.zh.gz", reading=Reading(lines=True))
    assert [text for _, text in piles.texts(items)] == ["第一句", "第二句"]
    with pytest.raises(SourceError, match=r"only 1 \.\w\w, 1 \.\w\w"):
        piles.read(tmp_path)


@pytest.mark.parametrize("packed", piles.PACKED)
def test_a_text_file_is_read_packed_or_not(tmp_path: Path, packed: str) -> None:
    pack = piles.PACKED[packed]
    (tmp_path / f"a.TXT{packed}").write_bytes(pack(TEXTS[0].encode()) + pack(TEXTS[1].encode()))
    if not packed:
        assert piles.texts(piles.read(tmp_path)) == [(None, TEXTS[0] + TEXTS[1])]
        return
    assert piles.texts(piles.read(tmp_path)) == [(None, TEXTS[0] + TEXTS[1])], "two members"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_the_span_of_a_record_finds_it_in_the_file(tmp_path: Path, name: str) -> None:
    raw = (FORMS.get(name) or (lambda: "\n".join(TEXTS).encode()))()
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw))
    items = piles.read(tmp_path / f"{name}.gz", reading=Reading("content", lines=True))
    for item in items:
        assert isinstance(item, RawText) and item.span is not None
        record = raw[slice(*item.span)].decode()
        if name == "a.jsonl":
            assert json.loads(record)["content"] == item.text
        elif name == "a.csv":
            assert next(csv.reader(io.StringIO(record, newline="")))[1] == item.text
        else:
            assert record == item.text
    assert len(items) == (5 if name == "a.txt" else 3)


@pytest.mark.parametrize("size", [1, 7, 64, 300, 5000])
def test_a_file_that_is_cut_gives_each_record_once_with_its_line(tmp_path: Path, size: int) -> None:
    texts = [f"第{n}行 " + "x" * (n * 37 % 211) for n in range(40)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    lines[7:7] = ["", "{broken", '"' + "y" * 3000 + '"']
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n" * (size % 2), encoding="utf-8")
    (whole,) = sources.listing([str(path)], "text").files
    uncut = list(sources.read_texts(whole, 1000))
    pieces = [piece for (piece,) in sources.partition([whole], size)]
    found: list[RawText | Reject] = []
    before = 0
    for piece in pieces:
        for item in sources.read_texts(piece, 1000):
            if isinstance(item, Lines):
                before += item.count
            else:
                row = item.row if piece.span is None else before + (item.row or 0)
                found.append(replace(item, row=row))
    assert found == uncut
    assert len(piles.texts(list(found))) == 40 and len(pieces) == -(-whole.size // size)


def test_row_groups_of_a_cut_parquet_file_come_once_with_their_rows(tmp_path: Path) -> None:
    texts = [f"第{n}篇" * 50 for n in range(100)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=9, compression="none")
    (whole,) = sources.listing([str(path)], "text").files
    pieces = [piece for (piece,) in sources.partition([whole], 2000)]
    found = [item for piece in pieces for item in sources.read_texts(piece, 1000)]
    assert len(pieces) > 5
    assert piles.texts(found) == [(n, text) for n, text in enumerate(texts, start=1)]


@pytest.mark.parametrize("kind", ["large_string", "string_view", "binary", "dictionary", "json"])
def test_text_comes_from_every_type_that_holds_it(tmp_path: Path, kind: str) -> None:
    column = pa.array(TEXTS)
    if kind == "dictionary":
        column = column.dictionary_encode()
    elif kind == "json":
        column = pa.ExtensionArray.from_storage(pa.json_(pa.utf8()), column)
    else:
        column = column.cast(getattr(pa, kind)())
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), pa.schema({"text": column.type})) as writer:
        writer.write_table(pa.table({"text": column}))
    assert [text for _, text in piles.texts(piles.read(tmp_path))] == TEXTS


@pytest.mark.parametrize("split", [False, True])
def test_saved_datasets_are_read_without_their_bookkeeping(tmp_path: Path, split: bool) -> None:
    made = datasets.Dataset.from_dict({"text": TEXTS})
    saved = datasets.DatasetDict(train=made, test=made) if split else made
    saved.save_to_disk(str(tmp_path / "saved"))
    folder = tmp_path / "saved" / ("train" if split else ".")
    (folder / "cache-0123.arrow").write_bytes(b"left over")
    items = piles.read(tmp_path / "saved")
    assert [text for _, text in piles.texts(items)] == TEXTS * (2 if split else 1)
    assert piles.rejects(items) == []
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../../secret.arrow"}]}')
    (reject,) = piles.rejects(piles.read(tmp_path / "saved"))
    assert reject.file.endswith("state.json")


def test_pictures_come_out_of_tables_with_the_names_of_their_classes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (9, 8, 3), np.uint8)) for _ in range(4)]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["猫", "dog"])
    )
    rows = {"image": pictures, "label": [0, 1, 1, 0]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    saved.to_parquet(str(tmp_path / "rows.parquet"))
    encoded = io.BytesIO()
    pictures[0].save(encoded, "PNG")
    plain = {"picture": [encoded.getvalue(), b"no picture"], "kind": ["猫", "dog"]}
    pq.write_table(pa.table(plain), tmp_path / "plain.parquet")
    data = fakes.config("digits-cnn", "data.image_size=8", "data.channels=3").data
    assert data.kind == "image"

    def read(name: str, reading: Reading) -> list[RawImage | Reject]:
        found = sources.listing([f"{tmp_path}/{name}"], "image", {f"{tmp_path}/{name}": reading})
        return [item for file in found.files for item in images.read_images(file, data)]

    for name in ("saved", "rows.parquet"):
        items = read(name, Reading())
        assert [item.label for item in items if isinstance(item, RawImage)] == [
            "猫",
            "dog",
            "dog",
            "猫",
        ]
    first, second = read("plain.parquet", Reading(image="picture", label="kind"))
    assert isinstance(first, RawImage) and first.label == "猫"
    assert isinstance(second, Reject) and second.row == 2


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A plain HTTP server of a folder, which knows no ranges."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.txt").write_text(TEXTS[0], encoding="utf-8")
    (tmp_path / "web" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"b" * 40 + b'"}'))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "web" / "c.parquet")
    made = lambda *args: Quiet(*args, directory=str(tmp_path / "web"))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), made) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_files_are_read_over_http_alone_and_from_a_list(tmp_path: Path, web: str) -> None:
    assert piles.texts(piles.read(f"{web}/a.txt")) == [(None, TEXTS[0])]
    listed = tmp_path / "files.urls"
    listed.write_text(f"# 三个文件\n{web}/a.txt\n\n{web}/c.parquet\n{web}/b.jsonl.gz\n", "utf-8")
    found = sources.listing([str(listed)], "text")
    assert [file.path for file in found.files] == [
        f"{listed}/{web}/{name}" for name in ("a.txt", "b.jsonl.gz", "c.parquet")
    ]
    assert len(piles.texts(piles.read(listed))) == 5
    before = sources.summary([str(listed)], found)
    (tmp_path / "web" / "a.txt").write_text("other", encoding="utf-8")
    assert sources.summary([str(listed)], sources.listing([str(listed)], "text")) != before
    (tmp_path / "web" / "a.txt").unlink()
    gone = next(item for item in sources.read_texts(found.files[0], 1000))
    assert isinstance(gone, Reject) and "vanished" in gone.reason
    with pytest.raises(SourceError, match="cannot be reached"):
        sources.listing([str(listed)], "text")


def test_objects_of_a_bucket_are_read_as_a_folder_by_pattern_and_from_a_list(
    tmp_path: Path, s3_server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_server}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket, _ = fs.FileSystem.from_uri("s3://pile?region=us-east-1&allow_bucket_creation=true")
    bucket.create_dir("pile/书")
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), sink)
    objects = {"a.txt": TEXTS[0].encode(), "b.jsonl.gz": gzip.compress(b'{"text": "b"}')}
    for name, raw in (objects | {"c.parquet": sink.getvalue()}).items():
        with bucket.open_output_stream(f"pile/书/{name}", compression=None) as stream:
            stream.write(raw)
    assert len(piles.texts(piles.read("s3://pile/书"))) == 2 + len(TEXTS)
    assert piles.texts(piles.read("s3://pile/书/a*")) == [(None, TEXTS[0])]
    listed = tmp_path / "files.urls"
    listed.write_text("s3://pile/书/c.parquet\ns3://pile/%E4%B9%A6/b.jsonl.gz\n", "utf-8")
    assert len(piles.texts(piles.read(listed))) == 1 + len(TEXTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"/etc/passwd\n", "line 1 of .* is no URI"),
        (b"# x\nfile:///etc/passwd\n", "line 2 of .* is no URI"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"", "holds no text files"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "files.urls").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        sources.listing([str(tmp_path / "files.urls")], "text")
