"""CSV and TSV: one document per row, from the column that the recipe names.

A column that is named `#2` is the second one of files that have no header.
"""

import csv
import re
from collections.abc import Iterator
from typing import IO

from pipelines.data.sources.decoding import is_utf16, too_long, undecodable
from pipelines.data.sources.files import DELIMITED, RawText, Reject, SourceFile
from pipelines.data.sources.lines import SKIP
from pipelines.data.sources.opening import Unreadable

DELIMITERS = ",;\t|"
"""The one that is most frequent in the header of a .csv is its delimiter."""
_NUMBER = re.compile(r"#[1-9][0-9]{0,3}")


class _TooLong(Exception):
    pass


class _Lines:
    """Decoded lines for `csv.reader`, with the place of the next one. Bad bytes become halves of
    surrogate pairs, which tell the record that holds them."""

    def __init__(self, stream: IO[bytes], max_bytes: int) -> None:
        self._stream, self._max_bytes = stream, max_bytes
        self.position = self.number = 0
        self._first = self._again = b""

    def start_again(self) -> None:
        """After the first line: it will come once more."""
        self._again, self.position, self.number = self._first, 0, 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again or self._stream.readline(self._max_bytes + 1)
        self._again = b""
        if not line:
            raise StopIteration
        if self.position == 0:
            self._first = line
        if self.position == 0 and is_utf16(line):
            raise Unreadable(undecodable(line[:2]))
        self.number += 1
        long, first = len(line) > self._max_bytes, self.position == 0
        self.position += len(line)
        if long:
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = self._stream.readline(SKIP)
                self.position += len(rest)
            raise _TooLong
        return line.decode("utf-8-sig" if first else "utf-8", "surrogateescape")


def by_row(file: SourceFile, stream: IO[bytes], max_bytes: int) -> Iterator[RawText | Reject]:
    """Rows are named by the line that they begin on; the header is line 1.

    Raises:
        Unreadable: if the header cannot be read or lacks the column, or there are no rows.
    """
    lines = _Lines(stream, max_bytes)
    header, delimiter = _header(file, lines, max_bytes)
    # A global of the csv module: a field may be as long as a document.
    csv.field_size_limit(max_bytes)
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    empty = True
    while True:
        number, start = lines.number + 1, lines.position
        try:
            cells = next(records)
            found = cells and _document(file, number, header, cells, (start, lines.position))
        except StopIteration:
            break
        except _TooLong:
            found = Reject(file.path, number, too_long(max_bytes))
        except csv.Error as error:
            found = Reject(file.path, number, _broken(str(error), max_bytes))
        if found:
            empty = False
            yield found
    if empty:
        raise Unreadable("empty: not a single row")


def _header(file: SourceFile, lines: _Lines, max_bytes: int) -> tuple[list[str] | None, str]:
    """Names of the columns, None where they have numbers, and the delimiter."""
    try:
        line = next(lines)
    except StopIteration:
        raise Unreadable("empty: not even a header") from None
    except _TooLong:
        raise Unreadable(f"a header over {max_bytes} bytes") from None
    delimiter = DELIMITED[file.extension]
    if delimiter == ",":
        delimiter = max(DELIMITERS, key=line.count)
    if "\0" in line:
        raise Unreadable("holds NUL bytes: not text")
    if _NUMBER.fullmatch(file.reading.text):
        lines.start_again()
        return None, delimiter
    try:
        names = next(csv.reader([line], delimiter=delimiter, strict=True))
        line.encode()
    except (csv.Error, StopIteration):
        raise Unreadable("a header that is no CSV") from None
    except UnicodeEncodeError:
        raise Unreadable("not UTF-8") from None
    names = [name.strip() for name in names]
    if file.reading.text not in names:
        # Without a header, the first line is content: it is not shown.
        raise Unreadable(
            f"no column `{file.reading.text}` among the {len(names)} of its first line: name one "
            "in data.columns, or `#1` for the first of files without a header"
        )
    return names, delimiter


def _broken(message: str, max_bytes: int) -> str:
    if "field limit" in message:
        return f"a field over {max_bytes} bytes: a quote that is never closed, or a long document"
    return "not CSV: a quote that is never closed, or in the middle of a field"


def _document(
    file: SourceFile, row: int, header: list[str] | None, cells: list[str], span: tuple[int, int]
) -> RawText | Reject:
    if header is None:
        header = [f"#{number}" for number in range(1, len(cells) + 1)]
    if len(cells) != len(header):
        return Reject(
            file.path, row, f"a row of {len(cells)} cells below a header of {len(header)}"
        )
    named = dict(zip(header, cells, strict=True))
    text = named.get(file.reading.text, "")
    if "\0" in text:
        return Reject(file.path, row, "holds NUL bytes: not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Reject(file.path, row, "not UTF-8")
    if not text:
        return Reject(file.path, row, f"nothing in column `{file.reading.text}`")
    return RawText(row, text, span, {other: named.get(other) for other in file.reading.beside})
