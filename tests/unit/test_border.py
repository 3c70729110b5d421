"""Who passes the border: every route, every way to come without a key, every odd header."""

import asyncio
import socket
from dataclasses import replace
from typing import Any

import httpx
import pytest
import uvicorn

from serving import border
from serving.auth import Key, Quota, new_key
from serving.border import HeaderGuard, _until_gone, request_id
from serving.routes import Bounds
from tests.scripted import application, call, complete
from tests.strangers import HOSTS, OPEN, routes

SECRET, KEY = new_key("a")
READER_SECRET, READER = new_key("reader", ["classify"])


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@pytest.mark.parametrize(("method", "path"), routes())
def test_every_route_denies_without_a_valid_key(method: str, path: str) -> None:
    past = replace(new_key("x")[1], expires=1)
    revoked = replace(READER, revoked=1)
    app, gateway = application(keys=[KEY, revoked, past])
    wrong: list[dict[str, str]] = [
        {},
        bearer(new_key("stranger")[0]),
        bearer(READER_SECRET),
        bearer(SECRET[:-1]),
        bearer(KEY.digest),
        {"authorization": SECRET},
        {"authorization": f"Basic {SECRET}"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer  "},
        {"x-api-key": SECRET},
    ]
    expected = 200 if path in OPEN and method == "GET" else 401
    for headers in wrong:
        answer = call(app, method, path, headers=headers)
        assert answer.status_code == expected, headers
        if expected == 401:
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
    twice = [("authorization", f"Bearer {SECRET}")] * 2
    assert call(app, method, path, headers=twice).status_code == expected
    assert call(app, f"{method}", f"{path}?key={SECRET}").status_code == expected
    assert gateway.open == 0 and gateway.asked == []


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("POST", "/v1/completions")])
def test_no_host_header_opens_anything(method: str, path: str, host: str) -> None:
    headers = [(b"host", host.encode("latin-1"))]
    guarded, _ = application(keys=[KEY])
    assert call(guarded, method, path, headers=headers).status_code == 401
    unguarded, gateway = application()
    assert call(unguarded, method, path, headers=headers).status_code == 403
    assert gateway.asked == []


def test_a_valid_key_passes_whatever_the_host() -> None:
    app, _ = application(keys=[KEY])
    for host in ("localhost", "models.example.org:443", "a/?x="):
        headers = bearer(SECRET) | {"host": host}
        assert call(app, "GET", "/v1/models", headers=headers).status_code == 200


def test_a_scope_that_is_missing_is_named() -> None:
    app, _ = application(keys=[READER])
    answer = complete(app, headers=bearer(READER_SECRET))
    assert answer.status_code == 403
    assert answer.json()["error"]["type"] == "permission_error"
    assert "may not generate" in answer.json()["error"]["message"]
    assert call(app, "GET", "/v1/models", headers=bearer(READER_SECRET)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "10.0.0.5:8000"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"host": "localhost:8000", "origin": "http://localhost:9000"},
    ],
)
def test_without_keys_other_machines_and_other_sites_are_refused(headers: dict[str, str]) -> None:
    app, _ = application()
    answer = call(app, "GET", "/v1/models", headers=headers)
    assert answer.status_code == 403 and "heliostat keys create" in answer.text
    own = {"host": "localhost:8000", "origin": "http://localhost:8000"}
    assert call(app, "GET", "/v1/models", headers=own).status_code == 200


def test_without_keys_another_machines_address_is_refused() -> None:
    app, _ = application()
    transport = httpx.ASGITransport(app, client=("10.0.0.9", 1))

    async def ask() -> int:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.get("/v1/models")).status_code

    import asyncio

    assert asyncio.run(ask()) == 403


def limited(**quota: Any) -> tuple[Any, Key]:
    key = replace(KEY, quota=Quota(**quota))
    return application(keys=[key])[0], key


def test_limits_answer_429_with_what_is_left() -> None:
    app, _ = limited(requests_per_minute=2, tokens_per_minute=10_000)
    first, second, third = (complete(app, headers=bearer(SECRET)) for _ in range(3))
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert second.headers["x-ratelimit-remaining-requests"] == "0"
    assert third.status_code == 429 and 1 <= int(third.headers["retry-after"]) <= 30
    assert third.json()["error"]["code"] == "rate_limit_exceeded"
    assert third.headers["x-ratelimit-limit-requests"] == "2"


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_charged_as_they_were_used(stream: bool) -> None:
    app, _ = limited(tokens_per_minute=1000)
    for _ in range(30):  # each may take 17 and takes 5
        answer = complete(app, headers=bearer(SECRET), stream=stream)
        assert answer.status_code == 200
    left = int(complete(app, headers=bearer(SECRET)).headers["x-ratelimit-remaining-tokens"])
    assert 1000 - 30 * 5 - 17 <= left <= 1000 - 30 * 5 - 17 + 10


def test_a_services_own_limits_hold_for_keys_without_any() -> None:
    app, _ = application(keys=[KEY], quota=Quota(requests_per_minute=1))
    assert complete(app, headers=bearer(SECRET)).status_code == 200
    assert complete(app, headers=bearer(SECRET)).status_code == 429


def test_more_requests_than_the_service_holds_are_refused_at_once() -> None:
    app, _ = application(bounds=Bounds(max_requests=0))
    answer = complete(app)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "overloaded"


def test_a_body_that_does_not_come_ends_with_the_deadline() -> None:
    import asyncio

    async def dripping() -> Any:
        while True:
            yield b" "
            await asyncio.sleep(0.05)

    app, gateway = application(deadline=0.2)
    headers = {"content-type": "application/json"}
    answer = call(app, "POST", "/v1/completions", content=dripping(), headers=headers)
    assert answer.status_code == 408
    assert gateway.asked == []


@pytest.mark.parametrize(
    ("given", "kept"),
    [(b"mine-1", True), (b"a" * 65, False), (b"a\nb", False), (b"", False), (b"\xff", False)],
)
def test_a_request_id_is_taken_where_it_is_harmless(given: bytes, kept: bool) -> None:
    assert (request_id([(b"x-request-id", given)]) == given.decode("latin-1")) == kept


def test_serves_own_headers_do_not_reach_serve() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])

    headers = [
        (b"X-Request-Timeout-Seconds", b"0"),
        (b"x-request-disconnect-disabled", b"?1"),
        (b"serve_multiplexed_model_id", b"\xff"),
        (b"x-request-id", b"a b"),
        (b"x-other", b"\xff\xfe"),
        (b"accept", "好".encode()),
    ]
    asyncio.run(HeaderGuard(app)({"type": "http", "headers": headers}, None, None))  # type: ignore[arg-type]
    assert seen == [(b"x-other", b"??"), (b"accept", "好".encode())]


@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_no_interim_answer_goes_out(http: Any) -> None:
    """Over a real uvicorn, to a client that says `Expect: 100-continue` and sends its body."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"{}"
        length = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": b"ok"})

    config = uvicorn.Config(HeaderGuard(app), http=http, lifespan="off", log_level="error")
    server = uvicorn.Server(config)

    async def scenario() -> bytes:
        listening = socket.create_server(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        writer.write(
            b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\nconnection: close\r\n"
            b"content-length: 2\r\n\r\n{}"
        )
        answer = await reader.read()
        writer.close()
        server.should_exit = True
        await serving
        return answer

    answer = asyncio.run(scenario())
    assert answer.startswith(b"HTTP/1.1 200 OK") and answer.endswith(b"ok")


def test_the_log_names_the_route_and_never_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(border.log, "info", lambda _, extra: told.append(extra["heliostat"]))
    app, _ = application()
    assert complete(app).status_code == 200
    for path in ("/v1/models/gpt", "/health", "/my/secret"):
        call(app, "GET", path)
    assert [(line["status"], line["route"]) for line in told] == [
        (200, "/v1/completions"), (200, "/v1/models/{name}"), (200, "/health"), (404, None),
    ]  # fmt: skip


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_client_that_goes_cancels_its_answer_and_nothing_else(stubborn: bool) -> None:
    async def answer() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if not stubborn:
                raise

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def scenario() -> None:
        await asyncio.wait_for(_until_gone(answer(), gone), 2)
        task = asyncio.current_task()
        assert task is not None and task.cancelling() == 0
        await asyncio.sleep(0)  # nothing is left that would be raised here

    asyncio.run(scenario())


def test_whoever_cancels_the_request_itself_is_obeyed() -> None:
    async def scenario() -> None:
        never = asyncio.get_running_loop().create_future()
        running = asyncio.create_task(_until_gone(asyncio.sleep(60), lambda: never))
        await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await asyncio.sleep(0)
        assert never.cancelled()  # nobody watches on

    asyncio.run(scenario())
