"""What is said about an artifact in its `manifest.json`."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import ArtifactError

SCHEMA_VERSION = 1
MANIFEST, COMMIT, LOCK = "manifest.json", "COMMIT", "WRITER"


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: path inside it, content hash, size in bytes."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    kind: str
    name: str
    version: int
    created: str
    code_version: str
    fingerprint: str
    config: Mapping[str, Any]
    parents: tuple[str, ...]
    files: tuple[FileEntry, ...]
    metrics: Mapping[str, float]
    detail: Mapping[str, Any]
    complete: bool = True
    """False for a resting point that the same stage continues from."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """What came from outside of the store, such as the listing of the raw sources."""
    schema_version: int = SCHEMA_VERSION

    def encode(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False).encode()

    @staticmethod
    def decode(raw: bytes) -> "Manifest":
        tree = json.loads(raw)
        if tree.get("schema_version", 0) > SCHEMA_VERSION:
            raise ArtifactError(
                f"artifact format {tree['schema_version']} is newer than this Heliostat reads "
                f"({SCHEMA_VERSION}): update Heliostat"
            )
        try:
            files = tuple(FileEntry(**entry) for entry in tree.pop("files"))
            manifest = Manifest(files=files, parents=tuple(tree.pop("parents")), **tree)
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"not a manifest that Heliostat wrote: {error}") from None
        for entry in files:
            inside(entry.path)
        return manifest


@dataclass(frozen=True)
class Damage:
    """A version that is there and is no artifact."""

    version: int
    reason: str
    begun: bool
    """Its manifest or COMMIT is there: it was, or was about to be, an artifact."""
    committed: bool
    """It has a COMMIT: it was an artifact once."""
    foreign: bool = False
    """It holds something that this program must not sweep away."""
    detail: Mapping[str, Any] | None = None
    """What its manifest still says, unverified; None where that cannot be read."""


def damage_of(version: int, commit: bytes | None, raw: bytes | None) -> Damage:
    """What is wrong with a version whose COMMIT and manifest do not make an artifact."""
    reason = (
        "it was never committed, or its COMMIT was removed"
        if commit is None
        else "its manifest is missing"
        if raw is None
        else "its COMMIT does not fit its manifest"
    )
    try:
        detail = json.loads(raw or b"")["detail"]
    except (ValueError, TypeError, KeyError):
        detail = None
    begun = commit is not None or raw is not None
    return Damage(version, reason, begun, commit is not None, detail=detail)


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def inside(path: str) -> str:
    """Refuse paths that would leave the artifact's directory."""
    parts = path.split("/")
    if {"", ".", ".."} & set(parts) or "\0" in path or parts[0] in {MANIFEST, COMMIT, LOCK}:
        raise ArtifactError(f"{path!r} is not a path inside an artifact")
    return path
