"""STAGE `serve`: the newest model of a recipe behind HTTP; and the application itself."""

import socket
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster import progress
from cluster.config import RunConfig
from cluster.errors import CapacityError, PortError
from cluster.session import Session, joined_address, open_store, session
from cluster.stages import StageResult, required
from cluster.storage import Artifact

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
    """Deploy the newest complete model of the recipe and wait until it answers.

    Raises:
        UsageError: if there is no model, the cluster is too small or the port is taken.
        ArtifactError: if the model is damaged; what is served now stays.
        ServingError: with the replica's reason, if it does not come up.
    """
    from serving import deploy

    model = required("serve", open_store(config), config)
    # A replica that cannot load a new version is lost with the version that it had: look first.
    model.verify()
    with session(config) as joined:
        _check_capacity(config, joined)
        serve = deploy.Serve(joined.dashboard)
        application = deploy.application(
            config.serve, model, gpus=bool(joined.gpus), runtime_env=_shipped_code()
        )
        serve.deploy(config.serve, application)
        serve.wait(application)
        url = deploy.url_of(config.serve)
        deploy.wait_for_model(url, model)
        progress.say(f"serve: {url} answers with {model.id}")
        if config.serve.wait:
            return StageResult(None, url, url=url, stay=lambda: _stay(url, model, joined))
        return _ask_itself(config, url, model)


def build(args: dict[str, Any]) -> "Application":
    """The application, from the arguments in the Serve config (`serve deploy` calls this)."""
    from serving.ingress import Ingress
    from serving.replica import ModelReplica

    # Serve's decorators turn the classes into deployments, which type checkers cannot see.
    replica: Any = ModelReplica
    ingress: Any = Ingress
    engines = {
        name: replica.options(name=name).bind(args["store"], args["engine"])
        for name in args["models"]
    }
    return ingress.bind(args["limits"], engines)


def _check_capacity(config: RunConfig, joined: Session) -> None:
    threads, replicas = config.serve.threads_per_replica, config.serve.replicas
    if threads * replicas > joined.cpus:
        raise CapacityError(
            f"serve.replicas {replicas} with serve.threads_per_replica {threads} need "
            f"{threads * replicas} CPUs and the cluster has {joined.cpus}: take fewer"
        )
    if joined.gpus and replicas > joined.gpus:
        raise CapacityError(
            f"serve.replicas {replicas} needs as many GPUs and the cluster has {joined.gpus}: "
            f"take serve.replicas={joined.gpus} or fewer"
        )


def _shipped_code() -> Mapping[str, Any]:
    """Inside a submitted job our code lies in the job's working directory: replicas need it too."""
    import ray

    job = ray.get_runtime_context().runtime_env
    return {key: job[key] for key in ("working_dir", "py_modules") if job.get(key)}


def _stay(url: str, model: Artifact, joined: Session) -> None:
    """Until Ctrl-C, which is the ordinary end and no fault."""
    progress.say(f"serving {model.id} at {url}. Ctrl-C stops " + ("it" if joined.ours else "here"))
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        progress.say(
            "stopped" if joined.ours else f"{url} stays up; `serve shutdown` on the cluster ends it"
        )


def _ask_itself(config: RunConfig, url: str, model: Artifact) -> StageResult:
    """One request over HTTP, as any client would send it."""
    from serving import deploy

    route = deploy.card(model).route
    began = time.monotonic()
    if route == "classify":
        answer = deploy.call(f"{url}/v1/classify", _stroke(model.name))["data"][0]
        headline = f"{url}: a vertical stroke is {answer['label']} ({answer['score']:.2f})"
        seconds = time.monotonic() - began
        progress.say(f"serve: {headline}")
        return StageResult(None, headline, {"answer_seconds": seconds}, url)
    body = _completion(config, model)
    answer = deploy.call(f"{url}/v1/completions", body, config.serve.deadline_seconds + 10)
    seconds = time.monotonic() - began
    progress.say(f"serve: asked {body['prompt']!r}, answered {answer['choices'][0]['text']!r}")
    rate = answer["usage"]["completion_tokens"] / seconds
    metrics = {"answer_seconds": seconds, "tokens_per_second": rate}
    return StageResult(None, f"{url}, {rate:.0f} tokens/s", metrics, url)


def _completion(config: RunConfig, model: Artifact) -> dict[str, Any]:
    context = int(model.manifest.detail["context_length"])
    tokens = max(1, min(SAMPLE_TOKENS, config.serve.max_tokens, context // 2))
    prompt = config.evaluate.prompt
    return {"model": model.name, "prompt": prompt, "max_tokens": tokens, "temperature": 0}


def _stroke(model: str) -> dict[str, Any]:
    """A bright vertical line on black, which any image classifier can look at."""
    rows = [[255 if 14 <= x < 18 and 4 <= y < 28 else 0 for x in range(32)] for y in range(32)]
    return {"model": model, "inputs": [{"pixels": rows}]}
