"""Bytes of a source file, decompressed within bounds, from wherever it lies.

What is wrong with a file comes out as `Unreadable`, whose text is a reason to show: it names no
content. Any other `OSError` is the storage's.
"""

import bz2
import functools
import gzip
import io
import lzma
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

import pyarrow as pa
from pyarrow import fs

from cluster.storage import located
from pipelines.data.sources.files import SourceFile

MAX_EXPANSION = 250
"""Times that a compressed file may grow. Text rarely shrinks to less than a twentieth, repetitive
logs to a hundredth; deflate reaches 1:1030 on zeros alone."""
FREE_EXPANSION = 64 << 20
"""Bytes that any file may become, whatever its ratio."""
XZ_MEMORY = 192 << 20
"""Largest dictionary that an .xz may ask for: `xz -9` takes 65 MiB, a hostile one 4 GiB."""
BUFFER = 1 << 18


class Unreadable(OSError):
    """A file that cannot be read, with the reason in words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def why(error: OSError) -> str:
    """One line for the quarantine."""
    if isinstance(error, Unreadable):
        return error.reason
    if isinstance(error, FileNotFoundError):
        return "it vanished after it was listed"
    return f"cannot be read: {error.strerror or type(error).__name__}"


@contextmanager
def open_binary(file: SourceFile) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed.

    Raises:
        Unreadable: from reading too, if it is no regular file any more, is damaged, or expands
            beyond all reason.
        OSError: if the storage fails.
    """
    with _open(file) as raw:
        if file.codec is None:
            yield raw
            return
        with io.BufferedReader(_Expanding(raw, file.codec), BUFFER) as stream:
            yield cast(IO[bytes], stream)


@contextmanager
def open_seekable(file: SourceFile) -> Iterator[Any]:
    """The decompressed file for random access, as pyarrow takes it: itself, or a copy in memory,
    and beyond `FREE_EXPANSION` in a file that has no name and ends with the process.

    Raises:
        As `open_binary`.
    """
    if file.codec is None and not is_http(file.root):
        with _open(file) as raw:
            yield raw
        return
    with open_binary(file) as stream, tempfile.SpooledTemporaryFile(FREE_EXPANSION) as copy:
        shutil.copyfileobj(stream, copy, BUFFER)
        copy.seek(0)
        yield copy


def is_http(root: str) -> bool:
    return root.startswith(("http://", "https://"))


def _open(file: SourceFile) -> IO[bytes]:
    if is_http(file.root):
        return _open_http(file.location)
    return _open_remote(file) if file.remote else _open_local(file)


def _open_local(file: SourceFile) -> IO[bytes]:
    # Without O_NONBLOCK, a FIFO put in the file's place would be waited for for ever.
    stream = os.fdopen(os.open(file.location, os.O_RDONLY | os.O_NONBLOCK), "rb")
    info = os.fstat(stream.fileno())
    if not stat.S_ISREG(info.st_mode):
        stream.close()
        raise Unreadable("not a regular file")
    if file.mtime_ns and (info.st_size, info.st_mtime_ns) != (file.size, file.mtime_ns):
        stream.close()
        raise Unreadable("it changed after it was listed: run again")
    return stream


def _open_remote(file: SourceFile) -> IO[bytes]:
    raw: Any = _filesystem(file.root).open_input_file(file.location)
    return io.BufferedReader(raw)


def _open_http(url: str) -> IO[bytes]:
    """A stream, because not every server can be asked for a part of a file."""
    return cast(IO[bytes], http_filesystem().open(url, "rb", block_size=0))


@functools.cache
def _filesystem(root: str) -> fs.FileSystem:
    return located(root)[0]


@functools.cache
def http_filesystem() -> Any:
    import fsspec

    return fsspec.filesystem("http")


# ------------------------------------------------------------------ decompression


class _Counted:
    """A stream that counts what is read from it."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self.taken, self.closed = raw, 0, False

    def read(self, size: int = -1) -> bytes:
        chunk = self._raw.read(size)
        self.taken += len(chunk)
        return chunk

    def close(self) -> None:
        """Whoever opened the stream closes it."""


class _Expanding(io.RawIOBase):
    """A decompressed stream that stops a bomb."""

    def __init__(self, raw: IO[bytes], codec: str) -> None:
        self._source, self._codec, self._given = _Counted(raw), codec, 0
        self._read = _reader(self._source, codec)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            chunk = self._read(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile):
            raise Unreadable(f"damaged {self._codec} data") from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise Unreadable(f"damaged {self._codec} data") from None
        self._given += len(chunk)
        if self._given > max(FREE_EXPANSION, MAX_EXPANSION * self._source.taken):
            raise Unreadable(
                f"a decompression bomb: {self._source.taken} bytes became {self._given}"
            )
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _reader(source: _Counted, codec: str) -> Callable[[int], bytes]:
    raw = cast(IO[bytes], source)
    if codec == "gzip":
        return gzip.GzipFile(fileobj=raw).read
    if codec == "bzip2":
        return bz2.BZ2File(raw).read
    if codec == "zstd":
        # Frames with a window over 128 MiB are refused.
        return cast(
            Callable[[int], bytes],
            pa.CompressedInputStream(pa.PythonFile(source, mode="r"), codec).read,
        )
    return _Xz(source).read


class _Xz:
    """`lzma.LZMAFile` with a limit on the memory that a file may ask for."""

    def __init__(self, source: _Counted) -> None:
        self._source = source
        self._decoder = self._next()
        self._begun = False

    @staticmethod
    def _next() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)

    def read(self, size: int) -> bytes:
        while True:
            fresh = b""
            if self._decoder.eof:
                rest = self._decoder.unused_data or self._source.read(BUFFER)
                fresh = rest.lstrip(b"\0")  # padding between streams
                if not rest:
                    return b""
                if not fresh:
                    continue
                self._decoder, self._begun = self._next(), True
            elif self._decoder.needs_input:
                fresh = self._source.read(BUFFER)
                if not fresh:
                    if not self._begun:
                        return b""
                    raise EOFError
                self._begun = True
            if chunk := self._decoder.decompress(fresh, size):
                return chunk
