"""The outermost layer of HTTP: request id, who is asking, size of the body, clients that leave.

All of it happens before a route's code runs. Who may pass is decided by the route that will run,
the same object that the router dispatches to; never by the text of an address or a header.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.routing import Match

from cluster.errors import HeliostatError
from serving.auth import Key, KeyRing, find
from serving.schema import RequestError

REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
HOST = re.compile(r"^(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,255})(:\d{1,5})?$")
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
RETRY_SECONDS = 1
LINGER_BYTES = 1 << 20
SERVE_HEADERS = frozenset(
    {
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
    }
)
"""Ray Serve's own headers, with which a client would switch off its deadline and its cancelling."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
log = logging.getLogger("ray.serve")


def open_to_all(endpoint: Endpoint) -> Endpoint:
    """Mark a route that needs no key."""
    endpoint.__dict__["needs"] = None
    return endpoint


def needs(scope: str) -> Callable[[Endpoint], Endpoint]:
    """Mark a route that needs a key of a scope; one without a mark needs any key."""

    def mark(endpoint: Endpoint) -> Endpoint:
        endpoint.__dict__["needs"] = scope
        return endpoint

    return mark


class Access:
    """Who may pass.

    Args:
        ring: the keys.
        loopback: without a key file, let in what comes from this machine to this machine.
    """

    def __init__(self, ring: KeyRing, *, loopback: bool) -> None:
        self._ring, self._loopback = ring, loopback
        self._loading: asyncio.Task[None] | None = None
        self.operator: tuple[Key, ...] = ()
        """Keys of whoever deployed the service, with which it asks itself."""

    async def admit(self, scope: Message, scope_needed: str | None) -> Key | None:
        """The key that a request comes with; None for a route or a service that needs none.

        Raises:
            RequestError: 401 without a valid key, 403 with one of another scope.
        """
        await self._fresh()
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if self._ring.keys is None and self._loopback:
            _check_loopback(scope)
            return None
        key = self._presented(given)
        if scope_needed and scope_needed not in key.scopes:
            raise RequestError(
                403,
                f"this key may not {scope_needed}: its scopes are {', '.join(key.scopes)}",
                code="insufficient_scope",
            )
        return key

    def _presented(self, given: Sequence[bytes]) -> Key:
        scheme, _, presented = (given[0] if len(given) == 1 else b"").partition(b" ")
        if scheme.lower() != b"bearer" or not presented.strip():
            raise _unauthorised("give an API key in one header, Authorization: Bearer KEY")
        keys = (*(self._ring.keys or ()), *self.operator)
        key = find(keys, presented.strip().decode("latin-1"))
        if key is None:
            raise _unauthorised("the API key is not one of this service")
        state = key.state(time.time())
        if state != "valid":
            raise _unauthorised(f"the API key {key.id} is {state}")
        return key

    async def _fresh(self) -> None:
        """Look at the keys again when it is time; wait only where what is known is too old."""
        if self._ring.age > KeyRing.FRESH_SECONDS and self._loading is None:
            self._loading = asyncio.create_task(self._load())
        if self._ring.age > KeyRing.STALE_SECONDS and self._loading is not None:
            await asyncio.shield(self._loading)
            if self._ring.age > KeyRing.STALE_SECONDS:
                raise RequestError(
                    503,
                    "the service cannot read its keys: try again",
                    code="keys_unavailable",
                    retry_after=RETRY_SECONDS,
                )

    async def _load(self) -> None:
        try:
            await asyncio.to_thread(self._ring.load)
        except (HeliostatError, OSError) as error:
            log.error("the keys cannot be read: %s", error)
        finally:
            self._loading = None


def _unauthorised(message: str) -> RequestError:
    headers = {"www-authenticate": "Bearer"}
    return RequestError(401, message, code="invalid_api_key", headers=headers)


def _check_loopback(scope: Message) -> None:
    """A service without keys answers this machine only, and no page of another site in its browser.

    Raises:
        RequestError: 403.
    """
    peer = str((scope.get("client") or ("",))[0])
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    match = HOST.match(hosts[0]) if len(hosts) == 1 else None
    origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
    foreign = any(origin.partition("://")[2] != hosts[0] for origin in origins) if hosts else False
    local = peer in ("", "127.0.0.1", "::1", "testclient")
    if not local or match is None or match[1].lower() not in LOOPBACK or foreign:
        raise RequestError(
            403,
            "this service has no keys and answers requests of its own machine to localhost only: "
            "make a key with `heliostat keys create NAME`",
            code="loopback_only",
        )


class Border:
    """The application behind its border.

    It reads the body itself, up to the cap, and from then on watches for the disconnect: when the
    client goes, the request is cancelled, whatever Serve's own headers say.

    Args:
        max_body_bytes: larger bodies are refused with 413, before they are taken in.
        body_seconds: time in which a body must arrive.
        max_requests: at once; more are refused with 503.
    """

    def __init__(
        self,
        app: FastAPI,
        access: Access,
        *,
        max_body_bytes: int,
        body_seconds: float,
        max_requests: int,
    ) -> None:
        self._app, self._access = app, access
        self._max_body, self._body_seconds = max_body_bytes, body_seconds
        self._max_requests, self._open = max_requests, 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["request_id"] = request_id(scope["headers"])
        scope["began"] = asyncio.get_running_loop().time()
        answer = Noted(scope, send)
        self._open += 1
        try:
            await self._pass(scope, receive, answer)
        except RequestError as error:
            if not answer.status:
                await error_response(error)(scope, receive, answer)
        finally:
            self._open -= 1
            answer.log()

    async def _pass(self, scope: Message, receive: Receive, send: Send) -> None:
        if self._open > self._max_requests:
            raise RequestError(
                503,
                "the service is busy: try again in a second",
                code="overloaded",
                retry_after=RETRY_SECONDS,
            )
        route, endpoint = _matched(self._app, scope)
        if route is not None:
            scope["route"] = route  # for the log; Starlette's own kind of route does not say it
        needed = getattr(endpoint, "needs", "")
        if needed is not None:
            scope["key"] = await self._access.admit(scope, needed)
        body = await self._read(scope, receive)
        if body is not None:
            await _until_gone(self._app(scope, _replay(body), send), receive)

    async def _read(self, scope: Message, receive: Receive) -> bytes | None:
        """The body; None where the client went before it was complete.

        Raises:
            RequestError: 413, before more than the cap was taken in; 408 where it takes too long.
        """
        declared = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        size = int(declared) if declared.isdigit() and len(declared) < 20 else 0
        parts, taken, more = bytearray(), 0, True
        ends = scope["began"] + self._body_seconds
        while more:
            # A little beyond the cap is taken off the wire and thrown away: a client that still
            # sends would not read the answer.
            if max(size, taken) > self._max_body + LINGER_BYTES:
                raise self._too_large()
            try:
                async with asyncio.timeout_at(ends):
                    message = await receive()
            except TimeoutError:
                raise RequestError(
                    408, "the body did not arrive in time", headers={"connection": "close"}
                ) from None
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            taken += len(part)
            if max(size, taken) <= self._max_body:
                parts += part
        if taken > self._max_body:
            raise self._too_large()
        return bytes(parts)

    def _too_large(self) -> RequestError:
        return RequestError(
            413, f"the body is larger than {self._max_body} bytes", code="body_too_large"
        )


class Noted:
    """Passes an answer on, and writes one line about it that holds nothing of what was said."""

    def __init__(self, scope: Message, send: Send) -> None:
        self._scope, self._send = scope, send
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    def log(self) -> None:
        scope, key = self._scope, self._scope.get("key")
        milliseconds = (asyncio.get_running_loop().time() - scope["began"]) * 1000
        fields = {
            "request": scope["request_id"],
            "method": scope["method"],
            # The route's pattern: an address may hold anything.
            "route": getattr(scope.get("route"), "path", None),
            "status": self.status or 499,
            "milliseconds": round(milliseconds, 1),
            "key": key.id if key else None,
            **scope.get("facts", {}),
        }
        log.info("answered", extra={"heliostat": fields})


def _matched(app: FastAPI, scope: Message) -> tuple[Any, Any]:
    """The route that the router will take, and what it will call; None for an address or a method
    that nothing answers."""
    for route in app.router.routes:
        match, child = route.matches(scope)
        if match is Match.FULL:
            return route, child.get("endpoint")
    return None, None


def request_id(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """The caller's id, or the one that Serve gave, where it is harmless in logs; else ours."""
    given = next((v for k, v in headers if k == b"x-request-id"), b"").decode("latin-1")
    return given if REQUEST_ID.match(given) else secrets.token_hex(12)


def error_response(error: RequestError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


def _replay(body: bytes) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        return await asyncio.get_running_loop().create_future()

    return receive


async def _until_gone(answer: Awaitable[None], receive: Receive) -> None:
    """Await the answer; cancel it when the client goes, which is no error."""
    working, gone = asyncio.current_task(), False
    assert working is not None

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        working.cancel()

    watching = asyncio.create_task(watch())
    try:
        await answer
    except asyncio.CancelledError:
        # Somebody else may have cancelled us, too: see `asyncio.timeout`.
        if not gone or working.cancelling() > 1:
            raise
    finally:
        watching.cancel()
        if gone:
            working.uncancel()


class HeaderGuard:
    """ASGI middleware around Ray Serve's own code: takes out what a client must not say.

    Serve reads some headers before our application runs. It would take a timeout from one, and
    fail with 500 on bytes that are no UTF-8.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["headers"] = [
                pair for pair in map(_harmless, scope["headers"]) if pair is not None
            ]
            _without_interim_answer(receive)
        await self._app(scope, receive, send)


def _without_interim_answer(receive: Receive) -> None:
    """Never say "100 Continue": HAProxy 2.8 may then hold back the rest of the answer.

    It takes the interim answer for one without a body (haproxy issue 2587) and stalls, or closes,
    where the final one comes soon after. A client that asked goes on without it (RFC 9110, 10.1.1).
    Uvicorn's switch for this is a field of the object that `receive` belongs to.
    """
    cycle = getattr(receive, "__self__", None)
    if getattr(cycle, "waiting_for_100_continue", False):
        cycle.waiting_for_100_continue = False  # type: ignore[union-attr]


def _harmless(pair: tuple[bytes, bytes]) -> tuple[bytes, bytes] | None:
    name, value = pair[0].lower(), pair[1]
    if name in SERVE_HEADERS or not name.isascii():
        return None
    if name == b"x-request-id" and not REQUEST_ID.match(value.decode("latin-1")):
        return None
    with suppress(UnicodeDecodeError):
        value.decode("utf-8")
        return name, value
    # Kept for those who check it, in a form that every reader can decode.
    return name, value.decode("latin-1").encode("ascii", "replace")


def middlewares() -> list[Any]:
    """For Serve's `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`."""
    from starlette.middleware import Middleware

    return [Middleware(HeaderGuard)]
