"""A running service over a store of its own, and what tests ask of it."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai

from cluster.config import RunConfig
from cluster.storage import Artifact, Store
from serving import app, deploy
from tests import tiny_model
from tests.fakes import config
from tests.ports import free_port

PROMPT = "def "


class Served:
    """Two tiny models: `tiny`, a base model, and `talker`, which has a chat template."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.store = Store(str(folder / "root"))
        self.folder = folder
        self.model = tiny_model.publish(self.store, folder / "1")
        tiny_model.publish(self.store, folder / "talker", "talker", 3, tiny_model.TEMPLATE)
        self.config: RunConfig = config(
            "gpt-demo",
            "name=tiny",
            "serve.models=[tiny,talker@1]",
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
