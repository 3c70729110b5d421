"""A published model behind HTTP on a real local Ray: the stage, the answers, the faults."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.config import RunConfig
from cluster.errors import ArtifactError, PortError, ServingError, UsageError
from cluster.storage import Artifact, Store
from serving import app, deploy
from tests import tiny_model
from tests.fakes import config
from tests.ports import free_port

pytestmark = pytest.mark.cluster
PROMPT = "def "


class Served:
    """A running service over a store of its own."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(str(folder / "root"))
        self.folder = folder
        self.model = tiny_model.publish(self.store, folder / "1")
        self.config: RunConfig = config(
            "gpt-demo",
            "name=tiny",
            f"serve.port={free_port()}",
            "serve.wait=false",
            "serve.max_concurrent=4",
            "serve.max_waiting=2",
            "serve.deadline_seconds=20",
            root=self.store.root,
        )
        self.result = app.run(self.config)
        assert self.result.url is not None
        self.url = self.result.url
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx.Client(trust_env=False),
        )

    def publish(self, seed: int) -> Artifact:
        return tiny_model.publish(self.store, self.folder / f"seed{seed}", seed=seed)

    def complete(self, **fields: Any) -> httpx.Response:
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | fields
        return self.http.post("/v1/completions", json=asked)


@pytest.fixture(scope="module")
def served(ray_session: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    service = Served(tmp_path_factory.mktemp("serve"))
    yield service
    service.http.close()
    service.openai.close()
    import ray.serve

    ray.serve.shutdown()


def test_the_stage_answers_itself_and_reports(served: Served) -> None:
    assert served.result.artifact is None and served.result.stay is None
    assert served.result.metrics["tokens_per_second"] > 0
    assert "tokens/s" in served.result.headline


def test_the_openai_client_completes_and_streams(served: Served) -> None:
    ids, expected = tiny_model.greedy(served.folder / "1", PROMPT, 32)
    common: dict[str, Any] = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 32,
        "temperature": 0,
    }
    whole = served.openai.completions.create(**common)
    assert whole.choices[0].text == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == len(ids)
    assert whole.usage.prompt_tokens == len(PROMPT)
    chunks = list(
        served.openai.completions.create(
            **common, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert [m.id for m in served.openai.models.list()] == ["tiny"]
    assert served.openai.models.retrieve("tiny").object == "model"


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


def test_a_stream_is_server_sent_events_that_come_one_by_one(served: Served) -> None:
    asked = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 100,
        "temperature": 0,
        "stream": True,
    }
    with served.http.stream("POST", "/v1/completions", json=asked) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-model-id"] == served.model.id
        chunks = list(response.iter_raw())
    frames = b"".join(chunks).split(b"\n\n")
    assert frames[-2:] == [b"data: [DONE]", b""]
    assert all(json.loads(f.removeprefix(b"data: "))["object"] for f in frames[:-2])
    assert len(chunks) > 5


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nowhere", None, 404, None),
        ("GET", "/v1/completions", None, 405, None),
        ("GET", "/v1/models/other", None, 404, "model_not_found"),
        ("POST", "/v1/completions", b"{", 400, None),
        ("POST", "/v1/completions", b" " * ((1 << 20) + 1), 413, "body_too_large"),
        ("POST", "/v1/completions", b'{"model":"other","prompt":"a"}', 404, "model_not_found"),
        (
            "POST",
            "/v1/completions",
            json.dumps({"model": "tiny", "prompt": "a" * 200}).encode(),
            400,
            "context_length_exceeded",
        ),
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
    assert served.http.get("/health").json() == {"status": "ok", "models": ["tiny"]}


def _busy() -> int:
    import ray.serve

    handle = ray.serve.get_deployment_handle("tiny", deploy.APPLICATION)
    stats = handle.stats.remote().result()
    return int(stats["running"] + stats["waiting"])


@pytest.mark.parametrize("headers", [{}, {"x-request-disconnect-disabled": "1"}])
@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish_free_their_places(
    served: Served, stream: bool, headers: dict[str, str]
) -> None:
    # Never ends by itself within the test: the whole context for each of several choices.
    asked = {
        "model": "tiny",
        "prompt": "a",
        "max_tokens": 120,
        "n": 4,
        "stream": stream,
        "temperature": 2,
    }

    async def leave_early() -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            for _ in range(2):
                task = asyncio.create_task(
                    client.post(f"{served.url}/v1/completions", json=asked, headers=headers)
                )
                await asyncio.sleep(0.05)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave_early())
    ends = time.monotonic() + 2
    while _busy() and time.monotonic() < ends:
        time.sleep(0.02)
    assert _busy() == 0


def test_overload_is_answered_at_once_and_serves_the_rest(served: Served) -> None:
    def ask(_: int) -> tuple[int, str | None]:
        answer = served.complete(prompt="a", max_tokens=100)
        if answer.status_code == 500:
            print(answer.text)
        return answer.status_code, answer.headers.get("retry-after")

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(24)))
    assert {status for status, _ in answers} == {200, 503}
    assert all(retry == "1" for status, retry in answers if status == 503)


def test_a_new_version_loads_in_place(served: Served) -> None:
    before = _replica_pid()
    newer = served.publish(seed=1)
    app.run(served.config)
    answer = served.complete(max_tokens=16)
    assert answer.headers["x-model-id"] == newer.id == "model/tiny@2"
    expected = tiny_model.greedy(served.folder / "seed1", PROMPT, 16)[1]
    assert answer.json()["choices"][0]["text"] == expected
    assert _replica_pid() == before


def _replica_pid() -> int:
    import ray
    from ray.util.state import list_actors

    found = list_actors(
        address=ray.get_runtime_context().gcs_address,
        filters=[
            ("class_name", "=", f"ServeReplica:{deploy.APPLICATION}:tiny"),
            ("state", "=", "ALIVE"),
        ],
    )
    return int(found[0]["pid"])


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


def test_a_port_in_use_is_refused_before_any_work(root: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        taken = config("gpt-demo", f"serve.port={port}", root=root)
        with pytest.raises(PortError, match=f"port {port} on 127.0.0.1 is taken"):
            app.check(taken)
    app.check(taken)
    with pytest.raises(PortError, match="not an address"):
        app.check(config("gpt-demo", "serve.host=nowhere.invalid", root=root))


def test_serving_nothing_names_the_stage_to_run_first(root: Path) -> None:
    with pytest.raises(UsageError, match="heliostat publish"):
        app.run(config("gpt-demo", root=root))


def test_a_model_that_cannot_be_loaded_says_why(served: Served) -> None:
    staging = served.store.stage("model", "tiny")
    detail = {"family": "causal_lm", "context_length": tiny_model.CONTEXT}
    tokenizer = [p for p in (served.folder / "1").iterdir() if p.name.startswith("tokenizer")]
    files = [staging.copy(path, path.name) for path in tokenizer]
    files.append(staging.write("config.json", b'{"model_type": "no such type"}'))
    staging.commit(files, fingerprint="f", config={}, detail=detail)
    with pytest.raises(ServingError, match="tiny: .*no such type"):
        app.run(served.config)
