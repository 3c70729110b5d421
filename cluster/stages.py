"""The stages: what each reads, what it makes, and the fingerprint that tells if it is stale."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from cluster.config import RunConfig
from cluster.config.base import Operational
from cluster.errors import ArtifactError, UsageError
from cluster.loading import section_classes
from cluster.storage import Artifact, Store


@dataclass(frozen=True)
class Stage:
    verb: str
    module: str
    """Imported only when the stage runs; has `run(config) -> StageResult`."""
    needs: str | None
    """Kind of the artifact it starts from; older ancestors are reached through its parents."""
    makes: str | None
    sections: tuple[str, ...]
    """Config keys that its result depends on."""
    help: str
    enabled_by: str | None = None
    """Key that must be true for `up` to run it beside others."""


STAGES: tuple[Stage, ...] = (
    Stage(
        "prepare",
        "pipelines.prepare",
        None,
        "corpus",
        ("family", "seed", "data"),
        "Clean, deduplicate, tokenise and pack raw data into a corpus.",
    ),
    Stage(
        "tune",
        "tune.search",
        "corpus",
        "study",
        ("family", "seed", "model", "train", "tune"),
        "Search for better settings over runs of pretrain.",
        enabled_by="tune.enabled",
    ),
    Stage(
        "pretrain",
        "pipelines.pretrain",
        "corpus",
        "checkpoint",
        ("family", "seed", "model", "train"),
        "Train a model on the corpus; continues where it was stopped.",
    ),
    Stage(
        "evaluate",
        "pipelines.evaluate",
        "checkpoint",
        "evaluation",
        ("evaluate",),
        "Measure the trained model on held-out data.",
    ),
    Stage(
        "publish",
        "pipelines.publish",
        "evaluation",
        "model",
        ("publish",),
        "Write the model in Hugging Face layout and register it.",
    ),
    Stage("serve", "serving.app", "model", None, ("serve",), "Answer over HTTP."),
)
BY_VERB: Mapping[str, Stage] = {stage.verb: stage for stage in STAGES}


@dataclass(frozen=True)
class StageResult:
    artifact: Artifact | None
    headline: str
    """The key figure, for a person."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    url: str | None = None
    stay: Callable[[], None] | None = None
    """Called inside the session when everything is done and shown: holds a service open."""


def source_of(stage: Stage, store: Store, config: RunConfig) -> Artifact | None:
    """The finished artifact that a stage starts from.

    Raises:
        UsageError: naming the stage to run first, where there is none.
    """
    if stage.needs is None:
        return None
    for artifact in reversed(store.versions(stage.needs, config.name)):
        if artifact.manifest.complete:
            return artifact
    before = next(s.verb for s in STAGES if s.makes == stage.needs)
    raise UsageError(
        f"{stage.verb} needs a finished {stage.needs} of {config.name} in {store.uri}: "
        f"run `heliostat {before}` first"
    )


def required(stage: str, store: Store, config: RunConfig) -> Artifact:
    """`source_of` for a stage that always has one."""
    artifact = source_of(BY_VERB[stage], store, config)
    assert artifact is not None
    return artifact


def parent(artifact: Artifact, kind: str) -> Artifact:
    """The nearest ancestor of a kind that an artifact was made from.

    Raises:
        ArtifactError: if there is none, or one on the way to it is gone.
    """
    generation = [artifact]
    while generation:
        identities = [identity for member in generation for identity in member.manifest.parents]
        for identity in identities:
            if identity.startswith(f"{kind}/"):
                return _of(artifact.store, identity)
        generation = [_of(artifact.store, identity) for identity in identities]
    raise ArtifactError(f"{artifact.id} was not made from any {kind}")


def _of(store: Store, identity: str) -> Artifact:
    kind, _, rest = identity.partition("/")
    name, _, version = rest.partition("@")
    return store.artifact(kind, name, int(version))


def relevant(stage: Stage, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that a stage's result depends on, dotted and flat."""
    operational = set(_operational(RunConfig))
    known = flat({section: tree.get(section) for section in stage.sections})
    return {key: value for key, value in known.items() if key not in operational}


def fingerprint(
    stage: Stage, config: RunConfig, source: Artifact | None, inputs: Mapping[str, Any]
) -> str:
    """SHA-256 over the relevant config, the artifact it starts from, and its outside inputs."""
    content = {
        "stage": stage.verb,
        "config": relevant(stage, resolved(config)),
        "source": source.id if source else None,
        "inputs": dict(inputs),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def resolved(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value."""
    return dict(_flat(tree))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _operational(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        if any(isinstance(mark, Operational) for mark in info.metadata):
            yield prefix + name
        for section in section_classes(info.annotation):
            yield from _operational(section, f"{prefix}{name}.")
