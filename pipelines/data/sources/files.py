"""What sources are made of: plain data that travels to whoever reads it."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal

Payload = Literal["text", "image"]

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
"""Endings of compressed files; what is inside is told by the ending before."""
LINES = frozenset({".jsonl", ".ndjson"})
DELIMITED = {".csv": ",", ".tsv": "\t"}
COLUMNAR = frozenset({".parquet", ".arrow", ".feather"})
TABLES = LINES | DELIMITED.keys() | COLUMNAR
"""Files of many documents, one to a row."""

IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg"}) | COLUMNAR
_PROSE = """
    .txt .text .md .markdown .rst .tex .org .adoc .html .htm .xhtml .xml .svg .log .srt .vtt .po
"""
_DATA = ".json .yaml .yml .toml .ini .cfg .conf .sql"
_CODE = """
    .py .pyi .pyx .ipynb .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .m .mm .java .kt .kts .scala .groovy
    .go .rs .swift .js .mjs .cjs .jsx .ts .tsx .vue .css .scss .less .rb .php .pl .pm .lua .r .jl
    .hs .ml .mli .ex .exs .erl .clj .lisp .el .scm .f .f90 .f95 .pas .d .zig .nim .dart .cs .fs .vb
    .sh .bash .zsh .fish .ps1 .bat .cmake .mk .gradle .proto .thrift .graphql .tf .v .sv .vhd .asm
"""
CODE_EXTENSIONS = frozenset(_CODE.split())
TEXT_EXTENSIONS = frozenset(f"{_PROSE} {_DATA}".split()) | CODE_EXTENSIONS | TABLES
UNITS = 64
"""Units of work that a corpus is cut to at least: with two cores, the last one is alone for 2 % of
the time at most."""
LEAST_UNIT_BYTES = 1 << 20
"""But not finer: half a second of work, and some milliseconds of Ray's."""


@dataclass(frozen=True)
class Reading:
    """How the files of a source become documents."""

    text: str = "text"
    """Column of a table that holds the documents."""
    image: str = "image"
    """Column of a table that holds encoded pictures."""
    label: str = "label"
    """Column of a table that holds their classes."""
    lines: bool = False
    """Each line of a text file is a document; else the whole file is one."""
    beside: tuple[str, ...] = ()
    """Other columns of a table that rules want to see."""


@dataclass(frozen=True)
class SourceFile:
    """A file that exists; plain data, opened on whichever node reads it."""

    path: str
    """How people see it: the source as the recipe names it, then the path inside."""
    location: str
    """Path in its filesystem; for a local one absolute."""
    root: str
    """URI that opens the filesystem; empty for a local one."""
    size: int
    mtime_ns: int
    """Of HTTP, a number that follows from the entity tag or the date of the last change; 0 where
    it is not known."""
    inside: str
    """Path inside its source, such as `cats/1.png`."""
    source: str = ""
    """The source that it was found in, as the recipe names it."""
    reading: Reading = Reading()
    span: tuple[int, int] | None = None
    """Only the records that begin in these bytes; None for all of them."""

    @functools.cached_property
    def extension(self) -> str:
        """Lower case, of what is inside: `.txt` for `a.TXT.gz`."""
        return extension_of(self.location)

    @property
    def codec(self) -> str | None:
        return CODECS.get(PurePosixPath(self.location.lower()).suffix)

    @property
    def remote(self) -> bool:
        return bool(self.root)

    @property
    def wanted(self) -> int:
        """Bytes of it that are asked for."""
        return self.span[1] - self.span[0] if self.span else self.size

    @property
    def by_line(self) -> bool:
        """Whether each of its lines is a record."""
        return self.extension in LINES or (self.reading.lines and self.extension not in TABLES)

    @property
    def can_be_cut(self) -> bool:
        """Whether its records can be found from the middle of it."""
        if self.codec or self.root.startswith(("http:", "https:")):
            return False
        return self.by_line or self.extension == ".parquet"


@dataclass(frozen=True)
class Reject:
    """Something that could not be read. Holds no content."""

    file: str
    row: int | None
    """Line of the file, or row of a table without lines, counted from 1; None for the whole
    file."""
    reason: str


@dataclass(frozen=True)
class Listing:
    """What all sources together hold, sorted by source and path."""

    files: tuple[SourceFile, ...]
    rejects: tuple[Reject, ...] = ()
    ignored: Counter[str] = field(default_factory=Counter)
    """Files that no reader is for, by extension, and hidden ones."""


@dataclass(frozen=True)
class RawText:
    """One document as it was read."""

    row: int | None
    """As in `Reject`."""
    text: str
    span: tuple[int, int] | None = None
    """First byte and end of its record in the file, decompressed; None in a columnar file."""
    beside: Mapping[str, Any] | None = None
    """Cells of the columns `Reading.beside`, where it is a row of a table; absent ones are None."""


def extension_of(path: str) -> str:
    name = PurePosixPath(path.lower())
    return PurePosixPath(name.stem).suffix if name.suffix in CODECS else name.suffix


def partition(files: Sequence[SourceFile], partition_bytes: int) -> list[list[SourceFile]]:
    """Cut files to units of work of about `partition_bytes`, in order of source and path; of less
    where that would give fewer than `UNITS`, so that cores do not wait for the last one.

    A larger file whose records can be found from its middle becomes several units. The plan
    depends on the listing alone, so that the shards that follow from it do not depend on who works
    on them. A unit holds files of one source.
    """
    wanted = sum(file.size for file in files) // UNITS
    partition_bytes = min(partition_bytes, max(LEAST_UNIT_BYTES, wanted))
    parts: list[list[SourceFile]] = []
    room, source = 0, ""
    for file in sorted(files, key=lambda f: (f.source, f.path)):
        pieces = _cut(file, partition_bytes)
        if len(pieces) > 1:
            parts += [[piece] for piece in pieces]
            room = 0
            continue
        if not parts or file.size > room or file.source != source:
            parts.append([])
            room, source = partition_bytes, file.source
        parts[-1].append(file)
        room -= file.size
    return parts


def _cut(file: SourceFile, size: int) -> list[SourceFile]:
    count = -(-file.size // size) if file.can_be_cut else 1
    if count < 2:
        return [file]
    bounds = [file.size * n // count for n in range(count + 1)]
    return [replace(file, span=span) for span in zip(bounds, bounds[1:], strict=False)]
