"""Tiny real objects that tests put where heavy ones would stand."""

from collections.abc import Iterable, Mapping
from typing import Any

from cluster import loading
from cluster.config import RunConfig
from cluster.storage import Artifact, Store


def config(recipe: str = "gpt-demo", *overrides: str, root: object = None) -> RunConfig:
    """A resolved config, with its storage root somewhere harmless."""
    place = [f"storage.root={root}"] if root is not None else []
    return loading.load(recipe, [*place, *overrides])


def commit(
    store: Store,
    kind: str = "corpus",
    name: str = "demo",
    files: Mapping[str, bytes] | None = None,
    parents: Iterable[Artifact] = (),
    **manifest: Any,
) -> Artifact:
    """A committed artifact with the given files."""
    staging = store.stage(kind, name)
    entries = [staging.write(p, c) for p, c in (files or {"a.bin": b"content"}).items()]
    manifest = {"fingerprint": "f", "config": {}} | manifest
    return staging.commit(entries, parents=parents, **manifest)
