"""Parquet and Arrow: rows of the columns that the recipe names, a bounded batch at a time.

Nothing is ever unpickled: a file with a column of a type that Python would have to run code for is
refused as a whole, and of the rest only the named columns are read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.sources.decoding import decode, too_long, undecodable
from pipelines.data.sources.files import RawText, Reject, SourceFile
from pipelines.data.sources.opening import (
    FREE_EXPANSION,
    MAX_EXPANSION,
    Unreadable,
    open_seekable,
)

BATCH_BYTES = 8 << 20
"""Decoded bytes of a column that are held at once, where rows are about as long as each other."""
EXTENSION = b"ARROW:extension:name"
PLAIN_EXTENSIONS = ("arrow.json",)
"""Types whose storage is what they mean."""
DAMAGE = (pa.ArrowException, ArithmeticError, LookupError, MemoryError, ValueError)
"""What pyarrow raises over bytes that mean nothing: names that are not UTF-8, unknown time zones,
times outside of any calendar, lengths beyond any memory."""
_BYTES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}
"""Text as the bytes that it is made of."""


@dataclass(frozen=True)
class Row:
    number: int
    """Counted from 1 through the whole file."""
    cells: tuple[Any, ...]


def texts(file: SourceFile, max_bytes: int) -> Iterator[RawText | Reject]:
    """
    Raises:
        Unreadable: if the file is damaged or empty, lacks the column, or holds what would run code.
        OSError: if the storage fails.
    """
    name, given = file.reading.text, 0
    for row in rows(file, [name], file.reading.beside, text=name):
        cell, *others = row.cells
        if cell is None:
            yield Reject(file.path, row.number, f"nothing in column `{name}`")
            continue
        given += len(cell)
        # A dictionary holds a value once, and a million rows may repeat it.
        if given > max(FREE_EXPANSION, MAX_EXPANSION * file.size):
            raise Unreadable(f"a decompression bomb: {file.size} bytes became {given}")
        if len(cell) > max_bytes:
            yield Reject(file.path, row.number, too_long(max_bytes))
            continue
        text = decode(cell)
        if text is None:
            yield Reject(file.path, row.number, undecodable(cell))
        else:
            beside = dict(zip(file.reading.beside, map(_plain, others), strict=True))
            yield RawText(row.number, text, None, beside)


def _plain(cell: Any) -> Any:
    """Text of a column that is only looked at."""
    return cell.decode("utf-8", "replace") if isinstance(cell, bytes) else cell


def rows(
    file: SourceFile, columns: Sequence[str], beside: Sequence[str] = (), *, text: str = ""
) -> Iterator[Row]:
    """The cells of some columns; those of text as bytes, which may not be UTF-8.

    Args:
        beside: columns whose cells come behind those, None where the file has no such column.
        text: the column that must hold text.

    Raises:
        As `texts`.
    """
    empty = file.span is None
    with open_seekable(file) as stream:
        try:
            for first, batch in _batches(file, stream, columns, beside):
                if text:
                    _check_text(batch.schema.field(text))
                batch.validate(full=False)
                cells = [_cells(batch, name) for name in (*columns, *beside)]
                for offset, values in enumerate(zip(*cells, strict=True)):
                    empty = False
                    yield Row(first + offset, values)
        except DAMAGE as error:
            raise Unreadable(f"damaged {file.extension} data ({type(error).__name__})") from None
        except OSError as error:
            if error.errno is not None or isinstance(error, Unreadable):
                raise
            raise Unreadable(f"damaged {file.extension} data") from None
    if empty:
        raise Unreadable("empty: not a single row")


def schema(file: SourceFile) -> pa.Schema:
    """
    Raises:
        As `texts`.
    """
    with open_seekable(file) as stream:
        try:
            if file.extension == ".parquet":
                return pq.read_schema(stream)
            return _arrow_reader(stream)[0].schema
        except (*DAMAGE, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise Unreadable(f"damaged {file.extension} data ({type(error).__name__})") from None


def _cells(batch: pa.RecordBatch, name: str) -> list[Any]:
    there = batch.schema.get_field_index(name) >= 0
    return _bytes(batch.column(name)) if there else [None] * batch.num_rows


def _bytes(column: pa.Array) -> list[Any]:
    """Values of a column; text is not decoded, because Arrow does not promise that it is UTF-8.

    Nor does it promise that offsets lie inside of their data: pyarrow follows them wherever they
    lead, and the process ends there.

    Raises:
        pa.ArrowInvalid: if the column is not what its type says.
    """
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        column, kind = column.storage, column.type.storage_type
    if pa.types.is_dictionary(kind):
        values, places = _bytes(column.dictionary), _bytes(column.indices)
        if not all(place is None or 0 <= place < len(values) for place in places):
            raise pa.ArrowInvalid("an index outside of its dictionary")
        return [None if place is None else values[place] for place in places]
    if kind in _BYTES:
        column = column.view(_BYTES[kind])
    column.validate(full=True)
    cells: list[Any] = column.to_pylist()
    return cells


def _batches(
    file: SourceFile, stream: Any, columns: Sequence[str], beside: Sequence[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches with the number of their first row."""
    if file.extension == ".parquet":
        return _parquet(file, stream, columns, beside)
    return _arrow(stream, columns, beside)


def _parquet(
    file: SourceFile, stream: Any, columns: Sequence[str], beside: Sequence[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    with pq.ParquetFile(stream) as opened:
        columns = _chosen(opened.schema_arrow, columns, beside)
        for number, first, size in _groups(file, opened.metadata):
            reading = opened.iter_batches(size, row_groups=[number], columns=columns)
            for batch in reading:
                yield first, batch
                first += batch.num_rows


def _groups(file: SourceFile, metadata: Any) -> Iterator[tuple[int, int, int]]:
    """Row groups that begin in the file's span: number, first row, and rows to read at once, whose
    cells are about `BATCH_BYTES` together.

    Where a group begins follows from the sizes of those before it. The place that its columns note
    would be more exact, but pyarrow ends the process over columns whose notes are damaged.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    sizes = [max(1, group.total_byte_size) for group in groups]
    first, before, total = 1, 0, sum(sizes)
    if total > max(FREE_EXPANSION, MAX_EXPANSION * file.size):
        raise Unreadable(f"a decompression bomb: {file.size} bytes would become {total}")
    for number, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        begin = file.size * before // total
        if file.span is None or file.span[0] <= begin < file.span[1]:
            yield number, first, max(1, min(8192, BATCH_BYTES * group.num_rows // size))
        first += group.num_rows
        before += size


def _arrow(
    stream: Any, columns: Sequence[str], beside: Sequence[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    reader, count = _arrow_reader(stream)
    columns = _chosen(reader.schema, columns, beside)
    number = 1
    for batch in (reader.get_batch(n) for n in range(count)) if count is not None else reader:
        chosen = batch.select(columns)
        for start in range(0, chosen.num_rows, 1024):
            yield number + start, chosen.slice(start, 1024)
        number += batch.num_rows


def _arrow_reader(stream: Any) -> tuple[Any, int | None]:
    """A reader of either form of Arrow IPC; with a number of batches where it is the file form."""
    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        reader = pa.ipc.open_file(stream)
        return reader, reader.num_record_batches
    return pa.ipc.open_stream(stream), None


def _chosen(schema: pa.Schema, columns: Sequence[str], beside: Sequence[str]) -> list[str]:
    """The columns to read, after a look at what they are."""
    for field in schema:
        for name in _extensions(field):
            if "pickle" in name or name == "arrow.py_extension_type":
                raise Unreadable(f"holds the extension type {name}, which would run code: refused")
    for name in columns:
        if schema.get_field_index(name) < 0:
            raise Unreadable(_no_column(name, schema.names))
    chosen = [*columns, *(name for name in beside if schema.get_field_index(name) >= 0)]
    for name in chosen:
        field = schema.field(name)
        odd = [e for e in _extensions(field) if e not in PLAIN_EXTENSIONS]
        if odd:
            raise Unreadable(f"column `{name}` holds the extension type {odd[0]}: refused")
    return list(dict.fromkeys(chosen))


def _no_column(name: str, names: list[str]) -> str:
    shown = ", ".join(n[:40] for n in names[:8]) + (", ..." if len(names) > 8 else "")
    return f"no column `{name}` (there are: {shown}): name one in data.columns"


def _extensions(field: pa.Field) -> Iterator[str]:
    """Names of extension types in a column, nested ones too."""
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType):
        yield kind.extension_name
        kind = kind.storage_type
    elif field.metadata and EXTENSION in field.metadata:
        yield field.metadata[EXTENSION].decode(errors="replace")
    if pa.types.is_dictionary(kind):
        yield from _extensions(pa.field("", kind.value_type))
    elif pa.types.is_nested(kind):
        for number in range(kind.num_fields):
            yield from _extensions(kind.field(number))


def _check_text(field: pa.Field) -> None:
    if not _is_text(field.type):
        raise Unreadable(f"column `{field.name}` holds {str(field.type)[:40]}, not text")


def _is_text(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
    )
    return any(test(kind) for test in tests)
