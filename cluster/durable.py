"""Bytes on their way to storage: hashed as they pass, and on a local disk whole or not there."""

import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import StorageError

CHUNK = 1 << 22
"""Bytes held in memory at once while a file is copied or hashed."""


class Hashing:
    """A writable stream that hashes and counts what passes through it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.digest, self.size = hashlib.sha256(), 0
        self.failure: OSError | None = None
        """Why storage took no more; a writer above may have buried it under an error of its own."""

    def write(self, chunk: Any) -> int:
        try:
            self._stream.write(chunk)
        except OSError as error:
            self.failure = error
            raise
        self.digest.update(chunk)
        size = memoryview(chunk).nbytes
        self.size += size
        return size

    def writelines(self, chunks: Iterable[bytes]) -> None:
        for chunk in chunks:
            self.write(chunk)

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def durable(target: Path) -> Iterator[Any]:
    """Temporary name, fsync, rename, fsync of the folder: whole or not there after a power cut."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def chunks_of(stream: Any) -> Iterator[bytes]:
    while chunk := stream.read(CHUNK):
        yield chunk


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot {doing}: {reason_of(error)}") from None


def reason_of(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
