"""Where `prepare` keeps what it has done so far: a folder inside of the version being written.

    scratch/part-00000.parquet       cleaned documents of a part
    scratch/rejects-00000.jsonl      rows of a partition that could not be read
    scratch/read-00000.json          a partition was read: what it has become, with hashes
    scratch/encode-00000.json        a part was encoded: the shards that it became, with hashes

A record is written last and whole, so that a run that was killed finds its finished work and
trusts none that is unfinished or damaged.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cluster.durable import Hashing, storage_errors
from cluster.errors import ArtifactError
from cluster.manifest import LOCK
from cluster.storage import FileEntry, Staging
from pipelines.data.corpus import part_name
from pipelines.data.sealing import Sealing

FOLDER = "scratch"


@dataclass(frozen=True)
class Scratch:
    """Plain data: every worker opens the same folder."""

    staging: Staging
    sealing: Sealing = Sealing()

    @property
    def path(self) -> str:
        return f"{self.staging.path}/{FOLDER}"

    def write_table(self, part: int, table: pa.Table, kind: str = "") -> FileEntry:
        """
        Args:
            kind: another table of the same part than its documents as they are encoded.

        Raises:
            StorageError: if storage does not take it.
        """
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **self.sealing.writing(self._place(part, kind)))
        return self.write(kind + part_name(part), sink.getvalue().to_pybytes())

    def read_table(
        self, part: int, columns: Sequence[str] | None = None, kind: str = ""
    ) -> pa.Table:
        """
        Raises:
            StorageError: if storage does not give it.
        """
        path = f"{self.path}/{kind}{part_name(part)}"
        with storage_errors(f"read {path}"):
            return pq.read_table(
                path,
                columns=columns,
                filesystem=self.staging.store.filesystem,
                **self.sealing.reading(self._place(part, kind)),
            )

    def _place(self, part: int, kind: str) -> str:
        return f"{self.staging.id}/{FOLDER}/{kind}{part_name(part)}"

    def write(self, name: str, content: bytes) -> FileEntry:
        """Not synced to disk: a record tells by its hash whether all of it arrived."""
        path, filesystem = f"{self.path}/{name}", self.staging.store.filesystem
        with storage_errors(f"write {path}"):
            filesystem.create_dir(self.path, recursive=True)
            with filesystem.open_output_stream(path) as stream:
                hashing = Hashing(stream)
                hashing.write(content)
        return FileEntry(f"{FOLDER}/{name}", hashing.digest.hexdigest(), hashing.size)

    def lines(self, name: str) -> Iterator[str]:
        """Lines of a text file; none where there is no such file."""
        raw = self.staging.store.read(f"{self.path}/{name}")
        yield from (raw or b"").decode().splitlines()

    def record(self, name: str, tree: dict[str, Any], files: Sequence[FileEntry]) -> None:
        """Note that a piece of work is finished."""
        listed = [asdict(entry) for entry in files]
        self.staging.write_json(f"{FOLDER}/{name}.json", {**tree, "files": listed})

    def recorded(self, name: str) -> dict[str, Any] | None:
        """What was noted by this run or an earlier one, if all of its files are still whole."""
        raw = self.staging.store.read(f"{self.path}/{name}.json")
        with suppress(ValueError, TypeError, KeyError, ArtifactError):
            tree: dict[str, Any] = json.loads(raw or b"")
            for entry in tree["files"]:
                for _ in self.staging.store.verified(
                    f"{self.staging.path}/{entry['path']}", FileEntry(**entry)
                ):
                    pass
            return tree
        return None

    def leave_only(self, files: Sequence[FileEntry]) -> None:
        """Remove this folder, and what an interrupted run left of files that were never whole."""
        staging, filesystem = self.staging, self.staging.store.filesystem
        kept = {f"{staging.path}/{entry.path}" for entry in files} | {f"{staging.path}/{LOCK}"}
        with storage_errors(f"tidy {staging.path}"):
            filesystem.delete_dir(self.path)
            for info in filesystem.get_file_info(fs.FileSelector(staging.path, recursive=True)):
                if info.type == fs.FileType.File and info.path not in kept:
                    filesystem.delete_file(info.path)
