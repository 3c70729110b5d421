"""The HTTP application over engines that follow a script, without Ray."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from serving.admission import Admission, OwnBooks
from serving.auth import Key, KeyRing, Quota
from serving.border import Access, Border
from serving.engines.base import Event, Finished, GenerationRequest, Started, Tokens
from serving.routes import Bounds, create_app
from serving.schema import Limits, ModelCard
from serving.service import Service
from tests.ports import free_port

CARDS = (
    ModelCard("gpt", "model/gpt@3", 1_700_000_000, "completions", 64, chat=True),
    ModelCard("digits", "model/digits@1", 1_700_000_000, "classify"),
)
Script = Callable[[Any], AsyncIterator[Event]]


class ScriptedGateway:
    """Answers with a script; knows how many answers were begun and left."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.open = 0
        self.asked: list[Any] = []

    def models(self) -> Sequence[ModelCard]:
        return CARDS

    async def submit(
        self, card: ModelCard, request: Any, *, whole: bool = False
    ) -> AsyncIterator[Event]:
        self.open += 1
        self.asked.append(request)
        try:
            async for event in self.script(request):
                yield event
        finally:
            self.open -= 1


async def speak(request: GenerationRequest) -> AsyncIterator[Event]:
    yield Started("model/gpt@3", 2, "你" if request.echo else "")
    for text in ("好", "", "，世界"):
        await asyncio.sleep(0)
        yield Tokens(text, (1,))
    yield Finished("stop", 3)


async def silence(request: GenerationRequest) -> AsyncIterator[Event]:
    yield Started("model/gpt@3", 2)
    yield Tokens("a", (1,))
    await asyncio.sleep(60)


def application(
    script: Script = speak,
    deadline: float = 5.0,
    keys: Sequence[Key] | None = None,
    quota: Quota = Quota(),  # noqa: B008 (frozen)
    bounds: Bounds = Bounds(),  # noqa: B008
) -> tuple[Border, ScriptedGateway]:
    gateway = ScriptedGateway(script)
    ring = KeyRing(lambda: None if keys is None else tuple(keys))
    ring.load()
    access = Access(ring, loopback=True)
    service = Service(gateway, Limits(32, 4), deadline)
    return create_app(service, access, Admission(OwnBooks(), quota), bounds), gateway


def call(app: Border, method: str, path: str, **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    return asyncio.run(once())


def complete(app: Border, headers: Any = None, **fields: Any) -> httpx.Response:
    body = {"model": "gpt", "prompt": "a"} | fields
    return call(app, "POST", "/v1/completions", json=body, headers=headers)


@contextmanager
def listening(app: Border) -> Iterator[str]:
    """The application on a port of this machine; its URL."""
    port = free_port()
    settings = uvicorn.Config(app, "127.0.0.1", port, log_level="error", lifespan="off")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
