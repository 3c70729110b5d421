"""Artifacts: what one stage hands to the next. Every path is built here.

    <root>/<kind>/<name>@<version>/        kind: corpus, checkpoint, evaluation, model
        manifest.json    kind, config, parents, files with sha256, metrics, code version
        COMMIT           sha256 of manifest.json, written last
        ...              the files

A directory without a valid COMMIT does not exist for any reader. Versions count committed
artifacts; what an interrupted writer left at the next version is swept away by the next one. The
root is any pyarrow filesystem: a local path, `s3://BUCKET/...`, `gs://BUCKET/...`.
"""

import dataclasses
import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import fs

from cluster.durable import Hashing, chunks_of, durable, reason_of, storage_errors
from cluster.errors import ArtifactError, StorageError, StorageRootError
from cluster.holder import alive, myself
from cluster.manifest import (
    COMMIT,
    LOCK,
    MANIFEST,
    Damage,
    FileEntry,
    Manifest,
    damage_of,
    inside,
    sha256,
)
from cluster.version import code_version

_DIRECTORY = re.compile(r"^(?P<name>[a-z0-9][a-z0-9._-]*)@(?P<version>[1-9][0-9]*)$")


@dataclass(frozen=True)
class Store:
    """A storage root."""

    root: str

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        try:
            if "://" in self.root:
                filesystem, base = fs.FileSystem.from_uri(self.root)
                return filesystem, base.rstrip("/")
            return fs.LocalFileSystem(), str(Path(os.path.expanduser(self.root)).absolute())
        except (OSError, ValueError) as error:
            raise StorageRootError(f"storage.root {self.root} cannot be opened: {error}") from None

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        """Another node opens the same root anew, from its own environment and credentials."""
        return Store, (self.uri,)

    @property
    def filesystem(self) -> fs.FileSystem:
        return self._opened[0]

    @property
    def base(self) -> str:
        """The root as a path of its filesystem."""
        return self._opened[1]

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def uri(self) -> str:
        """The root in a form that opens the same on every node."""
        return self.base if self.is_local else self.root.rstrip("/")

    def uri_of(self, path: str) -> str:
        """URI of something below the root; a query in the root's own URI stays at the end."""
        address, mark, query = self.uri.partition("?")
        return f"{address.rstrip('/')}/{path}{mark}{query}"

    def check_writable(self) -> None:
        """Write and remove a small file.

        Raises:
            StorageRootError: if the root cannot be made or written.
        """
        probe = f"{self.base}/.probe-{uuid.uuid4().hex[:12]}"
        try:
            self.filesystem.create_dir(self.base, recursive=True)
            with self.filesystem.open_output_stream(probe) as stream:
                stream.write(b"ok")
            self.filesystem.delete_file(probe)
        except (OSError, ValueError) as error:
            raise StorageRootError(
                f"storage.root {self.root} cannot be written ({reason_of(error)}): "
                "give another with storage.root=PATH"
            ) from None

    def artifact(self, kind: str, name: str, version: int) -> "Artifact":
        """A committed artifact.

        Raises:
            ArtifactError: if it was never committed or its manifest was damaged.
        """
        artifact = self._read(kind, name, version)
        if artifact is None:
            raise ArtifactError(f"{kind}/{name}@{version} does not exist in {self.uri}")
        return artifact

    def versions(self, kind: str, name: str) -> list["Artifact"]:
        """Committed artifacts of a name, oldest first; damaged ones are not among them."""
        found = [self._read(kind, name, version) for version in self._directories(kind, name)]
        return [artifact for artifact in found if artifact is not None]

    def latest(self, kind: str, name: str) -> "Artifact | None":
        for version in reversed(self._directories(kind, name)):
            artifact = self._read(kind, name, version)
            if artifact is not None:
                return artifact
        return None

    def all(self, kind: str) -> list["Artifact"]:
        """Every committed artifact of a kind, by name and version."""
        found = (
            self._read(kind, match["name"], int(match["version"]))
            for match in map(_DIRECTORY.match, self._listing(f"{self.base}/{kind}"))
            if match
        )
        return sorted((a for a in found if a is not None), key=lambda a: (a.name, a.version))

    def survey(self, kind: str, name: str) -> "Iterator[Artifact | Damage]":
        """Every version that was begun, newest first, whatever became of it."""
        for version in reversed(self._directories(kind, name)):
            try:
                artifact = self._read(kind, name, version)
            except (ArtifactError, StorageError) as error:
                yield Damage(version, str(error), begun=True, committed=True, foreign=True)
                continue
            path = f"{self.base}/{kind}/{name}@{version}"
            yield artifact or damage_of(
                version, self.read(f"{path}/{COMMIT}"), self.read(f"{path}/{MANIFEST}")
            )

    def stage(self, kind: str, name: str, run: str = "", *, resume: bool = False) -> "Staging":
        """Begin the next version of an artifact; nothing exists for a reader until `commit`.

        Args:
            run: who writes; what a process of the same run began is swept away even if it lives.
            resume: keep instead what a process of the same run wrote that no longer lives.

        Raises:
            StorageError: if another live process is writing the same version.
        """
        taken = [
            found.version
            for found in self.survey(kind, name)
            if isinstance(found, Artifact) or found.foreign
        ]
        staging = Staging(self, kind, name, max(taken, default=0) + 1, run=run)
        staging.begin(resume)
        return staging

    def sweep(self, kind: str, name: str, version: int) -> None:
        """Remove what is left of a version that is no artifact."""
        Staging(self, kind, name, version).abandon()

    def delete(self, artifact: "Artifact") -> None:
        """Remove an artifact: its COMMIT first, so that a half-removed one does not exist."""
        with storage_errors(f"delete {artifact.id}"):
            self.filesystem.delete_file(f"{artifact.path}/{COMMIT}")
            self.filesystem.delete_dir(artifact.path)

    def _directories(self, kind: str, name: str) -> list[int]:
        matches = map(_DIRECTORY.match, self._listing(f"{self.base}/{kind}"))
        return sorted(int(m["version"]) for m in matches if m and m["name"] == name)

    def _listing(self, path: str) -> list[str]:
        with storage_errors(f"list {path}"):
            found = self.filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return [PurePosixPath(info.path).name for info in found]

    def _read(self, kind: str, name: str, version: int) -> "Artifact | None":
        path = f"{self.base}/{kind}/{name}@{version}"
        commit = self.read(f"{path}/{COMMIT}")
        raw = self.read(f"{path}/{MANIFEST}")
        if commit is None or raw is None or commit.decode(errors="replace") != sha256(raw):
            return None
        manifest = Manifest.decode(raw)
        artifact = Artifact(self, manifest)
        if artifact.path != path:
            raise ArtifactError(
                f"{path} was copied or renamed by hand, it holds {artifact.id}: remove it, or give "
                "it its own name back"
            )
        return artifact

    def write(self, path: str, produce: Callable[[Any], object]) -> Hashing:
        """Write a file by its path in the filesystem, whole or not at all.

        Args:
            produce: writes the content to the stream that it is given.

        Returns:
            Hash and size of what was written.
        """
        with storage_errors(f"write {path}"):
            opened = (
                durable(Path(path)) if self.is_local else self.filesystem.open_output_stream(path)
            )
            with opened as stream:
                hashing = Hashing(stream)
                try:
                    produce(hashing)
                except Exception as error:
                    raise (hashing.failure or error) from None
        return hashing

    def verified(self, path: str, entry: FileEntry) -> Iterator[bytes]:
        """Content of a file in chunks; raises after the last one if it is not what was written.

        Raises:
            ArtifactError: if it is missing, unreadable or damaged.
        """
        digest, size = hashlib.sha256(), 0
        try:
            with self.filesystem.open_input_stream(path) as stream:
                for chunk in chunks_of(stream):
                    digest.update(chunk)
                    size += len(chunk)
                    yield chunk
        except FileNotFoundError:
            raise ArtifactError(f"{entry.path} is missing") from None
        except OSError as error:
            raise ArtifactError(f"{entry.path}: {reason_of(error)}") from None
        if (digest.hexdigest(), size) != (entry.sha256, entry.bytes):
            raise ArtifactError(f"{entry.path} is damaged")

    def read(self, path: str) -> bytes | None:
        """Content of a file by its path in the filesystem; None where there is none."""
        try:
            with self.filesystem.open_input_stream(path) as stream:
                content: bytes = stream.read()
                return content
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot read {path}: {reason_of(error)}") from None


@dataclass(frozen=True)
class Artifact:
    """A committed artifact."""

    store: Store
    manifest: Manifest

    @property
    def kind(self) -> str:
        return self.manifest.kind

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> int:
        return self.manifest.version

    @property
    def id(self) -> str:
        """`kind/name@version`."""
        return f"{self.kind}/{self.name}@{self.version}"

    @property
    def path(self) -> str:
        """Its directory, as a path of the store's filesystem."""
        return f"{self.store.base}/{self.id}"

    @property
    def uri(self) -> str:
        return self.store.uri_of(self.id)

    def file(self, path: str) -> str:
        """Path in the store's filesystem of one of its files."""
        return f"{self.path}/{inside(path)}"

    def read_bytes(self, path: str) -> bytes:
        """Content of one file, verified against the manifest.

        Raises:
            ArtifactError: if the file is missing or differs from its hash.
        """
        entry = next((e for e in self.manifest.files if e.path == path), None)
        if entry is None:
            raise ArtifactError(f"{self.id} has no file {path}")
        raw = self.store.read(self.file(path))
        if raw is None or sha256(raw) != entry.sha256:
            raise ArtifactError(
                f"{self.id}: {path} {'is missing' if raw is None else 'is damaged'}"
            )
        return raw

    def read_json(self, path: str) -> Any:
        return json.loads(self.read_bytes(path))

    def digest(self) -> str:
        """SHA-256 of its manifest, which names every byte of it."""
        return sha256(self.store.read(f"{self.path}/{MANIFEST}") or b"")

    def verify(self) -> None:
        """Hash every file.

        Raises:
            ArtifactError: naming the first file that is missing or damaged.
        """
        for entry in self.manifest.files:
            for _ in self._verified(entry):
                pass

    def _verified(self, entry: FileEntry) -> Iterator[bytes]:
        try:
            yield from self.store.verified(self.file(entry.path), entry)
        except ArtifactError as error:
            raise ArtifactError(f"{self.id}: {error}") from None

    @contextmanager
    def local(self, prefix: str = "") -> Iterator[Path]:
        """Verified files below `prefix` in a private local folder; nothing else is in it.

        Files of a local store are links, so that what was never listed in the manifest is not
        found by those who look for files by pattern. Those of a remote one are copied.

        Raises:
            ArtifactError: if a file is missing or damaged.
        """
        if prefix and not self._only(prefix).manifest.files:
            raise ArtifactError(f"{self.id} has no files below {prefix}")
        with tempfile.TemporaryDirectory(prefix="heliostat-") as folder:
            for entry in self._only(prefix).manifest.files:
                target = Path(folder) / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                self._bring(entry, target)
            yield Path(folder) / prefix

    def _bring(self, entry: FileEntry, target: Path) -> None:
        if self.store.is_local:
            for _ in self._verified(entry):
                pass
            target.symlink_to(self.file(entry.path))
            return
        with target.open("wb") as stream:
            stream.writelines(self._verified(entry))

    def _only(self, prefix: str) -> "Artifact":
        files = tuple(e for e in self.manifest.files if e.path.startswith(prefix))
        return Artifact(self.store, dataclasses.replace(self.manifest, files=files))


@dataclass(frozen=True)
class Staging:
    """A version that is being written. Plain data: workers on other nodes write to it too."""

    store: Store
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
        parents: Iterable["Artifact"] = (),
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


__all__ = ["Artifact", "Damage", "FileEntry", "Manifest", "Staging", "Store"]
