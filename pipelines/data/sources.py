"""Where documents come from: builtin corpora, local files, folders and globs, URIs.

Three steps, each plain data for the next: `listing` finds files and what is wrong with them,
`partition` cuts the listing to units of work, `read_texts` reads one file. What cannot be read is
never an exception and never silent: it becomes a `Reject` that names file, row and reason, and
never shows content.
"""

import errno
import functools
import glob
import gzip
import hashlib
import io
import json
import os
import platform
import stat
import sysconfig
import zlib
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast

from pyarrow import fs

from cluster.errors import SourceError

Payload = Literal["text", "image"]

BUILTIN = "builtin:"
DIGITS_SOURCE = "builtin:digits"
STDLIB_SOURCE = "builtin:python-stdlib"
BUILTINS: dict[str, Payload] = {STDLIB_SOURCE: "text", DIGITS_SOURCE: "image"}
DIGITS_BYTES = 1797 * 64
"""1,797 images of 8 x 8 grey values."""

IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg"})
_PROSE = """
    .txt .text .md .markdown .rst .tex .org .adoc .html .htm .xml .svg .log .srt .vtt .po
"""
_DATA = ".json .jsonl .yaml .yml .toml .ini .cfg .conf .csv .tsv .sql"
_CODE = """
    .py .pyi .pyx .ipynb .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .m .mm .java .kt .kts .scala .groovy
    .go .rs .swift .js .mjs .cjs .jsx .ts .tsx .vue .css .scss .less .rb .php .pl .pm .lua .r .jl
    .hs .ml .mli .ex .exs .erl .clj .lisp .el .scm .f .f90 .f95 .pas .d .zig .nim .dart .cs .fs .vb
    .sh .bash .zsh .fish .ps1 .bat .cmake .mk .gradle .proto .thrift .graphql .tf .v .sv .vhd .asm
"""
CODE_EXTENSIONS = frozenset(_CODE.split())
TEXT_EXTENSIONS = frozenset(f"{_PROSE} {_DATA} {_CODE}".split())


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
    inside: str
    """Path inside its source, such as `cats/1.png`."""

    @property
    def extension(self) -> str:
        """Lower case, without `.gz`: `.txt` for `a.TXT.gz`."""
        return extension_of(self.location)

    @property
    def compressed(self) -> bool:
        return self.location.lower().endswith(".gz")


@dataclass(frozen=True)
class Reject:
    """Something that could not be read. Holds no content."""

    file: str
    row: int | None
    """Line of the file, counted from 1; None for the whole file."""
    reason: str


@dataclass(frozen=True)
class Listing:
    """What all sources together hold, sorted by path."""

    files: tuple[SourceFile, ...]
    rejects: tuple[Reject, ...] = ()
    ignored: Counter[str] = field(default_factory=Counter)
    """Files that no reader is for, by extension, and hidden ones."""


@dataclass(frozen=True)
class RawText:
    """One document as it was read."""

    row: int | None
    text: str


# ------------------------------------------------------------------ listing


def listing(sources: Sequence[str], payload: Payload) -> Listing:
    """Find the files of every source.

    Raises:
        SourceError: if a source does not exist or has no file that fits the payload.
    """
    found = [_list_source(_named(source), payload) for source in sources]
    files = {file.path: file for part in found for file in part.files}
    return Listing(
        tuple(files[path] for path in sorted(files)),
        tuple(reject for part in found for reject in part.rejects),
        sum((part.ignored for part in found), Counter()),
    )


def summary(sources: Sequence[str], found: Listing) -> dict[str, Any]:
    """What the fingerprint of a corpus covers: names, sizes and times of the files, not content.

    A builtin source is named by the version of the software that carries it instead.
    """
    tree: dict[str, Any] = {}
    for source in map(_named, sources):
        files = [f for f in found.files if f.path == source or f.path.startswith(f"{source}/")]
        builtin = source in BUILTINS
        rows = [[f.inside, f.size, 0 if builtin else f.mtime_ns] for f in files]
        tree[source] = {
            "files": len(files),
            "bytes": sum(f.size for f in files),
            "digest": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        }
        if builtin:
            tree[source]["version"] = _builtin_version(source)
    return tree


def partition(files: Sequence[SourceFile], partition_bytes: int) -> list[list[SourceFile]]:
    """Cut files to units of work of about `partition_bytes`, in order of path.

    A file is never cut. The plan depends on the listing alone, so that the shards that follow from
    it do not depend on who works on them.
    """
    parts: list[list[SourceFile]] = []
    room = 0
    for file in sorted(files, key=lambda f: f.path):
        if not parts or file.size > room:
            parts.append([])
            room = partition_bytes
        parts[-1].append(file)
        room -= file.size
    return parts


def extension_of(path: str) -> str:
    name = PurePosixPath(path).name.lower()
    return PurePosixPath(name.removesuffix(".gz")).suffix


def _named(source: str) -> str:
    return source.rstrip("/") or source


def _list_source(source: str, payload: Payload) -> Listing:
    if source.startswith(BUILTIN):
        return _list_builtin(source, payload)
    if "://" in source:
        return _fitting(source, payload, _list_uri(source))
    return _fitting(source, payload, _list_local(source, Path(source).expanduser().absolute()))


def _list_builtin(source: str, payload: Payload) -> Listing:
    if source not in BUILTINS:
        raise SourceError(f"no source {source}: the builtin ones are {', '.join(BUILTINS)}")
    if BUILTINS[source] != payload:
        raise SourceError(
            f"{source} holds {BUILTINS[source]} documents and the recipe's family takes {payload}: "
            "give data.sources another source"
        )
    if source == DIGITS_SOURCE:
        return Listing((SourceFile(source, source, "", DIGITS_BYTES, 0, ""),))
    # Test suites are most of the bytes and little like the code that they test.
    tests = {"test", "tests", "idle_test"}
    outside = {"site-packages", "dist-packages", "__pycache__", *tests}
    found = _walk(source, Path(sysconfig.get_path("stdlib")), outside)
    files = [file for file in found.files if file.extension == ".py"]
    if not files:
        raise SourceError(f"{source}: this Python comes without the sources of its library")
    return Listing(tuple(files))


def _builtin_version(source: str) -> str:
    if source == DIGITS_SOURCE:
        return f"scikit-learn {metadata.version('scikit-learn')}"
    return f"python {platform.python_version()}"


def _fitting(source: str, payload: Payload, found: Listing) -> Listing:
    """Keep files that a reader is for; a file that was named itself is always tried."""
    known = TEXT_EXTENSIONS if payload == "text" else IMAGE_EXTENSIONS
    files: list[SourceFile] = []
    ignored = Counter(found.ignored)
    for file in found.files:
        if file.extension in known or file.path == source:
            files.append(file)
        else:
            ignored[file.extension or "no extension"] += 1
    if not files and not found.rejects:
        others = ", ".join(f"{n} {kind}" for kind, n in ignored.most_common(3))
        raise SourceError(
            f"data.sources: {source} holds no {payload} files"
            + (f" (only {others})" if others else "")
            + f": give files or folders of {', '.join(sorted(known)[:6])}, ..."
        )
    return Listing(tuple(files), found.rejects, ignored)


def _list_local(source: str, path: Path) -> Listing:
    if glob.has_magic(str(path)) and not path.exists():
        return _list_glob(source, path)
    if path.is_dir():
        return _walk(source, path)
    if not path.exists():
        raise SourceError(f"data.sources: {source} does not exist")
    return _local_files([(str(path), source, path.name)])


def _list_glob(source: str, pattern: Path) -> Listing:
    matches = [Path(match) for match in sorted(glob.glob(str(pattern), recursive=True))]
    files = [path for path in matches if not path.is_dir()]
    if not files:
        raise SourceError(f"data.sources: no file matches {source}")
    base = os.path.commonpath([path.parent for path in files])
    inside = [path.relative_to(base).as_posix() for path in files]
    return _local_files(
        [(str(p), f"{source}/{name}", name) for p, name in zip(files, inside, strict=True)]
    )


def _walk(source: str, top: Path, outside: Container[str] = ()) -> Listing:
    """Every file below a folder. Hidden ones are counted; linked folders are not entered, because
    links may form a circle.

    Args:
        outside: names of folders that do not belong to the source.
    """
    entries: list[tuple[str, str, str]] = []
    rejects: list[Reject] = []
    ignored: Counter[str] = Counter()
    unreadable: list[OSError] = []
    for folder, folders, names in os.walk(top, onerror=unreadable.append):
        inside = os.path.relpath(folder, top)
        prefix = "" if inside == "." else f"{inside}/"
        before = list(folders)
        visible = [n for n in folders if not n.startswith(".") and n not in outside]
        linked = [n for n in visible if os.path.islink(os.path.join(folder, n))]
        rejects += [
            Reject(_printable(f"{source}/{prefix}{name}"), None, "a link to a folder")
            for name in linked
        ]
        folders[:] = [name for name in visible if name not in linked]
        hidden = sum(name.startswith(".") for name in [*before, *names])
        ignored.update({"hidden": hidden} if hidden else {})
        entries += [
            (os.path.join(folder, name), f"{source}/{prefix}{name}", f"{prefix}{name}")
            for name in names
            if not name.startswith(".")
        ]
    rejects += [
        Reject(_printable(str(error.filename)), None, f"cannot be read: {_why(error)}")
        for error in unreadable
    ]
    found = _local_files(entries)
    return Listing(found.files, (*rejects, *found.rejects), ignored)


def _local_files(entries: Sequence[tuple[str, str, str]]) -> Listing:
    """Files by (location, shown path, path inside of the source)."""
    files: list[SourceFile] = []
    rejects: list[Reject] = []
    for location, shown, inside in entries:
        if shown != _printable(shown):
            rejects.append(Reject(_printable(shown), None, "its name is not UTF-8"))
            continue
        try:
            info = os.stat(location)
        except OSError as error:
            rejects.append(Reject(shown, None, _why(error)))
            continue
        if stat.S_ISREG(info.st_mode):
            files.append(SourceFile(shown, location, "", info.st_size, info.st_mtime_ns, inside))
        else:
            rejects.append(Reject(shown, None, "not a regular file"))
    return Listing(tuple(files), tuple(rejects))


def _list_uri(source: str) -> Listing:
    """Files of a URI: one object, everything below a prefix, or a pattern with `*`.

    `*` matches any characters, `/` among them.
    """
    root = source.split("*", 1)[0].rpartition("/")[0] if "*" in source else source
    try:
        filesystem, base = fs.FileSystem.from_uri(root)
        if isinstance(filesystem, fs.LocalFileSystem):
            return _list_local(source, Path(base + source[len(root) :]))
        return list_remote(source, root, filesystem, base.rstrip("/"))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(f"data.sources: {source} cannot be listed: {reason}") from None


def list_remote(source: str, root: str, filesystem: fs.FileSystem, base: str) -> Listing:
    """The listing of `base` in a filesystem that `root` opens.

    Raises:
        SourceError: if there is nothing.
    """
    here = filesystem.get_file_info(base)
    if here.type == fs.FileType.File:
        infos = [here]
    else:
        infos = filesystem.get_file_info(
            fs.FileSelector(base, allow_not_found=True, recursive=True)
        )
    pattern = base + source[len(root) :]
    files = []
    for info in sorted(infos, key=lambda info: info.path):
        if info.type != fs.FileType.File:
            continue
        if "*" in source and not fnmatchcase(info.path, pattern):
            continue
        inside = info.path[len(base) :].lstrip("/")
        shown = f"{source}/{inside}" if inside else source
        files.append(SourceFile(shown, info.path, root, info.size or 0, info.mtime_ns or 0, inside))
    if not files:
        raise SourceError(f"data.sources: there is nothing at {source}")
    return Listing(tuple(files))


def _printable(text: str) -> str:
    """File names are bytes; those that are not UTF-8 are shown with escapes."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__


# ------------------------------------------------------------------ reading


def read_texts(file: SourceFile, max_bytes: int) -> Iterator[RawText | Reject]:
    """The documents of one file: the lines of a .jsonl by their field `text`, else the whole file.

    Args:
        max_bytes: longest document that is read into memory.
    """
    try:
        with open_binary(file) as stream:
            if file.extension == ".jsonl":
                yield from _lines(file.path, stream, max_bytes)
            else:
                yield _whole(file.path, stream.read(max_bytes + 1), max_bytes)
    except FileNotFoundError:
        yield Reject(file.path, None, "it vanished after it was listed")
    except (EOFError, gzip.BadGzipFile, zlib.error):
        yield Reject(file.path, None, "damaged gzip data")
    except OSError as error:
        yield Reject(file.path, None, f"cannot be read: {_why(error)}")


@contextmanager
def open_binary(file: SourceFile) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed.

    Raises:
        OSError: if it cannot be opened or is no regular file any more.
    """
    with _open_local(file) if not file.root else _open_remote(file) as raw:
        if not file.compressed:
            yield raw
            return
        with gzip.open(raw) as stream:
            yield cast(IO[bytes], stream)


def _open_local(file: SourceFile) -> IO[bytes]:
    # Without O_NONBLOCK, a FIFO put in the file's place would be waited for for ever.
    stream = os.fdopen(os.open(file.location, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "not a regular file")
    return stream


def _open_remote(file: SourceFile) -> IO[bytes]:
    raw: Any = _filesystem(file.root).open_input_file(file.location)
    return io.BufferedReader(raw)


@functools.cache
def _filesystem(root: str) -> fs.FileSystem:
    return fs.FileSystem.from_uri(root)[0]


def _whole(path: str, raw: bytes, max_bytes: int) -> RawText | Reject:
    if len(raw) > max_bytes:
        return Reject(path, None, _too_long(max_bytes))
    text = _decode(raw)
    return RawText(None, text) if text is not None else Reject(path, None, _undecodable(raw))


def _lines(path: str, stream: IO[bytes], max_bytes: int) -> Iterator[RawText | Reject]:
    number = 0
    while line := stream.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            yield Reject(path, number, _too_long(max_bytes))
            while line and not line.endswith(b"\n"):
                line = stream.readline(max_bytes)
        elif line.strip():
            yield _json_line(path, number, line)


def _json_line(path: str, number: int, line: bytes) -> RawText | Reject:
    decoded = _decode(line)
    if decoded is None:
        return Reject(path, number, _undecodable(line))
    try:
        tree = json.loads(decoded)
    except RecursionError:
        return Reject(path, number, "JSON that is nested too deeply")
    except ValueError:
        return Reject(path, number, "not JSON")
    text = tree.get("text") if isinstance(tree, dict) else None
    if not isinstance(text, str):
        return Reject(path, number, "no field `text` that holds text")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Reject(path, number, "half a surrogate pair, which is not text")
    return RawText(number, text)


def _decode(raw: bytes) -> str | None:
    if b"\0" in raw:
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _undecodable(raw: bytes) -> str:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16, not UTF-8: convert it first"
    if b"\0" in raw:
        return "holds NUL bytes: not text"
    return "not UTF-8"


def _too_long(max_bytes: int) -> str:
    return f"a document over {max_bytes} bytes: longer than data.max_characters allows"
