"""Which models a service answers with: names, versions and aliases, resolved to versions."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cluster.config import RunConfig
from cluster.errors import UsageError
from cluster.registry import Registry, registry_uri
from cluster.stages import required
from cluster.storage import Artifact, Store
from pipelines import families
from serving.schema import ModelCard

TEMPLATE = "chat_template.jinja"
TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True)
class Served:
    artifact: Artifact
    card: ModelCard


def chosen(config: RunConfig, store: Store) -> list[Served]:
    """The models of `serve.models`, or the recipe's newest.

    Raises:
        UsageError: naming what is not there, and what is.
        HeliostatError: if the registry is needed for an alias and cannot be reached.
    """
    specs = config.serve.models
    if not specs:
        artifact = required("serve", store, config)
        return [Served(artifact, card(artifact, artifact.name))]
    if len(set(specs)) < len(specs):
        raise UsageError(f"serve.models {', '.join(specs)}: name each model once")
    names = Counter(spec.partition("@")[0] for spec in specs)
    found = []
    for spec in specs:
        name = spec.partition("@")[0]
        # Requests say the plain name, unless several models in service have it.
        identity = name if names[name] == 1 else spec
        artifact = resolve(spec, config, store)
        found.append(Served(artifact, card(artifact, identity)))
    return found


def resolve(spec: str, config: RunConfig, store: Store) -> Artifact:
    """
    Args:
        spec: `NAME`, `NAME@VERSION` or `NAME@ALIAS`.

    Raises:
        UsageError: if there is no such model.
    """
    name, _, which = spec.partition("@")
    versions = [a for a in store.versions("model", name) if a.manifest.complete]
    if not versions:
        known = sorted({artifact.name for artifact in store.all("model")})
        raise UsageError(f"serve.models: no model {name!r} in {store.uri}: it has {_listed(known)}")
    if not which:
        return versions[-1]
    if which.isdigit():
        found = next((a for a in versions if a.version == int(which)), None)
    else:
        identity = Registry(registry_uri(store, config)).resolve(name, which)
        found = next((a for a in versions if a.id == identity), None)
    if found is None:
        known = [f"{a.name}@{a.version}" for a in versions]
        kind = "version" if which.isdigit() else "alias"
        raise UsageError(f"serve.models: {name} has no {kind} {which}: there is {_listed(known)}")
    return found


def card(artifact: Artifact, identity: str) -> ModelCard:
    manifest = artifact.manifest
    return ModelCard(
        id=identity,
        artifact=artifact.id,
        created=int(datetime.fromisoformat(manifest.created).timestamp()),
        route=families.load(manifest.detail["family"]).route,
        context_length=manifest.detail.get("context_length"),
        chat=_has_template(artifact),
    )


def _has_template(artifact: Artifact) -> bool:
    files = {entry.path for entry in artifact.manifest.files}
    if TEMPLATE in files:
        return True
    return TOKENIZER in files and bool(
        json.loads(artifact.read_bytes(TOKENIZER)).get("chat_template")
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) or "none"
