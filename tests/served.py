"""A running service over a store of its own, and what tests ask of it."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from cluster.config import RunConfig
from cluster.storage import Artifact, Store
from serving import app, deploy
from tests import tiny_classifier, tiny_model
from tests.fakes import config
from tests.ports import free_port

PROMPT = "def "


class Served:
    """Three tiny models: `tiny`, a base model, `talker`, which has a chat template, and `digits`,
    which classifies images."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.store = Store(str(folder / "root"))
        self.folder = folder
        self.model = tiny_model.publish(self.store, folder / "1")
        tiny_model.publish(self.store, folder / "talker", "talker", 3, tiny_model.TEMPLATE)
        tiny_classifier.publish(self.store, folder / "digits")
        self.config: RunConfig = config(
            "gpt-demo",
            "name=tiny",
            "serve.models=[tiny,talker@1,digits]",
            f"serve.port={free_port()}",
            "serve.wait=false",
            *overrides,
            root=self.store.root,
        )
        self.result = app.run(self.config)
        assert self.result.url is not None
        self.url = self.result.url
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
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

    def deploy(self, text: str, dashboard: str) -> None:
        """A written config, with Ray's own command, as on a cluster."""
        file = self.folder / "serve.yaml"
        file.write_text(text, "utf-8")
        command = [str(Path(sys.executable).with_name("serve")), "deploy", str(file)]
        address = os.environ | {"RAY_DASHBOARD_ADDRESS": f"http://{dashboard}", "NO_PROXY": "*"}
        done = subprocess.run(command, env=address, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        self.http.close()
        self.openai.close()
        import ray.serve

        ray.serve.shutdown()


_LOOP = asyncio.new_event_loop()
"""In throughput mode a handle belongs to the event loop that it was made in."""
threading.Thread(target=_LOOP.run_forever, daemon=True).start()


def busy(model: str = "tiny") -> int:
    """Requests that a replica of the model holds."""

    async def asked() -> Any:
        import ray.serve

        handle = ray.serve.get_deployment_handle(model, deploy.APPLICATION)
        return await handle.stats.remote()

    stats = asyncio.run_coroutine_threadsafe(asked(), _LOOP).result(20)
    return int(stats.running + stats.waiting)


def half_closed(port: int | None) -> int:
    """Connections to a port whose clients have closed them, and the server has not."""
    found = psutil.net_connections("tcp")
    return sum(one.status == psutil.CONN_CLOSE_WAIT and one.laddr.port == port for one in found)


def pids(deployment: str = "tiny") -> list[int]:
    """Processes of a deployment's live replicas."""
    import ray
    from ray.util.state import list_actors

    found = list_actors(
        address=ray.get_runtime_context().gcs_address,
        filters=[
            ("class_name", "=", f"ServeReplica:{deploy.APPLICATION}:{deployment}"),
            ("state", "=", "ALIVE"),
        ],
    )
    return sorted(int(actor["pid"]) for actor in found)


@contextmanager
def halted(deployment: str) -> Iterator[None]:
    """Its replicas stand still, as on a machine that hangs."""
    there = pids(deployment)
    assert there
    try:
        for pid in there:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in there:
            os.kill(pid, signal.SIGCONT)


def one_call_at_a_time(served: Served, key: str) -> None:
    """Of two calls of a key that may have one open, one is refused at once."""
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    headers = {"authorization": f"Bearer {key}"}

    def ask(_: int) -> httpx.Response:
        return served.http.post("/v1/completions", json=asked, headers=headers)

    with ThreadPoolExecutor(2) as pool:
        with halted("tiny"):
            calls = [pool.submit(ask, n) for n in range(2)]
            refused = next(as_completed(calls, timeout=2)).result()
        answers = [call.result() for call in calls]
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert "may have 1" in refused.json()["error"]["message"]
    assert sorted(answer.status_code for answer in answers) == [200, 429]
    assert ask(0).status_code == 200  # its place is free again


def listener(port: int) -> str:
    """Name of the program that takes connections on a port of this machine."""
    import psutil

    there = psutil.net_connections("tcp")
    return next(
        psutil.Process(one.pid).name()
        for one in there
        if one.status == psutil.CONN_LISTEN and one.laddr.port == port
    )


def memory(deployments: tuple[str, ...]) -> int:
    """Bytes of memory that the replicas have to themselves."""
    import psutil

    return sum(psutil.Process(pid).memory_full_info().uss for d in deployments for pid in pids(d))


def until(true: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true within the time."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if true():
            return True
        time.sleep(0.05)
    return true()
