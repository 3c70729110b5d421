"""Text files as a whole, by line, and JSON lines. Memory is bounded by the longest document."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import orjson

from pipelines.data.sources.decoding import decode, is_utf16, too_long, undecodable
from pipelines.data.sources.files import LINES, RawText, Reject, SourceFile
from pipelines.data.sources.opening import Unreadable

SKIP = 1 << 20
"""Bytes read at once while a line that is too long is passed over."""


@dataclass(frozen=True)
class Lines:
    """How many lines a part of a file held, so that rows can be counted from the file's first."""

    file: str
    count: int


def whole(file: SourceFile, stream: IO[bytes], max_bytes: int) -> RawText | Reject:
    raw = stream.read(max_bytes + 1)
    if len(raw) > max_bytes:
        return Reject(file.path, None, too_long(max_bytes))
    text = decode(raw)
    if text is None:
        return Reject(file.path, None, undecodable(raw))
    return RawText(None, text, (0, len(raw)))


def by_line(
    file: SourceFile, stream: IO[bytes], max_bytes: int
) -> Iterator[RawText | Reject | Lines]:
    """Documents of a file of one per line; of a part of a file, rows count from its first line.

    Raises:
        Unreadable: if it is UTF-16, where a line feed is no byte, or empty as a whole.
    """
    number, empty = 0, True
    for number, start, line in _lines(file.span, stream, max_bytes):
        if start == 0 and is_utf16(line):
            raise Unreadable(undecodable(line[:2]))
        body = line.strip()
        empty = empty and not body
        if len(line) > max_bytes:
            yield Reject(file.path, number, too_long(max_bytes))
        elif body:
            span = (start, start + len(line.rstrip(b"\r\n")))
            if file.extension in LINES:
                yield _json_line(file, number, body, span)
            else:
                yield _text_line(file.path, number, line.rstrip(b"\r\n"), span)
    if file.span is not None:
        yield Lines(file.path, number)
    elif empty:
        raise Unreadable("empty: no line with anything on it")


def _lines(
    span: tuple[int, int] | None, stream: IO[bytes], max_bytes: int
) -> Iterator[tuple[int, int, bytes]]:
    """Number, first byte and content of each line that begins in the span.

    A line over `max_bytes` comes with its first `max_bytes + 1` bytes.
    """
    position, end = (0, None) if span is None else (_first_line(span, stream), span[1])
    number = 0
    while (end is None or position < end) and (line := stream.readline(max_bytes + 1)):
        number += 1
        yield number, position, line
        position += len(line)
        rest = line
        # What lies behind the span's end is for others to pass over.
        while rest and not rest.endswith(b"\n") and (end is None or position < end):
            rest = stream.readline(SKIP)
            position += len(rest)


def _first_line(span: tuple[int, int], stream: IO[bytes]) -> int:
    """Where the first line begins that begins in the span; its end if none does."""
    if span[0] == 0:
        return 0
    position = stream.seek(span[0] - 1, os.SEEK_SET)
    while position < span[1]:
        piece = stream.readline(SKIP)
        position += len(piece)
        if not piece or piece.endswith(b"\n"):
            return position
    return position


def _text_line(path: str, number: int, line: bytes, span: tuple[int, int]) -> RawText | Reject:
    text = decode(line)
    if text is None:
        return Reject(path, number, undecodable(line))
    return RawText(number, text, span)


def _json_line(
    file: SourceFile, number: int, line: bytes, span: tuple[int, int]
) -> RawText | Reject:
    if decode(line) is None:
        return Reject(file.path, number, undecodable(line))
    try:
        tree = orjson.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        # The message may quote the line: it is looked at, never shown.
        return Reject(file.path, number, _not_json(str(error)))
    name = file.reading.text
    text = tree.get(name) if isinstance(tree, dict) else None
    if not isinstance(text, str):
        return Reject(file.path, number, f"no field `{name}` that holds text")
    return RawText(number, text, span, {other: tree.get(other) for other in file.reading.beside})


def _not_json(message: str) -> str:
    if "depth" in message:
        return "JSON that is nested too deeply"
    if "surrogate" in message:
        return "half a surrogate pair, which is not text"
    return "not JSON"
