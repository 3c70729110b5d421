"""The engine deployment: a published model, loaded by version, behind its family's engine."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

import ray.serve

from cluster.storage import Artifact, Store
from pipelines import families
from serving.engines.base import Engine, Event, GenerationRequest, Request, Stats
from serving.scaling import QUEUED_TOKENS
from serving.seen import Meter


@ray.serve.deployment
class ModelReplica:
    """
    Args:
        store: uri of the storage root.
        engine: see `engines.loading.Options`.
    """

    def __init__(self, store: str, engine: Mapping[str, Any]) -> None:
        self._store = Store(store)
        self._options = dict(engine)
        self._engine: Engine | None = None
        self._meter: Meter | None = None

    async def reconfigure(self, user_config: Mapping[str, str]) -> None:
        """Load `model/NAME@VERSION`; requests that run on the one before finish on it."""
        kind, _, rest = user_config["model"].partition("/")
        name, _, version = rest.partition("@")
        artifact = self._store.artifact(kind, name, int(version))
        loaded = await asyncio.to_thread(load_engine, artifact, self._options)
        before, self._engine = self._engine, loaded
        if self._meter is not None:
            self._meter.close()
        self._meter = Meter(name, version, loaded.stats)
        if before is not None:
            before.close()

    async def submit(self, request: Request) -> AsyncIterator[tuple[Event, ...]]:
        """Events in groups, because each group is a message: all at once where nobody looks before
        the last one."""
        assert self._engine is not None and self._meter is not None  # configured before requests
        watched = self._meter.watched(self._engine.submit(request))
        async with aclosing(watched) as events:  # type: ignore[type-var]
            if isinstance(request, GenerationRequest) and not request.whole:
                async for event in events:
                    yield (event,)
            else:
                yield tuple([event async for event in events])

    async def stats(self) -> Stats:
        assert self._engine is not None
        return self._engine.stats()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve's autoscaling: see `scaling.ByLoad`."""
        return {QUEUED_TOKENS: 0 if self._engine is None else self._engine.stats().queued_tokens}

    def check_health(self) -> None:
        if self._engine is not None:
            self._engine.check()


def load_engine(artifact: Artifact, options: Mapping[str, Any]) -> Engine:
    """Open a published model, verified, with the engine that its family's route asks for.

    Args:
        options: see `engines.loading.Options`.

    Raises:
        ArtifactError: if a file is missing or damaged.
        ServingError: if the model does not answer as it did when it was published.
    """
    from serving.engines.loading import Options, apart, open_generation
    from serving.engines.prediction import PredictionEngine

    detail = artifact.manifest.detail
    family = families.load(detail["family"])
    asked = Options(**options)
    with artifact.local() as folder:
        if family.route == "completions":
            return open_generation(
                artifact.id,
                folder,
                asked,
                context_length=int(detail["context_length"]),
                records=detail.get("prompts", ()),
            )
        return PredictionEngine(
            artifact.id,
            apart(asked.threads, lambda: family.predictor(folder)),
            max_batch=asked.slots,
            max_waiting=asked.max_waiting,
        )
