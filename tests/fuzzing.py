"""Requests of every kind that a client may send: valid ones, wrong ones, and bytes."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

ROUTES = (
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/classify"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
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
    [{"pixels": [["a"]]}], [{"pixels": []}], "tiny", "talker",
)  # fmt: skip
FIELDS = (
    "model", "prompt", "messages", "inputs", "tokens", "max_tokens", "max_completion_tokens",
    "temperature", "top_p", "top_k", "n", "stop", "stream", "stream_options", "seed",
    "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "echo",
    "suffix", "tools", "best_of", "user", "anything",
)  # fmt: skip
VALID: tuple[dict[str, Any], ...] = (
    {"model": "tiny", "prompt": "def ", "max_tokens": 4},
    {"model": "talker", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 4},
    {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 2, "n": 2, "seed": 1},
    {"model": "tiny", "tokens": [1, 2, 3]},
    {"model": "tiny", "inputs": [{"pixels": [[0, 1], [2, 3]]}]},
)
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
        kind = rng.choice([b"application/json"] * 8 + [b"text/plain", b"", b"multipart/form-data"])
        headers = [("content-type", kind)]
        if rng.random() < 0.3:
            headers.append(rng.choice(HEADERS))
        yield Shot(method, path, headers, _body(rng))


def _body(rng: random.Random) -> bytes:
    tree: Any = dict(rng.choice(VALID))
    choice = rng.random()
    if choice < 0.2:
        return json.dumps(tree).encode()
    for _ in range(rng.randint(1, 3)):
        tree[rng.choice(FIELDS)] = rng.choice(VALUES)
    body = json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if choice < 0.7:
        return body
    if choice < 0.8:
        return body[: rng.randrange(len(body))]
    if choice < 0.9:
        place = rng.randrange(len(body))
        return body[:place] + rng.randbytes(rng.randint(1, 4)) + body[place + 1 :]
    return rng.choice([b"", b"null", b"[" * 50_000, b"\xef\xbb\xbf{}", rng.randbytes(200)])


def fire(http: httpx.Client, count: int, seed: int) -> Counter[int]:
    """Send them; the answers by status.

    Raises:
        AssertionError: for an answer that is a fault of the service, or has not its shape.
    """
    found: Counter[int] = Counter()
    for shot in shots(count, seed):
        try:
            answer = http.request(shot.method, shot.path, headers=shot.headers, content=shot.body)
        except httpx.TransportError as error:
            raise AssertionError(f"{shot} was not answered: {error!r}") from error
        found[answer.status_code] += 1
        assert answer.status_code < 500 or answer.status_code == 503, (shot, answer.text)
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}, (shot, answer.text)
    return found
