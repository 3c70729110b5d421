"""Tables and pictures with some of their bytes changed, read one after the other in a process of
their own.

A reader that follows a damaged offset ends its process: run as `python -m tests.damage arrow 1 500`
this says how far it came, and in the end how many documents and rejects came out.
"""

import datetime as dt
import faulthandler
import io
import json
import random
import resource
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
from PIL import Image, PngImagePlugin

from pipelines.data import images, sources
from pipelines.data.images import RawImage
from pipelines.data.sources import RawText, Reading, Reject, SourceFile
from tests import fakes

MEMORY = 8 << 30
"""Addresses that reading may take: what a damaged length asks for is refused, not given."""
TEXT = pa.array([f"第{n}行 of a table" * (n % 4) for n in range(40)] + [None])
TEXTS = {
    "string": TEXT,
    "large": TEXT.cast(pa.large_string()),
    "view": TEXT.cast(pa.string_view()),
    "dictionary": TEXT.dictionary_encode(),
}
NOON = dt.datetime(2024, 5, 17, 12, tzinfo=dt.UTC)
BESIDE: dict[str, Any] = {
    "names": pa.array([["甲", "b"], [], None] * 13 + [["x"]] * 2),
    "deep": pa.array([{"a": "文", "b": [1.5]}] * 41),
    "day": pa.array([NOON.date()] * 41),
    "time": pa.array([NOON] * 41, pa.timestamp("us", "Europe/Berlin")),
    "price": pa.array([Decimal("1.50"), None] * 20 + [Decimal("-2")]),
    "pairs": pa.array([[("k", 1)]] * 41, pa.map_(pa.string(), pa.int64())),
    "flag": pa.array([True, None] * 20 + [False]),
}
READING = Reading(beside=tuple(BESIDE))
PICTURES = {
    "image": pa.array([{"bytes": b"\x89PNG", "path": "一.png"}, None] * 20),
    "label": pa.array(["猫", "dog"] * 20),
}


def arrow_files() -> Iterator[bytes]:
    for column in TEXTS.values():
        for table in (pa.table({"text": column}), pa.table({"text": column, **BESIDE})):
            for form in (pa.ipc.new_stream, pa.ipc.new_file):
                sink = io.BytesIO()
                with form(sink, table.schema) as writer:
                    writer.write_table(table, max_chunksize=30)
                yield sink.getvalue()
    sink = io.BytesIO()
    feather.write_feather(pa.table({"text": TEXT, **BESIDE}), sink)
    yield sink.getvalue()
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, pa.table(PICTURES).schema) as writer:
        writer.write_table(pa.table(PICTURES))
    yield sink.getvalue()


def parquet_files() -> Iterator[bytes]:
    for options in (
        {"compression": "none"},
        {"compression": "none", "use_dictionary": False, "data_page_version": "2.0"},
        {"compression": "snappy", "row_group_size": 15},
        {"compression": "zstd", "use_byte_stream_split": False, "store_schema": False},
    ):
        for table in (pa.table({"text": TEXT}), pa.table({"text": TEXT, **BESIDE})):
            sink = io.BytesIO()
            pq.write_table(table, sink, **options)
            yield sink.getvalue()
    sink = io.BytesIO()
    pq.write_table(pa.table(PICTURES), sink)
    yield sink.getvalue()


def pictures() -> Iterator[bytes]:
    """JPEG and PNG with all that stands beside pixels: how the camera was held, and more."""
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)
    held = Image.Exif()
    held[0x0112], held[0x010F], held[0x0132] = 6, "定日镜", "2024:05:17 12:00:00"
    held.get_ifd(0x8769).update({0x829A: (1, 60), 0x9003: "2024:05:17 12:00:00"})
    held.get_ifd(0x8825).update({1: "N", 2: (47.0, 22.0, 7.5)})
    noted = PngImagePlugin.PngInfo()
    noted.add_text("Title", "太阳", zip=True)
    noted.add_itxt("Author", "李", "zh", "作者")
    for mode in ("L", "RGB", "CMYK"):
        for options in ({"exif": held}, {"progressive": True}, {"exif": held, "dpi": (72, 72)}):
            sink = io.BytesIO()
            Image.fromarray(pixels).convert(mode).save(sink, "JPEG", **options)
            yield sink.getvalue()
    for mode in ("1", "L", "P", "RGB", "RGBA", "I;16"):
        sink = io.BytesIO()
        shown = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode).convert(mode)
        shown.save(sink, "PNG", exif=held, pnginfo=noted, icc_profile=b"profile" * 9)
        yield sink.getvalue()


def _with_sums(raw: bytes) -> bytes:
    """A PNG whose checksums are right again, else damage ends at them."""
    found, place = bytearray(raw), 8
    while place + 12 <= len(raw):
        end = place + 8 + int.from_bytes(raw[place : place + 4])
        found[end : end + 4] = zlib.crc32(raw[place + 4 : end]).to_bytes(4)
        place = end + 4
    return bytes(found[: len(raw)])


MADE = {"arrow": arrow_files, "parquet": parquet_files, "picture": pictures}


def damaged(raw: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, or many, or the end lost."""
    found = bytearray(raw)
    match chance.randrange(8):
        case 0:
            start = chance.randrange(len(raw))
            found[start : start + 64] = chance.randbytes(len(found[start : start + 64]))
        case 1:
            del found[chance.randrange(len(raw)) :]
        case number:
            # The head says what the rest is; and how a camera was held.
            end = len(raw) if number % 2 else min(len(raw), 300)
            for _ in range(chance.randint(1, 4)):
                byte = chance.choice((0, 3, 0x7F, 0x80, 0xFF, chance.randrange(256)))
                found[chance.randrange(end)] = byte
    return bytes(found)


def read(path: Path, kind: str) -> Iterator[Any]:
    """A table both as documents and as pictures."""
    size, inside = path.stat().st_size, f"class/{path.name}"
    file = SourceFile(str(path), str(path), "", size, 0, inside, reading=READING)
    if kind != "picture":
        yield from sources.read_texts(file, 1000)
    data = fakes.config("digits-cnn").data
    assert data.kind == "image"
    yield from images.read_images(file, data)


def main(kind: str, seed: int, count: int) -> None:
    chance, whole = random.Random(seed), list(MADE[kind]())
    found = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{'png' if kind == 'picture' else kind}"
        for number in range(count):
            print(number, file=sys.stderr, flush=True)
            raw = damaged(whole[number % len(whole)], chance)
            path.write_bytes(_with_sums(raw) if raw.startswith(b"\x89PNG") else raw)
            for item in read(path, kind):
                assert isinstance(item, RawText | RawImage | Reject), type(item)
                found["Reject" if isinstance(item, Reject) else "good"] += 1
                if isinstance(item, RawText):
                    item.text.encode()
    print(json.dumps(found))


if __name__ == "__main__":
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
