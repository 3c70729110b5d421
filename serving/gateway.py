"""The way to the engines through Serve's handles, with a second try where a replica was lost."""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from grpc.aio import AioRpcError
from ray.exceptions import RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)

from serving.engines.base import OVERLOADED, Event, Failed, Request, Started, is_last
from serving.schema import ModelCard

LOST = (RayActorError, ReplicaUnavailableError, AioRpcError)
CUT_SHORT = "Unexpected error (StatusCode."
"""How Serve begins the message of a call whose replica died between connecting and accepting."""
UNAVAILABLE = Failed(503, "the model is not available", "unavailable", retry_after=1)
REPLICA_LOST = Failed(503, "the model's replica was lost", "replica_lost", retry_after=1)
PAUSE = 0.05
"""Seconds before the first second try; doubled, up to a second, for the ones after it."""


class HandleGateway:
    """Engines behind Serve's deployment handles, one per model.

    Args:
        handles: deployment name -> handle.
    """

    def __init__(self, handles: Mapping[str, Any]) -> None:
        self._handles = {name: handle.options(stream=True) for name, handle in handles.items()}
        self._cards: tuple[ModelCard, ...] = ()

    def show(self, cards: Sequence[ModelCard]) -> None:
        self._cards = tuple(cards)

    def models(self) -> Sequence[ModelCard]:
        return self._cards

    async def submit(
        self, card: ModelCard, request: Request, *, whole: bool = False
    ) -> AsyncIterator[Event]:
        """Until the caller's deadline, a request whose replica dies begins again on another one:
        where `whole`, at any time; otherwise until there was a token to show."""
        handle = self._handles[card.deployment or card.id]
        pause, tries = PAUSE, 0
        while True:
            # A replica that is only out of reach may still hold the first one.
            again = replace(request, id=f"{request.id}-{tries}") if tries else request
            shown, held = False, list[Event]()
            async with aclosing(_attempt(handle, again)) as events:  # type: ignore[type-var]
                async for event in events:
                    held.append(event)
                    # A start alone promises nothing that another replica could not keep.
                    done = is_last(event) and event is not REPLICA_LOST
                    if done or shown or not (whole or isinstance(event, Started | Failed)):
                        for one in held:
                            yield one
                        shown, held = True, []
            if shown:
                return
            tries += 1
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, 1.0)


async def _attempt(handle: Any, request: Request) -> AsyncIterator[Event]:
    """The events of one try; the last one is `REPLICA_LOST` where its replica died."""
    groups = handle.submit.remote(request)
    ended = False
    try:
        async for group in groups:
            for event in group:
                ended = is_last(event)
                yield event
        ended = True
    except BackPressureError:
        ended = True
        yield OVERLOADED
    except DeploymentUnavailableError:
        ended = True
        yield UNAVAILABLE
    except LOST:
        ended = True
        yield REPLICA_LOST
    except RuntimeError as error:
        if not str(error).startswith(CUT_SHORT):
            raise
        ended = True
        yield REPLICA_LOST
    finally:
        if not ended:
            groups.cancel()
