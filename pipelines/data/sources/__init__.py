"""Where documents come from: builtin corpora, files, folders and globs, URIs.

Three steps, each plain data for the next: `listing` finds files and what is wrong with them,
`partition` cuts the listing to units of work, `read_texts` reads one file. What cannot be read is
never an exception and never silent: it becomes a `Reject` that names file, row and reason, and
never shows content.

    files       what a source is made of, and how it is cut
    listing     builtin, local;  remote   URIs;  saved   folders of Hugging Face `datasets`
    opening     bytes from where they lie, decompressed within bounds
    reading     one file to documents: lines, delimited, columnar
"""

from pipelines.data.sources.files import (
    CODE_EXTENSIONS,
    Listing,
    Payload,
    RawText,
    Reading,
    Reject,
    SourceFile,
    extension_of,
    partition,
)
from pipelines.data.sources.lines import Lines
from pipelines.data.sources.listing import BUILTINS, DIGITS_SOURCE, listing, summary
from pipelines.data.sources.opening import Unreadable, open_binary
from pipelines.data.sources.reading import read_texts

__all__ = [
    "BUILTINS",
    "CODE_EXTENSIONS",
    "DIGITS_SOURCE",
    "Lines",
    "Listing",
    "Payload",
    "RawText",
    "Reading",
    "Reject",
    "SourceFile",
    "Unreadable",
    "extension_of",
    "listing",
    "open_binary",
    "partition",
    "read_texts",
    "summary",
]
