"""An artifact as its readers have it: files that are what was written, and what is said of them."""

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ArtifactError
from cluster.manifest import MANIFEST, FileEntry, Manifest, inside, sha256

if TYPE_CHECKING:
    from cluster.storage import Store


@dataclass(frozen=True)
class Artifact:
    """A committed artifact."""

    store: "Store"
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
