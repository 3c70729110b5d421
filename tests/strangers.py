"""Requests of those who have no valid key: every route, and hosts that no client library sends."""

import json
import socket
from collections.abc import Iterator, Mapping

import httpx
from fastapi import FastAPI

from tests.scripted import application

OPEN = {"/", "/health"}
HOSTS = [
    "a/?x=",
    "x/docs?",
    "h/#",
    "/health",
    "localhost/health?",
    "localhost#",
    "a b",
    "@",
    "localhost@evil",
    "[::1",
    "127.0.0.1:8000:1",
    "xn--",
    "a" * 300,
    "\xff",
    "localhost, evil",
    "http://localhost",
]
ODD_REQUESTS = [
    b"GET /v1/models HTTP/1.1\r\nHost: a/?x=\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: /health\r\n",
    b"GET /v1/models HTTP/1.0\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost:\r\n",
    b"GET http://localhost/v1/models HTTP/1.1\r\nHost: localhost\r\n",
    b"GET http://x/health?/v1/models HTTP/1.1\r\nHost: x/health\r\n",
    b"GET /v1/models?/health HTTP/1.1\r\nHost: h/#\r\n",
    b"GET /v1/models/..%2f..%2fhealth HTTP/1.1\r\nHost: h\r\n",
    b"GET /health/../v1/models HTTP/1.1\r\nHost: h\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: h\r\nX-Original-URL: /health\r\n",
]


def routes(model: str = "gpt") -> list[tuple[str, str]]:
    """Those of the application itself, so that a new one cannot be forgotten; and some that it does
    not have."""
    app: FastAPI = application()[0]._app
    found = [
        (method, route.path.replace("{name}", model))
        for route in app.router.routes
        for method in sorted(getattr(route, "methods", None) or ["GET"])
    ]
    assert len(found) > 8
    return [*found, ("GET", "/nowhere"), ("PUT", "/v1/models"), ("GET", "/health/"), ("GET", "/V1")]


def raw(url: str, request: bytes) -> tuple[int, bytes]:
    """Status and body that the bytes of a request's head are answered with."""
    place = httpx.URL(url)
    with socket.create_connection((place.host, place.port), timeout=20) as wire:
        wire.sendall(request + b"Connection: close\r\n\r\n")
        answer = b"".join(iter(lambda: wire.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), body


def odd_requests_get_nothing(url: str) -> None:
    """
    Raises:
        AssertionError: for a request without a key that is told something.
    """
    for line in ODD_REQUESTS:
        status, body = raw(url, line)
        harmless = status in (400, 401, 404) or body == b'{"status":"ok"}'
        assert harmless and b"model/" not in body, (line, status, body)
        if status == 401:
            assert json.loads(body)["error"]["code"] == "invalid_api_key"


def every_route_is_closed(http: httpx.Client, model: str, wrong: Mapping[str, str | None]) -> int:
    """
    Args:
        model: one that is served: who is let in would be answered.
        wrong: what a caller is -> the key that it has.

    Returns:
        Requests that were refused.

    Raises:
        AssertionError: for a route that answers one of them.
    """
    body = {"model": model, "prompt": "a", "max_tokens": 1}
    refused = 0
    for method, path in routes(model):
        if path in OPEN:
            continue
        for who, key in wrong.items():
            headers = {"authorization": f"Bearer {key}"} if key else {}
            answer = http.request(method, path, json=body, headers=headers)
            assert answer.status_code == 401, (method, path, who, answer.text)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            refused += 1
        for request in _malformed(method, path):
            status, said = raw(str(http.base_url), request)
            # The proxy answers what is no request by itself.
            assert status in (400, 401) and b"model/" not in said, (request, status, said)
            refused += 1
    return refused


def _malformed(method: str, path: str) -> Iterator[bytes]:
    for host in HOSTS:
        yield f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n".encode("latin-1")
