"""A version that is being written: nothing for a reader until its COMMIT, which comes last."""

import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow import fs

from cluster.artifact import Artifact
from cluster.durable import chunks_of, storage_errors
from cluster.errors import ArtifactError, StorageError
from cluster.holder import alive, myself
from cluster.manifest import COMMIT, LOCK, MANIFEST, FileEntry, Manifest, inside, sha256
from cluster.version import code_version

if TYPE_CHECKING:
    from cluster.storage import Store


@dataclass(frozen=True)
class Staging:
    """A version that is being written. Plain data: workers on other nodes write to it too."""

    store: "Store"
    kind: str
    name: str
    version: int
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tells this writing from every other one of the same version."""
    run: str = ""

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.name}@{self.version}"

    @property
    def path(self) -> str:
        return f"{self.store.base}/{self.id}"

    def begin(self, resume: bool = False) -> None:
        if self.store._read(self.kind, self.name, self.version) is not None:
            raise StorageError(f"{self.id} was just written by another run: run again")
        holder, _, run = self._holder()
        ours = run == self.run != ""
        if alive(holder) and (resume or not ours):
            raise StorageError(
                f"{self.id} is being written by process {holder}: wait for it, or give this run "
                "another name"
            )
        if not (resume and ours):
            self.abandon()
        lines = (myself(), self.token, self.run)
        self._write(LOCK, lambda stream: stream.write("\n".join(lines).encode()))

    def _holder(self) -> tuple[str, str, str]:
        """`host:pid`, token and run of who is writing this version; empty for nobody."""
        raw = (self.store.read(f"{self.path}/{LOCK}") or b"").decode(errors="replace")
        holder, token, run, *_ = [*raw.split("\n"), "", "", ""]
        return holder, token, run

    def write(self, path: str, content: bytes) -> FileEntry:
        return self._write(inside(path), lambda stream: stream.write(content))

    def write_json(self, path: str, tree: Any) -> FileEntry:
        return self.write(path, json.dumps(tree, indent=1, ensure_ascii=False).encode())

    def write_with(self, path: str, produce: Callable[[Any], object]) -> FileEntry:
        """Write whatever `produce` writes to the stream that it is given."""
        return self._write(inside(path), produce)

    def copy(self, source: Path, path: str) -> FileEntry:
        """Copy a local file in."""
        with source.open("rb") as stream:
            chunks = chunks_of(stream)
            return self._write(inside(path), lambda out: out.writelines(chunks))

    def copy_tree(self, folder: Path, prefix: str = "") -> list[FileEntry]:
        """Copy a local folder in, in order of path."""
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return [self.copy(p, f"{prefix}{p.relative_to(folder).as_posix()}") for p in files]

    def commit(
        self,
        files: Iterable[FileEntry],
        *,
        fingerprint: str,
        config: Mapping[str, Any],
        parents: Iterable[Artifact] = (),
        metrics: Mapping[str, float] | None = None,
        detail: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        complete: bool = True,
    ) -> Artifact:
        """Write the manifest, then COMMIT: from here on the artifact exists.

        Raises:
            StorageError: if it cannot be written, or another writer has taken the version over.
        """
        if self._holder()[1] != self.token:
            raise StorageError(f"{self.id} was taken over by another writer: nothing committed")
        manifest = Manifest(
            kind=self.kind,
            name=self.name,
            version=self.version,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            code_version=code_version(),
            fingerprint=fingerprint,
            config=config,
            parents=tuple(parent.id for parent in parents),
            files=tuple(sorted(files, key=lambda entry: entry.path)),
            metrics=dict(metrics or {}),
            detail=dict(detail or {}),
            inputs=dict(inputs or {}),
            complete=complete,
        )
        raw = manifest.encode()
        self._write(MANIFEST, lambda stream: stream.write(raw))
        self._write(COMMIT, lambda stream: stream.write(sha256(raw).encode()))
        with storage_errors(f"commit {self.id}"):
            self.store.filesystem.delete_file(f"{self.path}/{LOCK}")
        return Artifact(self.store, manifest)

    def check(self, entry: FileEntry) -> None:
        """Read a file back.

        Raises:
            StorageError: if storage does not give what was written to it.
        """
        try:
            for _ in self.store.verified(f"{self.path}/{entry.path}", entry):
                pass
        except ArtifactError as error:
            raise StorageError(f"{self.id}, read back after writing: {error}") from None

    def abandon(self) -> None:
        """Remove what was written; safe to call twice."""
        with storage_errors(f"remove {self.path}"):
            files = self.store.filesystem
            if files.get_file_info(f"{self.path}/{COMMIT}").type == fs.FileType.File:
                files.delete_file(f"{self.path}/{COMMIT}")
            if files.get_file_info(self.path).type != fs.FileType.NotFound:
                files.delete_dir(self.path)

    def _write(self, path: str, produce: Callable[[Any], object]) -> FileEntry:
        hashing = self.store.write(f"{self.path}/{path}", produce)
        return FileEntry(path, hashing.digest.hexdigest(), hashing.size)
