"""What the serving layer adds to an answer that costs nothing: an engine that echoes.

Three servers answer the same small completion: FastAPI on uvicorn with nothing else (`bare`), our
ingress on uvicorn with the echo in its own process (`ingress`), and the whole way through HAProxy,
the ingress deployment and a model deployment (`tiers`). One client process asks each in turn, over
1 and over 32 connections, and reads one stream of 200 tokens. `python benchmarks/serve_layer.py
[ROUNDS]`; the client shares the cores, and where it is the slower one, rates are its own:
`cpu_us` is the processor time that a server's process took for an answer, which is not.
"""

import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvicorn
from fastapi import FastAPI, Request

from serving.admission import Admission, OwnBooks
from serving.auth import KeyRing, Quota
from serving.border import Access
from serving.engines.base import Event, Finished, GenerationRequest, Started, Tokens
from serving.engines.mailbox import compact
from serving.routes import Bounds, create_app
from serving.schema import Limits, ModelCard
from serving.service import Service

PORTS = {"bare": 28101, "ingress": 28102, "tiers": 28103}
CARD = ModelCard("echo", "model/echo@1", 0, "completions", 4096)
BODY = {"model": "echo", "prompt": "The quick brown fox", "max_tokens": 4, "temperature": 0}
SECONDS = 4.0
STREAMED = 200


class Echo:
    """An engine that costs nothing, as a gateway."""

    def models(self) -> Sequence[ModelCard]:
        return (CARD,)

    async def submit(
        self, card: ModelCard, request: Any, *, whole: bool = False
    ) -> AsyncIterator[Event]:
        yield Started(CARD.artifact, 4)
        for _ in range(request.sampling.max_tokens):
            yield Tokens(" echo", (1,))
        yield Finished("length", request.sampling.max_tokens)


class EchoReplica:
    """The same as a deployment: what crosses is what crosses from an engine."""

    async def submit(self, request: GenerationRequest) -> AsyncIterator[tuple[Event, ...]]:
        events = Echo().submit(CARD, request)
        if request.whole:
            yield tuple(compact([event async for event in events]))
        else:
            async for event in events:
                yield (event,)


def bare() -> None:
    app = FastAPI()

    @app.post("/v1/completions")
    async def answer(request: Request) -> dict[str, Any]:
        asked = await request.json()
        choice = {"index": 0, "text": " echo" * asked["max_tokens"], "finish_reason": "length"}
        return {"object": "text_completion", "model": asked["model"], "choices": [choice]}

    uvicorn.run(app, port=PORTS["bare"], log_level="error", access_log=False)


def ingress() -> None:
    ring = KeyRing(lambda: None)
    ring.load()
    service = Service(Echo(), Limits(1024, 16), 60.0)
    admission = Admission(OwnBooks(), Quota())
    app = create_app(service, Access(ring, loopback=True), admission, Bounds())
    uvicorn.run(app, port=PORTS["ingress"], log_level="error", access_log=False)


def tiers(root: str) -> None:
    """Start the whole way and hold it."""
    from cluster import loading
    from cluster.session import session

    config = loading.load("gpt-demo", [f"storage.root={root}", "ray.cpus=4"])
    with session(config):
        import ray.serve
        from serve_layer import EchoReplica  # by a name that replicas can import, too

        from serving.ingress import Ingress

        settings = {
            "max_tokens": 1024, "choices": 16, "deadline_seconds": 60.0, "max_requests": 1000,
            "max_body_bytes": 8 << 20, "loopback": True, "quota": {},
        }  # fmt: skip
        ray.serve.start(http_options={"host": "127.0.0.1", "port": PORTS["tiers"]})
        echo: Any = ray.serve.deployment(EchoReplica).options(name="echo", max_ongoing_requests=500)
        front: Any = Ingress
        front = front.options(
            max_ongoing_requests=2000, user_config={"models": [CARD.__dict__], "operator": None}
        )
        ray.serve.run(front.bind(root, settings, {"echo": echo.bind()}, None))
        while True:
            time.sleep(1)


async def load(client: aiohttp.ClientSession, url: str, connections: int) -> list[float]:
    """Seconds of each answer within the time, over so many connections."""
    ends, spent = time.monotonic() + SECONDS, list[float]()

    async def one() -> None:
        while time.monotonic() < ends:
            began = time.monotonic()
            async with client.post(url, json=BODY) as answer:
                await answer.read()
                assert answer.status == 200, await answer.text()
            spent.append(time.monotonic() - began)

    await asyncio.gather(*(one() for _ in range(connections)))
    return spent


async def stream(client: aiohttp.ClientSession, url: str) -> tuple[float, float]:
    """Seconds to the first byte, and per token after it."""
    began, first = time.monotonic(), 0.0
    body = {**BODY, "max_tokens": STREAMED, "stream": True}
    async with client.post(url, json=body) as answer:
        async for _ in answer.content.iter_any():
            first = first or time.monotonic()
    return first - began, (time.monotonic() - first) / STREAMED


async def measure(rounds: int, pids: Mapping[str, int]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    connector = aiohttp.TCPConnector(limit=64)
    async with aiohttp.ClientSession(connector=connector, trust_env=False) as client:
        urls = {n: f"http://127.0.0.1:{port}/v1/completions" for n, port in PORTS.items()}
        for url in urls.values():
            await answering(client, url)
        for turn in range(rounds):
            order = list(urls.items())
            for name, url in order[turn % 3 :] + order[: turn % 3]:
                for connections in (1, 32):
                    before = processor_seconds(pids[name])
                    spent = await load(client, url, connections)
                    taken = processor_seconds(pids[name]) - before
                    note = found.setdefault
                    if name != "tiers":  # which are many processes
                        per_answer = 1e6 * taken / len(spent)
                        note(f"{name}_{connections}_cpu_us", []).append(per_answer)
                    note(f"{name}_{connections}_per_second", []).append(len(spent) / SECONDS)
                    middle = 1000 * statistics.median(spent)
                    note(f"{name}_{connections}_p50_ms", []).append(middle)
                if name != "bare":
                    first, token = await stream(client, url)
                    note(f"{name}_first_byte_ms", []).append(1000 * first)
                    note(f"{name}_token_us", []).append(1e6 * token)
    return {name: statistics.median(values) for name, values in found.items()}


def processor_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


async def answering(client: aiohttp.ClientSession, url: str) -> None:
    ends = time.monotonic() + 120
    while time.monotonic() < ends:
        try:
            async with client.post(url, json=BODY) as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.5)
    raise RuntimeError(f"{url} does not answer")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory(prefix="hs-", ignore_cleanup_errors=True) as root:
        os.environ.setdefault("RAY_TMPDIR", root)
        spawn = multiprocessing.get_context("spawn")
        servers = [spawn.Process(target=bare), spawn.Process(target=ingress)]
        servers.append(spawn.Process(target=tiers, args=(root,)))
        for server in servers:
            server.start()
        try:
            pids = {name: server.pid or 0 for name, server in zip(PORTS, servers, strict=True)}
            seen = asyncio.run(measure(rounds, pids))
        finally:
            for server in servers:
                server.terminate()
                server.join(30)
    figures = {
        "ingress_share_of_bare": seen["ingress_32_per_second"] / seen["bare_32_per_second"],
        "ingress_share_of_bare_cpu": seen["bare_32_cpu_us"] / seen["ingress_32_cpu_us"],
        "ingress_added_p50_ms": seen["ingress_1_p50_ms"] - seen["bare_1_p50_ms"],
        "tiers_added_p50_ms": seen["tiers_1_p50_ms"] - seen["bare_1_p50_ms"],
        **seen,
    }
    for name, value in figures.items():
        print(f"{name:<32} {value:10.2f}")
    print(json.dumps({"figures": {name: round(value, 4) for name, value in figures.items()}}))


if __name__ == "__main__":
    main()
