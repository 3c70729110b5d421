"""Ray Serve's REST API, and asking the service that it runs.

The config goes to the dashboard (`PUT /api/serve/applications/`), whole each time.
"""

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.config import ServeSection
from cluster.errors import PortError, ServingError
from serving.deploy import APPLICATION, serve_config
from serving.models import Served

READY_SECONDS = 300.0
POLL_SECONDS = 0.25
MAX_CAUSE = 400
"""Characters of a replica's explanation that are shown."""
EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt): ")


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
                    + _cure(app)
                )
            time.sleep(POLL_SECONDS)


def _cure(app: Mapping[str, Any]) -> str:
    """What helps where new replicas wait for room that old ones take."""
    for name, deployment in app.get("deployments", {}).items():
        states = {replica["state"] for replica in deployment.get("replicas", ())}
        if {"STARTING", "RUNNING"} <= states:
            return (
                f". New replicas of {name} start beside old ones, which keep answering, and may "
                "lack the room: add some, or take serve.max_surge_percent=0 to stop old ones first"
            )
    return ""


def _settled(app: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether every deployment is healthy with our configuration.

    The status alone is not enough: for a moment after an update it still speaks of what was before.
    """
    deployments = app.get("deployments", {})
    return all(
        deployments.get(wanted["name"], {}).get("status") == "HEALTHY"
        and deployments[wanted["name"]]["deployment_config"]["user_config"]
        == wanted.get("user_config")
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


def call(
    url: str, body: Mapping[str, Any] | None = None, timeout: float = 60.0, key: str | None = None
) -> Any:
    """One request to our own service, past any proxy that the environment names.

    Args:
        key: API key.

    Raises:
        ServingError: with what it answered.
    """
    request = urllib.request.Request(
        url,
        None if body is None else json.dumps(body).encode(),
        {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {}),
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


def wait_for_models(
    url: str, models: Sequence[Served], key: str | None, seconds: float = 30.0
) -> None:
    """Until HTTP itself shows the versions: proxies learn of a new one a moment after Serve.

    Raises:
        ServingError: if it does not.
    """
    wanted = {served.artifact.id for served in models}
    ends = time.monotonic() + seconds
    while True:
        try:
            shown = {card["artifact"] for card in call(f"{url}/v1/models", key=key)["data"]}
        except ServingError:
            if time.monotonic() > ends:
                raise
            shown = set()
        if wanted <= shown:
            return
        if time.monotonic() > ends:
            missing = ", ".join(sorted(wanted - shown))
            raise ServingError(
                f"{url} shows {', '.join(sorted(shown)) or 'none'} and not {missing}"
            )
        time.sleep(POLL_SECONDS)
