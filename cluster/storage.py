"""Artifacts: what one stage hands to the next. Every path is built here, or in the two modules
below: `artifact` reads a version, `staging` writes one.

    <root>/<kind>/<name>@<version>/        kind: corpus, checkpoint, evaluation, model
        manifest.json    kind, config, parents, files with sha256, metrics, code version
        COMMIT           sha256 of manifest.json, written last
        ...              the files

A directory without a valid COMMIT does not exist for any reader. Versions count committed
artifacts; what an interrupted writer left at the next version is swept away by the next one. The
root is any pyarrow filesystem: a local path, `s3://BUCKET/...`, `gs://BUCKET/...`.
"""

import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from pyarrow import fs

from cluster.artifact import Artifact
from cluster.durable import Hashing, chunks_of, durable, reason_of, storage_errors
from cluster.errors import ArtifactError, StorageError, StorageRootError
from cluster.manifest import COMMIT, MANIFEST, Damage, FileEntry, Manifest, damage_of, sha256
from cluster.staging import Staging

_DIRECTORY = re.compile(r"^(?P<name>[a-z0-9][a-z0-9._-]*)@(?P<version>[1-9][0-9]*)$")


def located(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a URI and the path in it. People write names as they read them; pyarrow
    takes what is not ASCII, and spaces, with per cent signs only.

    Raises:
        OSError, ValueError: if there is no such filesystem, or the URI is none.
    """
    spelled = re.sub(r"[^!-~]+", lambda match: quote(match[0]), uri)
    found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(spelled)
    return found


@dataclass(frozen=True)
class Store:
    """A storage root."""

    root: str

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        try:
            if "://" in self.root:
                filesystem, base = located(self.root)
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

    def artifact(self, kind: str, name: str, version: int) -> Artifact:
        """A committed artifact.

        Raises:
            ArtifactError: if it was never committed or its manifest was damaged.
        """
        artifact = self._read(kind, name, version)
        if artifact is None:
            raise ArtifactError(f"{kind}/{name}@{version} does not exist in {self.uri}")
        return artifact

    def versions(self, kind: str, name: str) -> list[Artifact]:
        """Committed artifacts of a name, oldest first; damaged ones are not among them."""
        found = [self._read(kind, name, version) for version in self._directories(kind, name)]
        return [artifact for artifact in found if artifact is not None]

    def latest(self, kind: str, name: str) -> Artifact | None:
        for version in reversed(self._directories(kind, name)):
            artifact = self._read(kind, name, version)
            if artifact is not None:
                return artifact
        return None

    def all(self, kind: str) -> list[Artifact]:
        """Every committed artifact of a kind, by name and version."""
        found = (
            self._read(kind, match["name"], int(match["version"]))
            for match in map(_DIRECTORY.match, self._listing(f"{self.base}/{kind}"))
            if match
        )
        return sorted((a for a in found if a is not None), key=lambda a: (a.name, a.version))

    def survey(self, kind: str, name: str) -> Iterator[Artifact | Damage]:
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

    def stage(self, kind: str, name: str, run: str = "", *, resume: bool = False) -> Staging:
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

    def delete(self, artifact: Artifact) -> None:
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

    def _read(self, kind: str, name: str, version: int) -> Artifact | None:
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


__all__ = ["Artifact", "Damage", "FileEntry", "Manifest", "Staging", "Store"]
