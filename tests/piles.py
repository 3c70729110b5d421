"""Documents in every form that `prepare` reads, written by the libraries that people use."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from pipelines.data import sources
from pipelines.data.sources import Lines, RawText, Reading, Reject

CHINESE = "春眠不觉晓,处处闻啼鸟。\nمرحبا Ελλάδα 🌾 naïve\n"


def zstandard(raw: bytes) -> bytes:
    packed: bytes = pa.Codec("zstd").compress(raw, asbytes=True)
    return packed


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def read(
    source: Path | str, max_bytes: int = 1000, reading: Reading | None = None
) -> list[RawText | Reject | Lines]:
    """Everything that a source gives, what is wrong with its files included."""
    found = sources.listing([str(source)], "text", {str(source): reading or Reading()})
    items = [item for file in found.files for item in sources.read_texts(file, max_bytes)]
    return [*found.rejects, *items]


def texts(items: list[RawText | Reject | Lines]) -> list[tuple[int | None, str]]:
    return [(item.row, item.text) for item in items if isinstance(item, RawText)]


def rejects(items: list[RawText | Reject | Lines]) -> list[Reject]:
    return [item for item in items if isinstance(item, Reject)]
