"""Serve, driven declaratively: a config in, a running service out.

The config goes to the dashboard's REST API (`PUT /api/serve/applications/`). A model is named in
`user_config` by its version number, so that a new version loads in place; import path, arguments
and code stay the same for the life of the application.
"""

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from cluster.config import ServeSection
from cluster.errors import PortError, ServingError
from cluster.storage import Artifact
from pipelines import families
from serving.schema import ModelCard

APPLICATION = "heliostat"
IMPORT_PATH = "serving.app:build"
INGRESS = "Ingress"
READY_SECONDS = 300.0
POLL_SECONDS = 0.25
MAX_CAUSE = 400
"""Characters of a replica's explanation that are shown."""
EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt): ")
INGRESS_REQUESTS = 1000
"""Requests that one ingress replica holds; the engines' own bounds refuse long before."""


def card(model: Artifact) -> ModelCard:
    manifest = model.manifest
    return ModelCard(
        id=model.name,
        artifact=model.id,
        created=int(datetime.fromisoformat(manifest.created).timestamp()),
        route=families.load(manifest.detail["family"]).route,
        context_length=manifest.detail.get("context_length"),
    )


def application(
    config: ServeSection, model: Artifact, *, gpus: bool, runtime_env: Mapping[str, Any]
) -> dict[str, Any]:
    """The application's part of a Serve config."""
    capacity = config.max_concurrent + config.max_waiting
    shutdown = {
        # A replica that goes finishes what it runs, within the deadline of a request.
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": config.deadline_seconds,
    }
    return {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "runtime_env": dict(runtime_env),
        "args": {
            "store": model.store.uri,
            "models": [model.name],
            "limits": {
                "max_tokens": config.max_tokens,
                "choices": config.max_concurrent,
                "deadline_seconds": config.deadline_seconds,
            },
            "engine": {
                "slots": config.max_concurrent,
                "max_waiting": config.max_waiting,
                "threads": config.threads_per_replica,
                **config.engine.model_dump(),
            },
        },
        "deployments": [
            {
                "name": INGRESS,
                "num_replicas": 1,
                "max_ongoing_requests": INGRESS_REQUESTS,
                "ray_actor_options": {"num_cpus": 0},
                "user_config": {"models": [card(model).__dict__]},
                **shutdown,
            },
            {
                "name": model.name,
                "num_replicas": config.replicas,
                # The engine refuses by itself; Serve must not queue in front of it unseen.
                "max_ongoing_requests": capacity + config.max_concurrent,
                "max_queued_requests": config.replicas * capacity + config.max_concurrent,
                "max_constructor_retry_count": 2,
                "ray_actor_options": {
                    "num_cpus": config.threads_per_replica,
                    "num_gpus": 1 if gpus else 0,
                },
                "user_config": {"model": model.id},
                **shutdown,
            },
        ],
    }


def serve_config(
    config: ServeSection, ours: Mapping[str, Any], others: list[dict[str, Any]]
) -> dict[str, Any]:
    """The whole Serve config. A PUT replaces everything: `others` are kept by repeating them."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.host, "port": config.port},
        "logging_config": {"enable_access_log": False},
        "applications": [*others, dict(ours)],
    }


class Serve:
    """The REST API of one cluster's Serve.

    Args:
        dashboard: `host:port` of Ray's dashboard.
    """

    def __init__(self, dashboard: str) -> None:
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        try:
            self._client = ServeSubmissionClient(f"http://{dashboard}")
        except (ConnectionError, RuntimeError) as error:
            raise ServingError(
                f"Ray's dashboard at {dashboard} cannot be reached: {error}"
            ) from None

    def deploy(self, config: ServeSection, ours: Mapping[str, Any]) -> None:
        """
        Raises:
            PortError: if Serve runs on this cluster already and listens elsewhere.
            ServingError: if it refuses the config.
        """
        details = self._client.get_serve_details()
        _check_listening(details, config)
        others = [
            app["deployed_app_config"]
            for name, app in details.get("applications", {}).items()
            if name != APPLICATION and app.get("deployed_app_config")
        ]
        try:
            self._client.deploy_applications(serve_config(config, ours, others))
        except RuntimeError as error:
            raise ServingError(f"Ray Serve refused the application: {error}") from None

    def wait(self, ours: Mapping[str, Any], seconds: float = READY_SECONDS) -> None:
        """Until the application runs as deployed.

        Raises:
            ServingError: with the reason that its replicas give.
        """
        ends = time.monotonic() + seconds
        while True:
            app = self._client.get_serve_details()["applications"].get(APPLICATION, {})
            status = app.get("status", "NOT_STARTED")
            if status == "RUNNING" and _settled(app, ours):
                return
            if status in {"DEPLOY_FAILED", "UNHEALTHY"}:
                raise ServingError(f"the service did not come up: {failure(app)}")
            if time.monotonic() > ends:
                raise ServingError(
                    f"the service is still {status} after {seconds:.0f} s: {failure(app)}"
                )
            time.sleep(POLL_SECONDS)


def _settled(app: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether every deployment is healthy with our configuration.

    The status alone is not enough: for a moment after an update it still speaks of what was before.
    """
    deployments = app.get("deployments", {})
    return all(
        deployments.get(wanted["name"], {}).get("status") == "HEALTHY"
        and deployments[wanted["name"]]["deployment_config"]["user_config"] == wanted["user_config"]
        for wanted in ours["deployments"]
    )


def failure(app: Mapping[str, Any]) -> str:
    """What each deployment that is not healthy says, in a line."""
    reasons = [
        f"{name}: {cause(deployment['message'])}"
        for name, deployment in app.get("deployments", {}).items()
        if deployment.get("status") != "HEALTHY" and deployment.get("message", "").strip()
    ]
    fallback = cause(str(app.get("message", ""))) or "no reason was given"
    return "; ".join(reasons) or fallback


def cause(message: str) -> str:
    """The last exception of a traceback with its explanation, or the message itself; one line."""
    lines = message.strip().splitlines()
    starts = [at for at, line in enumerate(lines) if EXCEPTION.match(line)]
    return " ".join(" ".join(lines[starts[-1] if starts else 0 :]).split())[:MAX_CAUSE]


def _check_listening(details: Mapping[str, Any], config: ServeSection) -> None:
    """Serve takes its address when it first starts; a later one would be ignored in silence."""
    options = details.get("http_options") or {}
    if not details.get("controller_info", {}).get("node_id"):
        return
    running = (options.get("host"), options.get("port"))
    if running != (config.host, config.port):
        raise PortError(
            f"Serve runs on this cluster already, on {running[0]}:{running[1]}: take "
            f"serve.host={running[0]} serve.port={running[1]}, or end it with `serve shutdown`"
        )


def url_of(config: ServeSection) -> str:
    """Where a client on this machine finds the service."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    host = everywhere.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def call(url: str, body: Mapping[str, Any] | None = None, timeout: float = 60.0) -> Any:
    """One request to our own service, past any proxy that the environment names.

    Raises:
        ServingError: with what it answered.
    """
    request = urllib.request.Request(
        url,
        None if body is None else json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")[:500]
        raise ServingError(f"{url} answered {error.code}: {text}") from None
    except (OSError, ValueError) as error:
        raise ServingError(f"{url} did not answer: {error}") from None


def wait_for_model(url: str, model: Artifact, seconds: float = 30.0) -> None:
    """Until HTTP itself shows the version: proxies learn of a new one a moment after Serve.

    Raises:
        ServingError: if it does not.
    """
    ends = time.monotonic() + seconds
    while True:
        try:
            served = [card["artifact"] for card in call(f"{url}/v1/models")["data"]]
        except ServingError:
            if time.monotonic() > ends:
                raise
            served = []
        if model.id in served:
            return
        if time.monotonic() > ends:
            raise ServingError(f"{url} shows {', '.join(served)} and not {model.id}")
        time.sleep(POLL_SECONDS)
