"""One file to its documents."""

from collections.abc import Iterator

from pipelines.data.sources import columnar, delimited, lines
from pipelines.data.sources.files import COLUMNAR, DELIMITED, RawText, Reject, SourceFile
from pipelines.data.sources.lines import Lines
from pipelines.data.sources.opening import open_binary, why


def read_texts(file: SourceFile, max_bytes: int) -> Iterator[RawText | Reject | Lines]:
    """The documents of one file, or of the part of it that `file.span` names.

    A table gives one document per row, from the column `file.reading.text`; any other file is one
    document, or one per line. What cannot be read is a `Reject`, never an exception; what was read
    before the damage stays. A part of a file of lines ends with `Lines`.

    Args:
        max_bytes: longest document that is read into memory.
    """
    try:
        if file.extension in COLUMNAR:
            yield from columnar.texts(file, max_bytes)
            return
        with open_binary(file) as stream:
            if file.extension in DELIMITED:
                yield from delimited.by_row(file, stream, max_bytes)
            elif file.by_line:
                yield from lines.by_line(file, stream, max_bytes)
            else:
                yield lines.whole(file, stream, max_bytes)
    except OSError as error:
        yield Reject(file.path, None, why(error))
