"""Requests of every kind that a client may send: valid ones, wrong ones, and bytes."""

import base64
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from tests import tiny_classifier

ROUTES = (
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/classify"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/v1/models/digits"),
    ("GET", "/health"),
    ("GET", "/"),
    ("GET", "/v1/models/%2e%2e%2fetc"),
    ("DELETE", "/v1/completions"),
    ("POST", "/nowhere"),
)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, 2**31, 2**63, -(2**63), 10**30, "", "a", "好",
    "\x00", "🦉" * 9, "../../etc/passwd", "%2e%2e", "http://10.0.0.1/", "a" * 3000, [], [[]], {},
    [1, 2, 3], [0], [-1], [2**31], [True], [0.5], ["a", "b"], [["a"]], [[1], [2]], [None],
    {"a": 1}, {"1": 100}, {"1": 1e9}, {"type": "text"}, {"include_usage": True},
    [{"role": "user", "content": "a"}], [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "robot", "content": "a"}], [{"image": "AAAA"}], [{"pixels": [[0, 255]]}],
    [{"pixels": [["a"]]}], [{"pixels": []}], "tiny", "talker", "digits",
)  # fmt: skip
FIELDS = (
    "model", "prompt", "messages", "inputs", "tokens", "max_tokens", "max_completion_tokens",
    "temperature", "top_p", "top_k", "n", "stop", "stream", "stream_options", "seed",
    "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "echo",
    "suffix", "tools", "best_of", "user", "anything",
)  # fmt: skip
TEXT = {"model": "tiny", "prompt": "def ", "max_tokens": 4}
CHAT = {"model": "talker", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 4}
IMAGE = base64.b64encode(tiny_classifier.picture(1)).decode()
VALID: Mapping[str, tuple[dict[str, Any], ...]] = {
    "/v1/completions": (
        TEXT,
        TEXT | {"stream": True},
        {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 2, "n": 2, "seed": 1},
    ),
    "/v1/chat/completions": (CHAT, CHAT | {"stream": True}),
    "/v1/classify": (
        {"model": "digits", "inputs": [{"image": IMAGE}]},
        {"model": "digits", "inputs": [{"pixels": [[0, 1], [2, 3]]}, {"image": IMAGE}]},
        {"model": "tiny", "inputs": [{"pixels": [[0, 1], [2, 3]]}]},
    ),
    "/tokenize": (TEXT, CHAT),
    "/detokenize": ({"model": "tiny", "tokens": [1, 2, 3]},),
}
"""By route; any of them goes to any route too."""
JSON, FORM = b"application/json", b"multipart/form-data"
HEADERS = (
    ("x-request-timeout-seconds", b"0"), ("x-request-timeout-seconds", b"nan"),
    ("x-request-disconnect-disabled", b"?1"), ("x-request-disconnect-disabled", b"\xff"),
    ("x-request-id", b"a" * 6000), ("x-request-id", b"\xff\xfe"), ("x-request-id", b"{\"a\":1}"),
    ("serve_multiplexed_model_id", b"other"), ("x-forwarded-for", b"127.0.0.1"),
    ("accept", "好".encode()), ("content-encoding", b"gzip"), ("expect", b"100-continue"),
    ("authorization", b"Bearer"), ("authorization", b"Bearer \xff"), ("cookie", b"a=b"),
    ("origin", b"http://evil.example"), ("range", b"bytes=0-1"),
)  # fmt: skip


@dataclass(frozen=True)
class Shot:
    method: str
    path: str
    headers: list[tuple[str, bytes]]
    body: bytes


def shots(count: int, seed: int) -> Iterator[Shot]:
    rng = random.Random(seed)
    for _ in range(count):
        method, path = rng.choice(ROUTES)
        kind, body = (
            _form(rng) if path == "/v1/classify" and rng.random() < 0.4 else _body(rng, path)
        )
        headers = [("content-type", kind)]
        if rng.random() < 0.3:
            headers.append(rng.choice(HEADERS))
        yield Shot(method, path, headers, body)


def _body(rng: random.Random, path: str) -> tuple[bytes, bytes]:
    """Content type and body."""
    kind = rng.choice([JSON] * 8 + [b"text/plain", b"", FORM])
    route = path if path in VALID and rng.random() < 0.7 else rng.choice(list(VALID))
    tree: Any = dict(rng.choice(VALID[route]))
    if rng.random() < 0.25:
        return kind, json.dumps(tree).encode()
    for _ in range(rng.randint(1, 3)):
        tree[rng.choice(FIELDS)] = rng.choice(VALUES)
    body = json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    choice = rng.random()
    if choice < 0.6:
        return kind, body
    if choice < 0.85:
        return kind, _damaged(rng, body)
    return kind, rng.choice([b"", b"null", b"[" * 50_000, b"\xef\xbb\xbf{}", rng.randbytes(200)])


def _form(rng: random.Random) -> tuple[bytes, bytes]:
    """Files as a browser sends them: whole, damaged, too many, or under another name."""
    file = base64.b64decode(IMAGE)
    files = [file if rng.random() < 0.6 else _damaged(rng, file) for _ in range(rng.randint(0, 3))]
    name, model = (
        rng.choice([b"image"] * 4 + [b"\xff"]),
        rng.choice([b"digits"] * 4 + [b"tiny", b""]),
    )
    parts = [b'form-data; name="model"\r\n\r\n' + model]
    parts += [b'form-data; name="%s"; filename="a"\r\n\r\n%s' % (name, file) for file in files]
    body = b"".join(b"--x\r\nContent-Disposition: %s\r\n" % part for part in parts) + b"--x--\r\n"
    body = body if rng.random() < 0.7 else _damaged(rng, body)
    return rng.choice([FORM + b"; boundary=x"] * 8 + [FORM, FORM + b"; boundary=y"]), body


def _damaged(rng: random.Random, body: bytes) -> bytes:
    place = rng.randrange(len(body))
    if rng.random() < 0.5:
        return body[:place]
    return body[:place] + rng.randbytes(rng.randint(1, 4)) + body[place + 1 :]


def fire(http: httpx.Client, count: int, seed: int) -> Counter[tuple[str, int]]:
    """Send them one after the other; the answers by path and status.

    Raises:
        AssertionError: for an answer that is a fault of the service, or has not its shape. One
            caller never fills the service, so that 503 is a fault too.
    """
    found: Counter[tuple[str, int]] = Counter()
    for shot in shots(count, seed):
        try:
            answer = http.request(shot.method, shot.path, headers=shot.headers, content=shot.body)
        except httpx.TransportError as error:
            raise AssertionError(f"{shot} was not answered: {error!r}") from error
        found[shot.path, answer.status_code] += 1
        assert answer.status_code < 500, (shot, answer.text)
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}, (shot, answer.text)
        elif answer.headers["content-type"].startswith("text/event-stream"):
            *frames, last = [line for line in answer.text.split("\n\n") if line]
            assert last == "data: [DONE]", (shot, answer.text)
            told = [json.loads(frame.removeprefix("data: ")) for frame in frames]
            assert not any("error" in event for event in told), (shot, answer.text)
    return found
