"""STAGE `serve`: models behind HTTP; and the application itself."""

import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster import progress
from cluster.config import RunConfig
from cluster.errors import CapacityError, PortError
from cluster.session import Session, joined_address, open_store, session
from cluster.stages import StageResult
from cluster.storage import Store
from serving.auth import KeyFile
from serving.models import Served, chosen

if TYPE_CHECKING:
    from ray.serve import Application

SAMPLE_TOKENS = 48


def check(config: RunConfig) -> None:
    """Before any work: the port must be free where this process will open it.

    Raises:
        PortError: with the cure.
    """
    if joined_address(config):
        return  # a cluster's Serve may hold it already, for us
    host, port = config.serve.host, config.serve.port
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # As servers do: connections that have just ended do not hold a port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except socket.gaierror:
        raise PortError(f"serve.host {host} is not an address of this machine") from None
    except OSError as error:
        raise PortError(
            f"port {port} on {host} is taken: give another with serve.port=N"
            if error.strerror == "Address already in use"
            else f"port {port} on {host} cannot be opened ({error.strerror}): give another with "
            "serve.port=N or serve.host=ADDRESS"
        ) from None


def run(config: RunConfig) -> StageResult:
    """Deploy the chosen models, or the recipe's newest, and wait until they answer.

    Raises:
        UsageError: if there is no model, the cluster is too small, the port is taken, or the
            service would be open to the network without keys.
        ArtifactError: if a model is damaged; what is served now stays.
        ServingError: with the replica's reason, if it does not come up.
    """
    from serving import deploy, rest

    store = open_store(config)
    models, guarded = _examined(config, store)
    with session(config) as joined:
        _check_capacity(config, joined, len(models))
        if len(joined.nodes) > 1 and deploy.is_loopback(config.serve.host):
            progress.say(
                f"serve: {config.serve.host} on {len(joined.nodes)} nodes: each node's proxy "
                "reaches its own replicas only; serve.host=0.0.0.0, and a key, joins them"
            )
        secret, operator = deploy.operator_key()
        serve = rest.Serve(joined.dashboard)
        application = deploy.application(
            config.serve,
            store.uri,
            models,
            deploy.shape(config.serve, ours=joined.ours, gpus=joined.gpus),
            runtime_env=_shipped_code(),
            operator=operator,
        )
        serve.deploy(config.serve, application)
        serve.wait(application)
        service = Asked(rest.url_of(config.serve), secret if guarded else None)
        rest.wait_for_models(service.url, models, service.key)
        names = ", ".join(served.artifact.id for served in models)
        progress.say(f"serve: {service.url} answers with {names}")
        if config.serve.wait:
            return StageResult(
                None, service.url, url=service.url, stay=lambda: _stay(service.url, names, joined)
            )
        return _ask_itself(config, service, models[0])


def write_config(config: RunConfig) -> str:
    """The Serve config as YAML, for `serve deploy`; nothing is started.

    Raises:
        UsageError, ArtifactError: as `run` does.
    """
    from serving import deploy

    store = open_store(config)
    models, _ = _examined(config, store)
    shape = deploy.shape(config.serve, ours=False, gpus=0)
    ours = deploy.application(config.serve, store.uri, models, shape, runtime_env={})
    return deploy.as_yaml(deploy.serve_config(config.serve, ours, []))


def _examined(config: RunConfig, store: Store) -> tuple[list[Served], bool]:
    """The models to serve, none of them damaged, and whether the service has keys."""
    from serving import deploy

    models = chosen(config, store)
    guarded = deploy.check_guarded(config.serve, KeyFile(store))
    # A replica that cannot load a new version is lost with the version that it had: look first.
    for served in models:
        served.artifact.verify()
    return models, guarded


def build(args: dict[str, Any]) -> "Application":
    """The application, from the arguments in the Serve config (`serve deploy` calls this)."""
    from serving.ingress import Accounts, Ingress
    from serving.replica import ModelReplica

    # Serve's decorators turn the classes into deployments, which type checkers cannot see.
    replica: Any = ModelReplica
    ingress: Any = Ingress
    accounts: Any = Accounts
    engines = {
        name: replica.options(name=name).bind(args["store"], args["engine"])
        for name in args["models"]
    }
    shared = accounts.bind() if args["shared_accounts"] else None
    return ingress.bind(args["store"], args["settings"], engines, shared)


def _check_capacity(config: RunConfig, joined: Session, models: int) -> None:
    threads = config.serve.threads_per_replica
    # What follows the load takes what there is; what is fixed must fit.
    replicas = config.serve.replicas if isinstance(config.serve.replicas, int) else 1
    wanted = threads * replicas * models
    if wanted > joined.cpus:
        raise CapacityError(
            f"serve.replicas {replicas} with serve.threads_per_replica {threads} of {models} "
            f"model(s) need {wanted} CPUs and the cluster has {joined.cpus}: take fewer"
        )
    if joined.gpus and config.serve.gpus_per_replica is None and replicas * models > joined.gpus:
        raise CapacityError(
            f"serve.replicas {replicas} of {models} model(s) need as many GPUs and the cluster has "
            f"{joined.gpus}: take serve.replicas={joined.gpus} or fewer, or a share of a GPU each "
            "with serve.gpus_per_replica"
        )


def _shipped_code() -> Mapping[str, Any]:
    """Inside a submitted job our code lies in the job's working directory: replicas need it too."""
    import ray

    job = ray.get_runtime_context().runtime_env
    return {key: job[key] for key in ("working_dir", "py_modules") if job.get(key)}


def _stay(url: str, models: str, joined: Session) -> None:
    """Until Ctrl-C, which is the ordinary end and no fault."""
    progress.say(f"serving {models} at {url}. Ctrl-C stops " + ("it" if joined.ours else "here"))
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        progress.say(
            "stopped" if joined.ours else f"{url} stays up; `serve shutdown` on the cluster ends it"
        )


@dataclass(frozen=True)
class Asked:
    """A service, and the key to ask it with."""

    url: str
    key: str | None


def _ask_itself(config: RunConfig, service: Asked, served: Served) -> StageResult:
    """One request over HTTP, as any client would send it."""
    from serving import rest

    url, card = service.url, served.card
    began = time.monotonic()
    timeout = config.serve.deadline_seconds + 10
    if card.route == "classify":
        asked = rest.call(f"{url}/v1/classify", _stroke(card.id), timeout, service.key)
        answer = asked["data"][0]
        headline = f"{url}: a vertical stroke is {answer['label']} ({answer['score']:.2f})"
        seconds = time.monotonic() - began
        progress.say(f"serve: {headline}")
        return StageResult(None, headline, {"answer_seconds": seconds}, url)
    body = _completion(config, served)
    answer = rest.call(f"{url}/v1/completions", body, timeout, service.key)
    seconds = time.monotonic() - began
    progress.say(f"serve: asked {body['prompt']!r}, answered {answer['choices'][0]['text']!r}")
    rate = answer["usage"]["completion_tokens"] / seconds
    metrics = {"answer_seconds": seconds, "tokens_per_second": rate}
    return StageResult(None, f"{url}, {rate:.0f} tokens/s", metrics, url)


def _completion(config: RunConfig, served: Served) -> dict[str, Any]:
    context = int(served.card.context_length or 2 * SAMPLE_TOKENS)
    tokens = max(1, min(SAMPLE_TOKENS, config.serve.max_tokens, context // 2))
    prompt = config.evaluate.prompt
    return {"model": served.card.id, "prompt": prompt, "max_tokens": tokens, "temperature": 0}


def _stroke(model: str) -> dict[str, Any]:
    """A bright vertical line on black, which any image classifier can look at."""
    rows = [[255 if 14 <= x < 18 and 4 <= y < 28 else 0 for x in range(32)] for y in range(32)]
    return {"model": model, "inputs": [{"pixels": rows}]}
