"""HTTP in: schema, limits, deadline, and OpenAI's error shape. No torch, no model.

`create_app` makes the whole application over a `Gateway`, so that it runs without Ray too; the
`Ingress` deployment at the end puts Serve's handles behind it.
"""

import asyncio
import base64
import hashlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Protocol

import ray.serve
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from serving.engines.base import (
    OVERLOADED,
    Event,
    Failed,
    GenerationRequest,
    Predicted,
    PredictionRequest,
    Started,
)
from serving.engines.base import Request as EngineRequest
from serving.schema import (
    MAX_BODY_BYTES,
    Completion,
    Limits,
    ModelCard,
    RequestError,
    classification_body,
    parse_classification,
    parse_completion,
)
from serving.stream import Tally, accepted, chained, collect, merge, server_sent, within

REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
MODEL_HEADER = "x-model-id"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gateway(Protocol):
    """The way from HTTP to the engines."""

    def models(self) -> Sequence[ModelCard]: ...

    def submit(self, card: ModelCard, request: EngineRequest) -> AsyncIterator[Event]: ...


@dataclass(frozen=True)
class Service:
    """What the routes share."""

    gateway: Gateway
    limits: Limits
    deadline_seconds: float

    def card(self, name: str, route: str | None = None) -> ModelCard:
        """
        Raises:
            RequestError: 404 for a model that is not served, 400 for one of another route.
        """
        cards = self.gateway.models()
        found = next((c for c in cards if name in (c.id, c.artifact.partition("/")[2])), None)
        if found is None:
            served = ", ".join(c.id for c in cards) or "none"
            raise RequestError(
                404,
                f"The model {name[:80]!r} does not exist: this service has {served}",
                param="model",
                code="model_not_found",
            )
        if route not in (None, found.route):
            raise RequestError(
                400, f"{found.id} answers POST /v1/{found.route}, not {route}", param="model"
            )
        return found

    def ends(self) -> float:
        """When a request that begins now must be answered, by the loop's clock."""
        return asyncio.get_running_loop().time() + self.deadline_seconds

    async def complete(self, raw: bytes, identity: str) -> Response:
        ends = self.ends()
        asked = parse_completion(raw, self.limits)
        card = self.card(asked.model, "completions")
        requests = sequences(asked, identity)
        tally = Tally(f"cmpl-{identity}", int(time.time()), asked.model)
        events = within(ends, merge([self.gateway.submit(card, r) for r in requests]))
        first = await accepted(events, len(requests))
        headers = {MODEL_HEADER: _artifact(first)}
        following = chained(first, events)
        if not asked.stream:
            return JSONResponse(await collect(tally, following, asked.n), headers=headers)
        sent = server_sent(tally, following, asked.n, include_usage=asked.include_usage)
        return StreamingResponse(
            sent,
            media_type="text/event-stream",
            # Proxies on the way must not wait for more.
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
        )

    async def classify(self, raw: bytes, identity: str) -> Response:
        ends = self.ends()
        asked = parse_classification(raw, self.limits)
        card = self.card(asked.model, "classify")
        request = PredictionRequest(identity, asked.inputs)
        async with aclosing(within(ends, merge([self.gateway.submit(card, request)]))) as events:  # type: ignore[type-var]
            async for _, event in events:
                if isinstance(event, Failed):
                    raise RequestError.of(event)
                if isinstance(event, Started):
                    artifact = event.model
                if isinstance(event, Predicted):
                    body = classification_body(asked.model, event.answers)
                    return JSONResponse(body, headers={MODEL_HEADER: artifact})
        raise AssertionError("an engine's events end with the last one")


def sequences(asked: Completion, identity: str) -> list[GenerationRequest]:
    """One engine request for each prompt and choice: choice i of prompt p has index p * n + i."""
    found: list[GenerationRequest] = []
    for prompt in asked.prompts:
        for choice in range(asked.n):
            seed = asked.sampling.seed
            if seed is not None:
                # Choices of one seed differ from each other and stay the same from call to call.
                seed = (seed + choice) % 2**63
            found.append(
                GenerationRequest(
                    f"{identity}-{len(found)}-{secrets.token_hex(4)}",
                    prompt,
                    replace(asked.sampling, seed=seed),
                    asked.echo,
                )
            )
    return found


def create_app(service: Service) -> "Border":
    # Its own documentation pages would load scripts from elsewhere.
    app = FastAPI(title="Heliostat", openapi_url=None, docs_url=None, redoc_url=None)
    _add_errors(app)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok", "models": [c.id for c in service.gateway.models()]})

    @app.get("/v1/models")
    async def models() -> Response:
        cards = [card.body() for card in service.gateway.models()]
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        return JSONResponse(service.card(name).body())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.complete(await _json(request), request.scope["request_id"])

    @app.post("/v1/classify")
    async def classify(request: Request) -> Response:
        return await service.classify(await _json(request), request.scope["request_id"])

    page, policy = playground()

    @app.get("/")
    async def index() -> Response:
        headers = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    return Border(app)


async def _json(request: Request) -> bytes:
    """The body. Other content types are refused: a browser sends them from any site unasked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            415, f"content-type must be application/json, not {kind[:80] or 'nothing'}"
        )
    return await request.body()


def _artifact(first: Sequence[tuple[int, Event]]) -> str:
    return next(event.model for _, event in first if isinstance(event, Started))


def playground() -> tuple[bytes, str]:
    """The page, and the policy that lets exactly its own script and style run."""
    page = (resources.files("serving") / "playground" / "index.html").read_bytes()

    def digests(tag: bytes) -> str:
        blocks = re.findall(b"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(block).digest()).decode() for block in blocks)
        return " ".join(f"'sha256-{digest}'" for digest in hashes)

    return page, (
        f"default-src 'none'; script-src {digests(b'script')}; style-src {digests(b'style')}; "
        "connect-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        response = error_response(RequestError(error.status_code, message))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def fault(_: Request, __: Exception) -> Response:
        return error_response(RequestError(500, "the service failed on this request"))


def error_response(error: RequestError) -> Response:
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return JSONResponse(error.body(), error.status, headers)


class Border:
    """The outermost ASGI layer: request id, size of the body, and clients that go away.

    It reads the body itself, up to the cap, and from then on watches for the disconnect: when the
    client goes, the request is cancelled, whatever Serve's own headers say.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["request_id"] = request_id(scope["headers"])
        try:
            body = await _read(scope, receive)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        if body is not None:
            await _until_gone(self._app(scope, _replay(body), send), receive)


def request_id(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """The caller's id, or the one that Serve gave, where it is harmless in logs; else ours.

    Serve's proxies put the header on every answer themselves.
    """
    given = next((v for k, v in headers if k == b"x-request-id"), b"").decode("latin-1")
    return given if REQUEST_ID.match(given) else secrets.token_hex(12)


async def _read(scope: Message, receive: Receive) -> bytes | None:
    """The body; None where the client went before it was complete.

    Raises:
        RequestError: 413, before more than the cap was taken in.
    """
    declared = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
    size, parts = int(declared) if declared.isdigit() else 0, bytearray()
    while True:
        if max(size, len(parts)) > MAX_BODY_BYTES:
            raise RequestError(
                413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large"
            )
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts += message.get("body", b"")
        if not message.get("more_body", False) and len(parts) <= MAX_BODY_BYTES:
            return bytes(parts)


def _replay(body: bytes) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        return await asyncio.get_running_loop().create_future()

    return receive


async def _until_gone(answer: Awaitable[None], receive: Receive) -> None:
    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(answer)
    watching = asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class HandleGateway:
    """Engines behind Serve's deployment handles, one per model name."""

    def __init__(self, handles: Mapping[str, Any]) -> None:
        self._handles = handles
        self._cards: tuple[ModelCard, ...] = ()

    def show(self, cards: Sequence[ModelCard]) -> None:
        self._cards = tuple(cards)

    def models(self) -> Sequence[ModelCard]:
        return self._cards

    async def submit(self, card: ModelCard, request: EngineRequest) -> AsyncIterator[Event]:
        events = self._handles[card.id].options(stream=True).submit.remote(request)
        try:
            async for event in events:
                yield event
        except BackPressureError:
            yield OVERLOADED
        except (RayActorError, DeploymentUnavailableError):
            yield Failed(503, "the model's replica was lost", "replica_lost", retry_after=1)
        except (asyncio.CancelledError, GeneratorExit):
            events.cancel()
            raise


@ray.serve.deployment
@ray.serve.ingress()
class Ingress:
    """See `create_app`.

    Args:
        limits: `max_tokens`, `choices`, `deadline_seconds`.
        engines: model name -> handle of its deployment.
    """

    def __init__(self, limits: Mapping[str, Any], engines: Mapping[str, Any]) -> None:
        self._gateway = HandleGateway(engines)
        bounds = Limits(limits["max_tokens"], limits["choices"])
        self._service = Service(self._gateway, bounds, limits["deadline_seconds"])

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        self._gateway.show([ModelCard(**card) for card in user_config["models"]])

    def __serve_build_asgi_app__(self) -> Border:
        return create_app(self._service)
