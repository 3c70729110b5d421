"""What a config makes of evaluating, publishing and serving, without a cluster. See
`observed_data`."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from cluster.config import RunConfig
from cluster.placement import Room
from cluster.proxy import environment
from cluster.registry import Registry
from cluster.session import open_store
from cluster.storage import Artifact
from pipelines import evaluate, publish
from pipelines.evaluation import plots
from pipelines.evaluation.trained import Trained
from serving import app, deploy, models, rest
from serving.auth import KeyFile, new_key
from serving.completion import parse_completion
from serving.engines import loading
from serving.engines.base import Event, Finished, GenerationRequest, Started, Tokens
from serving.engines.linear import Int8
from serving.engines.scheduler import Scheduler
from serving.ingress import Ingress
from serving.replica import load_engine
from serving.schema import RequestError
from tests import fakes, tiny_model
from tests import trained as made
from tests.observed_data import joined, patched
from tests.scripted import call


@cache
def _trained() -> tempfile.TemporaryDirectory[str]:
    """A store with a tiny trained model, its evaluation, and two empty registries."""
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name) / "root"
    config = made.text_config(root, name="demo")
    checkpoint = made.checkpoint(config, made.text_corpus(config))
    opened = Trained.open(checkpoint, config)
    report = _measured(opened, [])
    evaluate._commit(checkpoint.store, config, opened, report)
    assert Registry(f"sqlite:///{root}/mlflow.db").resolve("demo", "champion") is None
    shutil.copy(root / "mlflow.db", root / "other.db")
    return folder


def _evaluated(config: RunConfig) -> tuple[evaluate.Report, list[int]]:
    shutil.copytree(Path(_trained().name) / "root", "root")
    checkpoint = open_store(config).artifact("checkpoint", "demo", 1)
    ticks: list[int] = []
    return _measured(Trained.open(checkpoint, config), ticks), ticks


def _measured(trained: Trained, ticks: list[int]) -> evaluate.Report:
    with patched() as patch:
        patch.setattr(plots, "png", lambda draw: b"")  # which takes longer than all the rest
        return evaluate.measure(trained, "cpu", ticks.append)


def metrics(config: RunConfig) -> dict[str, float]:
    return _evaluated(config)[0].metrics


def report(config: RunConfig) -> str:
    """The part of the report that shows what was learned."""
    return _evaluated(config)[0].text.partition("## What it learned")[2]


def measured_at_once(config: RunConfig) -> list[int]:
    return _evaluated(config)[1]


def _published(config: RunConfig) -> Artifact:
    shutil.copytree(Path(_trained().name) / "root", "root")
    with patched() as patch:
        patch.setattr(publish, "session", joined)
        patch.setattr(publish, "run_on_one_node", lambda task, *given: task(Room(1, 0), *given))
        artifact = publish.run(config).artifact
    assert artifact is not None
    return artifact


def card(config: RunConfig) -> str:
    return _published(config).read_bytes("README.md").decode()


def registered(config: RunConfig) -> set[tuple[str, str]]:
    """Registries and aliases that the published model is found by."""
    _published(config)
    places = [(base, alias) for base in ("mlflow", "other") for alias in ("champion", "better")]
    uri = f"sqlite:///{open_store(config).base}"
    return {(b, a) for b, a in places if Registry(f"{uri}/{b}.db").resolve("demo", a)}


# ------------------------------------------------------------------ serve


class ServeApi:
    """Takes what would go to the REST API."""

    deployed: dict[str, Any]

    def __init__(self, dashboard: str) -> None:
        pass

    def deploy(self, config: Any, application: dict[str, Any]) -> None:
        ServeApi.deployed = deploy.serve_config(config, application, [])

    def wait(self, application: dict[str, Any]) -> None:
        pass


def _served(config: RunConfig) -> tuple[dict[str, Any], Any]:
    """The whole Serve config of two tiny models, and the stage's result."""
    answer = {"choices": [{"text": "好"}], "usage": {"completion_tokens": 1}}
    store = open_store(config)
    for name in ("demo", "other"):
        fakes.commit(store, "model", name, detail={"family": "causal_lm", "context_length": 128})
    if not (Path(store.base) / "keys.json").exists():
        KeyFile(store).add(new_key("test")[1])
    with patched() as patch:
        patch.setattr(app, "session", joined)
        patch.setattr(app, "_shipped_code", dict)
        patch.setattr(rest, "Serve", ServeApi)
        patch.setattr(rest, "wait_for_models", lambda *given: None)
        patch.setattr(rest, "call", lambda *given: answer)
        result = app.run(config)
    return ServeApi.deployed, result


def _application(config: RunConfig) -> dict[str, Any]:
    application: dict[str, Any] = _served(config)[0]["applications"][0]
    return application


def http(config: RunConfig) -> tuple[Any, str]:
    deployed, result = _served(config)
    return deployed["http_options"], result.url


def stays(config: RunConfig) -> bool:
    return _served(config)[1].stay is not None


def deployments(config: RunConfig) -> list[dict[str, Any]]:
    """What Serve is told of each deployment; the operator's key is another one each time."""
    told = _application(config)["deployments"]
    return [{k: v for k, v in one.items() if k != "user_config"} for one in told]


def models_served(config: RunConfig) -> list[str]:
    return [one["user_config"]["model"] for one in _application(config)["deployments"][1:]]


def threads(config: RunConfig) -> int:
    """Of the process that a replica has loaded its engine in."""
    options = _application(config)["args"]["engine"]
    model, before = tiny_model.publish(open_store(config), Path("tiny")), torch.get_num_threads()
    try:
        load_engine(model, options).close()
        with ThreadPoolExecutor(1) as later:  # as the engine's own thread is
            return later.submit(torch.get_num_threads).result()
    finally:
        torch.set_num_threads(before)


def runner(config: RunConfig) -> tuple[str, int, int, float]:
    """Of the loaded engine, as if int8 were right and fast: precision, tokens of a row, rows for
    prefixes, seconds between the pieces of a stream."""
    model = tiny_model.publish(open_store(config), Path("tiny"))
    with patched() as patch:
        patch.setattr(loading.parity, "check", lambda *_: None)
        patch.setattr(loading, "_checked", lambda *_: True)
        patch.setattr(loading, "layer", lambda kind, _: kind)
        patch.setattr(loading, "seconds", lambda kinds, _: [[kind is not Int8] for kind in kinds])
        engine: Any = load_engine(model, _application(config)["args"]["engine"])
    engine.close()
    made = engine._runner
    return made.precision, made.context_length, made.spare, engine._stream_interval


def queue(config: RunConfig) -> tuple[int, int]:
    """Of 100 requests at once: how many run, and how many are taken."""
    options = _application(config)["args"]["engine"]
    scheduler = Scheduler(options["slots"], options["max_waiting"])
    taken = sum(scheduler.submit(str(n)) for n in range(100))
    for _ in range(100):
        scheduler.next_step()
    return scheduler.running, taken


def proxy(config: RunConfig) -> dict[str, str]:
    """What a Ray of our own starts with."""
    with patched() as patch:
        patch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
        return environment(config.serve)


def _ingress(config: RunConfig, engine: Any = None) -> Any:
    deployment: Any = Ingress
    below_serve = deployment.func_or_class.__mro__[1]  # the class as it is written
    args = _application(config)["args"]
    made = below_serve(args["store"], args["settings"], {"demo": engine or Handle()})
    secret, operator = deploy.operator_key()
    cards = [served.card.__dict__ for served in models.chosen(config, open_store(config))]
    known = {"id": operator.id, "digest": operator.digest, "expires": operator.expires}
    made.reconfigure({"models": cards, "operator": known})
    return made, secret


def longest_answer(config: RunConfig) -> bool:
    """Whether a request may ask for 100 tokens."""
    limits = _ingress(config)[0].service.limits
    try:
        parse_completion(b'{"model": "demo", "prompt": "a", "max_tokens": 100}', limits)
    except RequestError:
        return False
    return True


async def _dawdle(request: GenerationRequest) -> AsyncIterator[Event]:
    yield Started("model/demo@1", 1)
    await asyncio.sleep(0.4)
    yield Tokens("a", (1,))
    yield Finished("length", 1)


class Handle:
    """Of a deployment whose engine takes a while."""

    def options(self, stream: bool) -> Any:
        return SimpleNamespace(submit=SimpleNamespace(remote=Events))


class Events:
    """What a handle's call gives: events, and a way to give them up."""

    def __init__(self, request: GenerationRequest) -> None:
        self._events = _dawdle(request)

    async def __aiter__(self) -> AsyncIterator[tuple[Event, ...]]:
        async for event in self._events:
            yield (event,)

    def cancel(self) -> None:
        pass


def _asked(config: RunConfig, **body: Any) -> Any:
    made, secret = _ingress(config)
    asked = {"model": "demo", "prompt": "a", "max_tokens": 1, **body}
    headers = {"authorization": f"Bearer {secret}"}
    border = made.__serve_build_asgi_app__()
    return call(border, "POST", "/v1/completions", json=asked, headers=headers)


def answer_in_time(config: RunConfig) -> int:
    """What a request gets from an engine that takes a while."""
    status: int = _asked(config).status_code
    return status


def long_body(config: RunConfig) -> int:
    """What a request of five kilobytes gets."""
    status: int = _asked(config, user="a" * 5000).status_code
    return status


def quota(config: RunConfig) -> Any:
    """Of a key that has none of its own."""
    return _ingress(config)[0].admission._default
