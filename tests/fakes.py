"""Tiny real objects that tests put where heavy ones would stand."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

from cluster import loading
from cluster.config import RunConfig
from cluster.errors import PortError, TrainingError
from cluster.session import open_store
from cluster.stages import STAGES, Stage, StageResult, fingerprint, resolved, source_of
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


@dataclass
class Stages:
    """Stage modules without training: each commits the artifact that the real one would."""

    calls: list[str] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=lambda: {"source": "one"})
    """What prepare sees outside of the store."""
    interrupted: set[str] = field(default_factory=set)
    """Stages that commit a resting point and then fail, once."""
    stay: Callable[[], None] | None = None
    """What holds the service open."""
    figure: float = 1.0
    overrides: dict[str, Any] = field(default_factory=dict)
    """What the search finds."""
    refused: str | None = None
    """Why serve's check refuses; None where it does not."""

    def modules(self) -> dict[str, ModuleType]:
        made = {stage.module: ModuleType(stage.module) for stage in STAGES}
        for stage in STAGES:
            made[stage.module].__dict__["run"] = partial(self._run, stage)
        made["pipelines.prepare"].__dict__["inputs"] = lambda config: dict(self.inputs)
        made["serving.app"].__dict__["check"] = self._check
        return made

    def _check(self, config: RunConfig) -> None:
        if self.refused:
            raise PortError(self.refused)

    def _run(self, stage: Stage, config: RunConfig) -> StageResult:
        self.calls.append(stage.verb)
        if stage.makes is None:
            return StageResult(None, "answers", url="http://127.0.0.1:8000", stay=self.stay)
        store = open_store(config)
        source = source_of(stage, store, config)
        inputs = dict(self.inputs) if source is None else {}
        resting = stage.verb in self.interrupted
        artifact = commit(
            store,
            stage.makes,
            config.name,
            parents=[source] if source else [],
            config=resolved(config),
            fingerprint=fingerprint(stage, config, source, inputs),
            metrics={"figure": self.figure},
            detail={"overrides": dict(self.overrides)},
            complete=not resting,
        )
        if resting:
            self.interrupted.discard(stage.verb)
            raise TrainingError("lost its workers")
        return StageResult(artifact, f"{stage.verb} went well", {"figure": self.figure})
