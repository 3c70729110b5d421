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
SILENCE = 60
"""Seconds without a byte after which a server is given up."""
CHANGED = "it changed after it was listed: run again"


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
            beyond all reason; at the end, if it is not the file any more that was listed.
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


@contextmanager
def _open(file: SourceFile) -> Iterator[IO[bytes]]:
    if is_http(file.root):
        with _open_http(file) as raw:
            yield raw
        return
    with _open_remote(file) if file.remote else _open_local(file) as raw:
        yield raw
        # A file that lost its end meanwhile looks like one that ends there.
        if _changed_remote(file) if file.remote else _changed(file, raw):
            raise Unreadable("it changed while it was read: run again")


def _open_local(file: SourceFile) -> IO[bytes]:
    # Without O_NONBLOCK, a FIFO put in the file's place would be waited for for ever.
    stream = os.fdopen(os.open(file.location, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise Unreadable("not a regular file")
    if _changed(file, stream):
        stream.close()
        raise Unreadable(CHANGED)
    return stream


def _changed(file: SourceFile, stream: IO[bytes]) -> bool:
    info = os.fstat(stream.fileno())
    return bool(file.mtime_ns) and (info.st_size, info.st_mtime_ns) != (file.size, file.mtime_ns)


def _open_remote(file: SourceFile) -> IO[bytes]:
    raw: Any = _filesystem(file.root).open_input_file(file.location)
    if raw.size() != file.size:
        raw.close()
        raise Unreadable(CHANGED)
    return io.BufferedReader(raw)


def _changed_remote(file: SourceFile) -> bool:
    """Sizes only: of one object, S3 tells times in other units when it lists it."""
    info = _filesystem(file.root).get_file_info(file.location)
    return info.size is not None and info.size != file.size


@functools.cache
def _filesystem(root: str) -> fs.FileSystem:
    return located(root)[0]


# ------------------------------------------------------------------ HTTP


def is_http(root: str) -> bool:
    return root.startswith(("http://", "https://"))


@functools.cache
def http_filesystem() -> Any:
    import aiohttp
    import fsspec

    # aiohttp would end every answer after five minutes, however well it comes.
    patience = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    return fsspec.filesystem("http", client_kwargs={"timeout": patience})


def _open_http(file: SourceFile) -> IO[bytes]:
    return io.BufferedReader(_Body(file), BUFFER)


class _Body(io.RawIOBase):
    """What a server sends: a stream, because not every server can be asked for a part of a file."""

    def __init__(self, file: SourceFile) -> None:
        self._size, self._taken = file.size, 0
        # Compressed on the way, it would have another size. A size of any kind spares a request.
        asked = {"headers": {"Accept-Encoding": "identity"}, "size": 1}
        with _told_in_words():
            self._stream = http_filesystem().open(file.location, "rb", block_size=0, **asked)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _told_in_words():
            chunk = self._stream.read(len(buffer))
        buffer[: len(chunk)] = chunk
        self._taken += len(chunk)
        if not chunk and self._size and self._taken != self._size:
            raise Unreadable(f"the server sent {self._taken} of {self._size} bytes")
        return len(chunk)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_stream"):
            self._stream.close()
        super().close()


@contextmanager
def _told_in_words() -> Iterator[None]:
    """Errors of HTTP, most of which are no `OSError`."""
    import aiohttp

    try:
        yield
    except aiohttp.ClientResponseError as error:
        raise Unreadable(f"the server answers {error.status}") from None
    except TimeoutError:
        raise Unreadable(f"the server was silent for {SILENCE} s") from None
    except aiohttp.ClientError as error:
        raise Unreadable(f"the connection broke ({type(error).__name__})") from None


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
        except Unreadable:
            raise
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
