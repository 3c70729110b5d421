"""The HTTP application over a scripted gateway, without Ray."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serving.engines.base import (
    OVERLOADED,
    Event,
    Failed,
    Predicted,
    Started,
    Tokens,
)
from serving.rest import cause, failure
from serving.routes import playground
from tests.scripted import application, call, complete, silence


def frames(answer: httpx.Response) -> list[Any]:
    found = answer.text.split("\n\n")
    assert found.pop() == ""
    assert all(frame.startswith("data: ") for frame in found)
    return [f[6:] if f[6:] == "[DONE]" else json.loads(f[6:]) for f in found]


def test_a_completion_has_exactly_the_conventions_shape() -> None:
    app, gateway = application()
    answer = complete(app, prompt=["a", "b"], n=2, echo=True)
    body = answer.json()
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert (body["object"], body["model"]) == ("text_completion", "gpt")
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    choice = {"index": 0, "text": "你好，世界", "logprobs": None, "finish_reason": "stop"}
    assert body["choices"][0] == choice
    # A prompt is read once for all of its choices.
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 12,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer.headers["x-model-id"] == "model/gpt@3"
    assert gateway.open == 0


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "好" * (64 * 512 + 1)}),
        ("/v1/completions", {"prompt": [1] * 65}),
        ("/tokenize", {"prompt": " " * (64 * 512 + 1)}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 40_000}]}),
    ],
)
def test_what_can_never_fit_is_not_even_tokenised(path: str, fields: dict[str, Any]) -> None:
    app, gateway = application()
    answer = call(app, "POST", path, json={"model": "gpt"} | fields)
    assert answer.status_code == 400 and gateway.asked == []
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_stream_has_chunks_usage_and_done() -> None:
    app, _ = application()
    answer = complete(app, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = frames(answer)
    assert done == "[DONE]"
    assert [c["choices"][0]["text"] for c in chunks] == ["好", "，世界", ""]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "stop"]
    assert all(c["usage"] is None for c in chunks)
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 5
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert all("usage" not in c for c in frames(complete(app, stream=True))[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_before_the_first_token_is_a_plain_error(stream: bool) -> None:
    async def full(_: Any) -> AsyncIterator[Event]:
        yield OVERLOADED

    app, gateway = application(full)
    answer = complete(app, stream=stream, n=3)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "overloaded"
    assert gateway.open == 0


def test_a_cut_stream_ends_with_an_error_event() -> None:
    async def cut(_: Any) -> AsyncIterator[Event]:
        yield Started("model/gpt@3", 2)
        yield Tokens("a", (1,))
        yield Failed(503, "the model's replica was lost", "replica_lost")

    app, _ = application(cut)
    *_, chunk, last = frames(complete(app, stream=True))
    assert chunk["choices"][0]["text"] == "a"
    assert last["error"]["code"] == "replica_lost"
    assert complete(app).status_code == 503


def test_the_deadline_ends_an_answer_and_frees_the_engine() -> None:
    app, gateway = application(silence, deadline=0.05)
    answer = complete(app)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
    *_, last = frames(complete(app, stream=True))
    assert last["error"]["code"] == "deadline"
    assert gateway.open == 0


def test_an_engine_that_just_stops_is_no_answer() -> None:
    async def vanish(_: Any) -> AsyncIterator[Event]:
        yield Started("model/gpt@3", 2)

    app, _ = application(vanish)
    assert complete(app).status_code == 502


def test_a_fault_of_ours_has_the_same_shape() -> None:
    async def fault(_: Any) -> AsyncIterator[Event]:
        yield Started("model/gpt@3", 2)
        raise RuntimeError("secret detail")

    app, _ = application(fault)
    answer = complete(app)
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"


def test_classification() -> None:
    async def look(request: Any) -> AsyncIterator[Event]:
        yield Started("model/digits@1")
        yield Predicted(tuple({"label": "7", "score": 0.9} for _ in request.inputs))

    app, _ = application(look)
    body = {"model": "digits@1", "inputs": [{"pixels": [[0]]}, {"image": "AAAA"}]}
    answer = call(app, "POST", "/v1/classify", json=body)
    assert answer.json()["data"][1] == {"index": 1, "label": "7", "score": 0.9}
    assert answer.headers["x-model-id"] == "model/digits@1"
    wrong = call(app, "POST", "/v1/classify", json=body | {"model": "gpt"})
    assert wrong.status_code == 400 and "/v1/completions" in wrong.text


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/nowhere", {}, 404),
        ("PUT", "/v1/models", {}, 405),
        ("GET", "/v1/models/none", {}, 404),
        ("POST", "/v1/completions", {"content": b"prompt=a"}, 415),
        ("POST", "/v1/completions", {"json": {}}, 400),
        ("POST", "/v1/completions", {"content": b" " * ((8 << 20) + 1)}, 413),
    ],
)
def test_every_error_has_one_shape(
    method: str, path: str, options: dict[str, Any], status: int
) -> None:
    app, _ = application()
    answer = call(app, method, path, **options)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_without_a_length_is_refused_before_it_is_taken_in() -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b" " * 65536

    app, _ = application()
    headers = {"content-type": "application/json"}
    answer = call(app, "POST", "/v1/completions", content=endless(), headers=headers)
    assert answer.status_code == 413 and taken <= 146


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(stream: bool) -> None:
    async def scenario() -> None:
        app, gateway = application(silence)
        body = json.dumps({"model": "gpt", "prompt": "a", "stream": stream}).encode()
        messages: asyncio.Queue[Any] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": body})
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        }
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        answering = asyncio.create_task(app(scope, messages.get, send))
        while not gateway.open:
            await asyncio.sleep(0.01)
        messages.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(answering, 2)
        await asyncio.sleep(0)
        assert gateway.open == 0
        assert not any(b"[DONE]" in m.get("body", b"") for m in sent)

    asyncio.run(scenario())


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page, policy = playground()
    text = page.decode()
    assert "default-src 'none'" in policy and policy.count("'sha256-") == 2
    assert "http://" not in text and "https://" not in text
    assert " style=" not in text and " onclick=" not in text  # the policy would block them


def test_a_replicas_reason_is_one_line() -> None:
    message = (
        "Replica failed:\nTraceback (most recent call last):\n  File x\n"
        "KeyError: 'a'\n\nDuring handling:\nValueError: no such type.\n\nUpdate it."
    )
    assert cause(message) == "ValueError: no such type. Update it."
    assert cause("No room for\nthe replica") == "No room for the replica"
    unhealthy = {"deployments": {"m": {"status": "DEPLOY_FAILED", "message": message}}}
    assert failure(unhealthy).startswith("m: ValueError: no such type")
    assert failure({}) == "no reason was given"
