"""The engine deployment: a published model, loaded by version, behind its family's engine."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing

import ray.serve

from cluster.storage import Artifact, Store
from pipelines import families
from serving.engines.base import Engine, Event, Request


@ray.serve.deployment
class ModelReplica:
    """
    Args:
        store: uri of the storage root.
        engine: `slots`, `max_waiting`, `threads`.
    """

    def __init__(self, store: str, engine: Mapping[str, int]) -> None:
        self._store = Store(store)
        self._options = dict(engine)
        self._engine: Engine | None = None

    async def reconfigure(self, user_config: Mapping[str, str]) -> None:
        """Load `model/NAME@VERSION`; requests that run on the one before finish on it."""
        kind, _, rest = user_config["model"].partition("/")
        name, _, version = rest.partition("@")
        artifact = self._store.artifact(kind, name, int(version))
        loaded = await asyncio.to_thread(load_engine, artifact, self._options)
        before, self._engine = self._engine, loaded
        if before is not None:
            before.close()

    async def submit(self, request: Request) -> AsyncIterator[Event]:
        assert self._engine is not None  # Serve configures a replica before it gets requests
        async with aclosing(self._engine.submit(request)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

    async def stats(self) -> dict[str, int]:
        assert self._engine is not None
        now = self._engine.stats()
        return {"running": now.running, "waiting": now.waiting}

    def check_health(self) -> None:
        if self._engine is not None:
            self._engine.check()


def load_engine(artifact: Artifact, options: Mapping[str, int]) -> Engine:
    """Open a published model, verified, with the engine that its family's route asks for.

    Args:
        options: `slots` (requests at once), `max_waiting`, `threads`.

    Raises:
        ArtifactError: if a file is missing or damaged.
    """
    import torch

    from serving.engines.generation import CausalRunner, GenerationEngine
    from serving.engines.prediction import PredictionEngine

    torch.set_num_threads(options["threads"])
    family = families.load(artifact.manifest.detail["family"])
    slots, waiting = options["slots"], options["max_waiting"]
    with artifact.local() as folder:
        if family.route == "completions":
            runner = CausalRunner(folder, int(artifact.manifest.detail["context_length"]))
            return GenerationEngine(artifact.id, runner, slots=slots, max_waiting=waiting)
        predictor = family.predictor(folder)
        return PredictionEngine(artifact.id, predictor, max_batch=slots, max_waiting=waiting)
