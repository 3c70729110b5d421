"""A published model behind HTTP on a real local Ray: the stage, the answers, the faults."""

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.errors import ArtifactError, PortError, ServingError
from cluster.session import Session
from pipelines import families
from serving import app
from serving.auth import KeyFile, Quota, new_key
from tests import strangers, tiny_classifier, tiny_model
from tests.fakes import config
from tests.fuzzing import fire
from tests.ports import free_port
from tests.served import (
    PROMPT,
    Served,
    busy,
    half_closed,
    halted,
    listener,
    memory,
    one_call_at_a_time,
    pids,
    until,
)  # fmt: skip

pytestmark = pytest.mark.cluster
LONG = json.dumps({"model": "tiny", "prompt": "a" * 200}).encode()


@pytest.fixture(scope="module")
def served(ray_session: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    service = Served(
        tmp_path_factory.mktemp("serve"),
        *("serve.ingress_replicas=2", "serve.max_concurrent=4", "serve.max_waiting=2"),
        "serve.deadline_seconds=60",
    )
    yield service
    service.close()


def test_the_stage_answers_itself_and_reports(served: Served) -> None:
    assert served.result.artifact is None and served.result.stay is None
    assert served.result.metrics["tokens_per_second"] > 0
    assert "tokens/s" in served.result.headline


def test_the_proxy_is_the_one_that_we_ship(served: Served) -> None:
    assert listener(served.config.serve.port) == "haproxy"


def test_the_openai_client_completes_and_streams(served: Served) -> None:
    ids, expected = tiny_model.greedy(served.folder / "1", PROMPT, 32)
    common: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 32, "temperature": 0}
    whole = served.openai.completions.create(**common)
    [choice] = whole.choices
    assert (choice.text, choice.finish_reason) == (expected, "length")
    assert whole.usage is not None and whole.usage.completion_tokens == len(ids)
    assert whole.usage.prompt_tokens == len(PROMPT)
    usage: Any = {"include_usage": True}
    stream = served.openai.completions.create(**common, stream=True, stream_options=usage)
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert [m.id for m in served.openai.models.list()] == ["tiny", "talker", "digits"]
    assert served.openai.models.retrieve("tiny").object == "model"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_lines_for_curl_in_the_documentation_run(served: Served) -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    lines = re.findall(r"^\$ (curl (?:.*\\\n)*.*)$", text, re.MULTILINE)
    answers = []
    (served.folder / "picture.png").write_bytes(tiny_classifier.picture(1))
    for line in lines:
        command = line.replace("http://127.0.0.1:8000", served.url)
        command = command.replace("my-model", "tiny").replace("my-classifier", "digits")
        environment = os.environ | {"HELIOSTAT_API_KEY": "none", "NO_PROXY": "*"}
        done = subprocess.run(
            ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60,
            cwd=served.folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    whole, stream, classified = answers
    assert json.loads(classified)["data"][0]["label"] in {"one", "零"}
    expected = tiny_model.greedy(served.folder / "1", "你好", 16)[1]
    assert json.loads(whole)["choices"][0]["text"] == expected
    frames = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert frames.pop() == "[DONE]"
    assert "".join(json.loads(frame)["choices"][0]["text"] for frame in frames) == expected


def test_pictures_are_classified_from_json_and_from_a_form(served: Served) -> None:
    files = [tiny_classifier.picture(place) for place in range(3)]
    inputs = [{"image": base64.b64encode(file).decode()} for file in files]
    local = families.load("image_classifier").predictor(served.folder / "digits" / "files")
    expected = local.predict(inputs)
    said = served.http.post("/v1/classify", json={"model": "digits", "inputs": inputs})
    parts = [("image", (f"图{n}.png", file, "image/png")) for n, file in enumerate(files)]
    sent = served.http.post("/v1/classify", data={"model": "digits"}, files=parts)
    assert said.json() == sent.json() and said.headers["x-model-id"] == "model/digits@1"
    for answer, right in zip(said.json()["data"], expected, strict=True):
        assert answer["label"] == right["label"]
        assert answer["scores"] == pytest.approx(right["scores"], abs=1e-5)
    broken = [("image", ("a.png", files[0][:60], "image/png"))]
    refused = served.http.post("/v1/classify", data={"model": "digits"}, files=broken)
    assert refused.status_code == 400 and "PNG or JPEG" in refused.json()["error"]["message"]
    words = served.complete(model="digits")
    assert words.status_code == 400 and "/v1/classify" in words.json()["error"]["message"]


def test_a_chat_renders_the_models_own_template(served: Served) -> None:
    parts = [{"type": "text", "text": "你好"}]
    messages: list[Any] = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    common: dict[str, Any] = {"model": "talker", "messages": messages, "temperature": 0}
    _, expected = tiny_model.greedy(served.folder / "talker", "s:s\nu:你好\na:", 20)
    whole = served.openai.chat.completions.create(**common, max_completion_tokens=20)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage is not None and whole.usage.prompt_tokens == len("s:s\nu:你好\na:".encode())
    chunks = list(served.openai.chat.completions.create(**common, max_tokens=20, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    # Without a limit it goes on while the context has room.
    endless = served.openai.chat.completions.create(**common)
    assert endless.usage is not None and endless.usage.total_tokens == tiny_model.CONTEXT


def test_a_base_model_says_what_to_do_instead_of_a_chat(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="chat template: use /v1/completions"):
        served.openai.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a"}]
        )


def test_log_probabilities_bias_and_penalties(served: Served) -> None:
    common: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "temperature": 0}
    plain = served.openai.completions.create(**common, max_tokens=4, logprobs=2, echo=True)
    scores = plain.choices[0].logprobs
    assert scores is not None and scores.token_logprobs is not None and scores.tokens is not None
    assert scores.token_logprobs[0] is None and len(scores.tokens) == len(PROMPT) + 4
    assert "".join(scores.tokens[: len(PROMPT)]) == PROMPT
    assert scores.top_logprobs is not None
    best = max(scores.top_logprobs[-1].items(), key=lambda item: item[1])
    assert best[0] == scores.tokens[-1] and best[1] == pytest.approx(scores.token_logprobs[-1])
    [wanted] = served.http.post("/tokenize", json={"model": "tiny", "prompt": "Q"}).json()["tokens"]
    alone = served.openai.completions.create(**common, max_tokens=0, logprobs=2, echo=True)
    assert alone.choices[0].text == PROMPT and alone.choices[0].logprobs is not None
    assert alone.choices[0].logprobs.token_logprobs == scores.token_logprobs[: len(PROMPT)]
    biased = served.openai.completions.create(**common, max_tokens=4, logit_bias={str(wanted): 100})
    assert biased.choices[0].text == "QQQQ"
    shunned = served.openai.completions.create(
        **common, max_tokens=4, logit_bias={str(wanted): 2}, frequency_penalty=2, presence_penalty=2
    )
    assert shunned.choices[0].text != biased.choices[0].text
    told = served.openai.chat.completions.create(
        model="talker", messages=[{"role": "user", "content": "好"}], max_tokens=3, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    content = told.choices[0].logprobs
    assert content is not None and content.content is not None
    assert [len(token.top_logprobs) for token in content.content] == [2] * len(content.content)


def test_text_becomes_tokens_and_text_again(served: Served) -> None:
    asked = {"model": "tiny", "prompt": "好 a"}
    tokens = served.http.post("/tokenize", json=asked).json()
    assert tokens["count"] == 5 and tokens["max_model_len"] == tiny_model.CONTEXT
    back = served.http.post("/detokenize", json={"model": "tiny", "tokens": tokens["tokens"]})
    assert back.json()["prompt"] == "好 a"
    chat = {"model": "talker", "messages": [{"role": "user", "content": "a"}]}
    assert served.http.post("/tokenize", json=chat).json()["count"] == len("u:a\na:")


def test_greedy_over_http_equals_generate_with_a_full_batch(served: Served) -> None:
    prompts = ["def ", "你好", "x", "import os"]
    expected = [tiny_model.greedy(served.folder / "1", p, 24)[1] for p in prompts]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda p: served.complete(prompt=p, max_tokens=24), prompts))
    assert [a.json()["choices"][0]["text"] for a in answers] == expected
    together = served.complete(prompt=prompts, max_tokens=24).json()
    assert [c["text"] for c in together["choices"]] == expected
    assert together["usage"]["completion_tokens"] == sum(
        len(tiny_model.greedy(served.folder / "1", p, 24)[0]) for p in prompts
    )


def test_a_stream_is_server_sent_events_that_come_piece_by_piece(served: Served) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 100, "temperature": 0, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=asked) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-model-id"] == served.model.id
        chunks = list(response.iter_raw())
    frames = b"".join(chunks).split(b"\n\n")
    assert frames[-2:] == [b"data: [DONE]", b""]
    assert all(json.loads(f.removeprefix(b"data: "))["object"] for f in frames[:-2])
    # Tokens of up to 20 ms come together; a tiny model makes many in that time.
    assert len(chunks) > 2


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nowhere", None, 404, None),
        ("GET", "/v1/completions", None, 405, None),
        ("GET", "/v1/models/other", None, 404, "model_not_found"),
        ("POST", "/v1/completions", b"{", 400, None),
        ("POST", "/v1/completions", b" " * ((8 << 20) + 1), 413, "body_too_large"),
        ("POST", "/v1/completions", b'{"model":"other","prompt":"a"}', 404, "model_not_found"),
        ("POST", "/v1/completions", LONG, 400, "context_length_exceeded"),
        ("POST", "/v1/classify", b'{"model":"tiny","inputs":[{"pixels":[[0]]}]}', 400, None),
    ],
)
def test_errors_have_one_shape(
    served: Served, method: str, path: str, body: bytes | None, status: int, code: str | None
) -> None:
    headers = {"content-type": "application/json", "x-request-id": "mine-1"}
    answer = served.http.request(method, path, content=body, headers=headers)
    assert answer.status_code == status
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)


def test_the_page_comes_with_its_policy(served: Served) -> None:
    answer = served.http.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "<title>" in answer.text
    assert served.http.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("headers", [{}, {"x-request-disconnect-disabled": "?1"}])
@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish_free_their_places(
    served: Served, stream: bool, headers: dict[str, str]
) -> None:
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 120, "temperature": 2, "stream": stream}

    async def leave_early() -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            tasks = [
                asyncio.create_task(
                    client.post(f"{served.url}/v1/completions", json=asked, headers=headers)
                )
                for _ in range(6)
            ]
            await asyncio.sleep(0.1)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    for _ in range(2):
        asyncio.run(leave_early())
    # An answer that runs to its end frees its place, too: whether the proxy has seen that nobody
    # waits for it shows in its own side of the connection.
    assert until(lambda: not half_closed(served.http.base_url.port), 2)
    assert until(lambda: busy() == 0, 10)


def test_overload_is_answered_at_once_and_serves_the_rest(served: Served) -> None:
    def ask(_: int) -> tuple[int, str | None]:
        answer = served.complete(prompt="a", max_tokens=100)
        return answer.status_code, answer.headers.get("retry-after")

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(24)))
    assert {status for status, _ in answers} == {200, 503}
    assert all(retry == "1" for status, retry in answers if status == 503)


def test_who_expects_an_interim_answer_gets_the_whole_one(served: Served) -> None:
    """HAProxy held back the rest of an answer that came together with `100 Continue`."""
    at = (served.http.base_url.host, served.http.base_url.port)
    ask = b"GET / HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\nconnection: close\r\n"
    page = served.http.get("/").content
    for _ in range(50):
        with socket.create_connection(at, timeout=20) as client:
            client.sendall(ask + b"content-length: 2\r\n\r\n{}")
            answer = b"".join(iter(partial(client.recv, 1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 200 OK") and answer.endswith(page)


def test_odd_requests_break_nothing(served: Served) -> None:
    parts = ("tiny", "talker", "digits", "Ingress")
    before, weight = [pids(part) for part in parts], memory(parts)
    found = fire(served.http, 200, seed=20261122)
    print(dict(found))
    assert {200, 400, 404, 405, 415} <= {status for _, status in found}
    answered = {path for path, status in found if status == 200}
    assert {"/v1/completions", "/v1/chat/completions", "/v1/classify", "/tokenize"} <= answered
    assert [pids(part) for part in parts] == before
    assert until(lambda: busy() == 0, 5)
    assert memory(parts) - weight < 100 * 2**20


def test_each_request_leaves_a_line_that_tells_nothing_of_what_was_said(served: Served) -> None:
    secret_words = "定日镜 heliostat-canary"
    served.http.post(
        "/v1/completions",
        json={"model": "tiny", "prompt": secret_words, "max_tokens": 2},
        headers={"x-request-id": "seen-in-logs-1"},
    )
    folder = Path(os.environ["RAY_TMPDIR"], "ray", "session_latest", "logs", "serve")

    def lines() -> list[Any]:
        text = "".join(file.read_text("utf-8") for file in folder.glob("*Ingress*.log"))
        return [json.loads(line) for line in text.splitlines() if "seen-in-logs-1" in line]

    assert until(lambda: bool(lines()), 10)
    told = lines()[0]["heliostat"]
    assert told["status"] == 200 and told["route"] == "/v1/completions" and told["tokens"] == 28
    logs = b"".join(file.read_bytes() for file in folder.parent.rglob("*") if file.is_file())
    assert b"heliostat-canary" not in logs and "定日镜".encode() not in logs


def test_prometheus_sees_the_engine(served: Served) -> None:
    import ray

    [port] = [node["MetricsExportPort"] for node in ray.nodes()]
    served.complete()

    def figures() -> str:
        return served.http.get(f"http://127.0.0.1:{port}/metrics").text

    wanted = (
        "ray_heliostat_num_requests_running", "ray_heliostat_num_requests_waiting",
        "ray_heliostat_kv_cache_usage", "ray_heliostat_requests_total",
        "ray_heliostat_time_to_first_token_seconds_bucket",
        "ray_heliostat_time_per_output_token_seconds_bucket",
    )  # fmt: skip

    def told() -> bool:
        lines = [line for line in figures().splitlines() if 'model="tiny"' in line]
        ours = [line for line in lines if 'version="1"' in line]
        return all(any(line.startswith(name) for line in ours) for name in wanted)

    assert until(told, 30), figures()


def test_a_replica_that_dies_cuts_a_stream_with_an_error_and_loses_no_answer(
    served: Served,
) -> None:
    expected = served.complete(max_tokens=100).json()["choices"][0]["text"]
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 100, "temperature": 0}
    for _ in range(5):
        [victim] = pids()
        with ThreadPoolExecutor(3) as pool:
            whole = [pool.submit(served.complete, max_tokens=100) for _ in range(3)]
            with served.http.stream(
                "POST", "/v1/completions", json=asked | {"stream": True}
            ) as response:
                lines = response.iter_lines()
                assert next(lines).startswith("data: ")
                os.kill(victim, signal.SIGKILL)
                rest = [line for line in lines if line]
            answers = [one.result() for one in whole]
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.json()["choices"][0]["text"] for answer in answers} == {expected}
        assert until(lambda gone=victim: len(pids()) == 1 and pids() != [gone], 60)  # type: ignore[misc]
        if rest[-1] != "data: [DONE]":  # otherwise it was over before the replica was
            break
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "replica_lost"


def test_a_new_version_loads_in_place(served: Served) -> None:
    before = pids()
    newer = served.publish(seed=1)
    app.run(served.config)
    answer = served.complete(max_tokens=16)
    assert answer.headers["x-model-id"] == newer.id == "model/tiny@2"
    expected = tiny_model.greedy(served.folder / "seed1", PROMPT, 16)[1]
    assert answer.json()["choices"][0]["text"] == expected
    assert pids() == before


def test_another_port_on_a_running_serve_is_refused(served: Served) -> None:
    other = config("gpt-demo", "name=tiny", f"serve.port={free_port()}", root=served.store.root)
    with pytest.raises(PortError, match="runs on this cluster already"):
        app.run(other)


def test_a_damaged_model_leaves_the_one_before_in_service(served: Served) -> None:
    before = served.complete().headers["x-model-id"]
    damaged = served.publish(seed=2)
    weights = Path(damaged.file("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactError, match="damaged"):
        app.run(served.config)
    assert served.complete().headers["x-model-id"] == before


def test_keys_close_the_service_and_are_revoked_everywhere_in_ten_seconds(served: Served) -> None:
    """From here on the module's service asks for a key."""

    def status(key: str | None) -> int:
        """Of both replicas of the ingress; 0 while they differ."""
        # HAProxy keeps a connection that saw a 401 with the replica that sent it.
        headers = {"connection": "close"}
        headers |= {"authorization": f"Bearer {key}"} if key else {}
        found = {served.http.get("/v1/models", headers=headers).status_code for _ in range(6)}
        return found.pop() if len(found) == 1 else 0

    assert status(None) == 200
    keys = KeyFile(served.store)
    secret, key = new_key("test")
    keys.add(key)
    assert until(lambda: status(None) == 401, 10)
    assert status(secret) == 200 and status(new_key("other")[0]) == 401
    guarded = openai.OpenAI(
        base_url=f"{served.url}/v1", api_key=secret, http_client=httpx.Client(trust_env=False)
    )
    assert guarded.completions.create(model="tiny", prompt="a", max_tokens=2).choices
    with pytest.raises(openai.AuthenticationError):
        served.openai.models.list()
    # Two replicas of the ingress keep one account.
    limited, stored = new_key("limited", quota=Quota(requests_per_minute=6))
    single, alone = new_key("single", quota=Quota(concurrent=1))
    keys.add(stored)
    keys.add(alone)
    assert until(lambda: status(limited) == status(single) == 200, 10)
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    headers = {"authorization": f"Bearer {limited}", "connection": "close"}
    answers = [served.http.post("/v1/completions", json=asked, headers=headers) for _ in range(14)]
    taken = [answer.status_code for answer in answers]
    assert 6 <= taken.count(200) <= 7 and taken.count(429) == 14 - taken.count(200)
    assert all(a.headers["retry-after"] for a in answers if a.status_code == 429)
    one_call_at_a_time(served, single)
    # The stage asks its own service with a key that it makes for itself.
    served.publish(seed=4)  # after the damaged one
    assert app.run(served.config).metrics["tokens_per_second"] > 0
    keys.revoke("test")
    assert until(lambda: status(secret) == 401, 10)
    wrong = {"nobody": None, "a stranger": new_key("other")[0], "who was revoked": secret}
    assert strangers.every_route_is_closed(served.http, "tiny", wrong) > 150
    strangers.odd_requests_get_nothing(served.url)
    guarded.close()


def test_a_model_that_cannot_be_loaded_says_why(served: Served) -> None:
    staging = served.store.stage("model", "tiny")
    detail = {"family": "causal_lm", "context_length": tiny_model.CONTEXT}
    tokenizer = [p for p in (served.folder / "1").iterdir() if p.name.startswith("tokenizer")]
    files = [staging.copy(path, path.name) for path in tokenizer]
    files.append(staging.write("config.json", b'{"model_type": "no such type"}'))
    staging.commit(files, fingerprint="f", config={}, detail=detail)
    with pytest.raises(ServingError, match="tiny: .*no such type"):
        app.run(served.config)


def test_serve_deploy_takes_what_was_written_and_its_deadline_is_kept(
    served: Served, ray_session: Session
) -> None:
    """Other settings make everything new. Of one model, and last: each takes seconds to start."""
    changed = {"models": ("talker@1",), "deadline_seconds": 2.0}
    section = served.config.serve.model_copy(update=changed)
    text = app.write_config(served.config.model_copy(update={"serve": section}))
    assert "hst-" not in text
    before = pids("Ingress") + pids("talker")
    served.deploy(text, ray_session.dashboard)

    def renewed() -> bool:
        now = pids("Ingress"), pids("talker")
        return [len(some) for some in now] == [2, 1] and not {*before} & {*now[0], *now[1]}

    assert until(renewed, 60)
    secret, key = new_key("last")
    KeyFile(served.store).add(key)
    served.http.headers["authorization"] = f"Bearer {secret}"
    asked = {"model": "talker", "prompt": "a", "max_tokens": 2}

    def known(_: int) -> bool:
        return served.complete(**asked).status_code == 200

    with ThreadPoolExecutor(6) as pool:  # so that both replicas of the ingress are asked
        assert until(lambda: all(pool.map(known, range(6))), 15)
    moved = [{"x-request-timeout-seconds": value} for value in ("0", "100", "nan")]
    headers = [{}, *moved, {"x-request-disconnect-disabled": "?1"}]

    def ask(more: dict[str, str]) -> httpx.Response:
        return served.http.post("/v1/completions", json=asked, headers=more)

    with halted("talker"), ThreadPoolExecutor(len(headers)) as pool:
        answers = list(pool.map(ask, headers))
    assert {answer.status_code for answer in answers} == {504}
    assert {answer.json()["error"]["code"] for answer in answers} == {"deadline"}
    assert all(1.9 < answer.elapsed.total_seconds() < 5 for answer in answers)
    assert until(lambda: busy("talker") == 0, 5)
    # None of them ends an answer that is in time.
    assert {answer.status_code for answer in map(ask, headers)} == {200}
