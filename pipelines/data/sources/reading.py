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
        elif file.extension in DELIMITED or file.by_line:
            records = delimited.by_row if file.extension in DELIMITED else lines.by_line
            with open_binary(file) as stream:
                yield from records(file, stream, max_bytes)
        else:
            with open_binary(file) as stream:
                document = lines.whole(file, stream, max_bytes)
            # Only now: half a document is none.
            yield document
    except OSError as error:
        yield Reject(file.path, None, why(error))
