"""Serve, driven declaratively: a config in, a running service out.

The config goes to the dashboard's REST API (`PUT /api/serve/applications/`). A model is named in
`user_config` by its version number, so that a new version loads in place; import path, arguments
and code stay the same for the life of the application.
"""

import ipaddress
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from cluster.config import ServeSection
from cluster.errors import ConfigError
from serving.auth import Key, KeyFile, new_key
from serving.models import Served

APPLICATION = "heliostat"
IMPORT_PATH = "serving.app:build"
POLICY = "serving.scaling:ByLoad"
INGRESS, ACCOUNTS = "Ingress", "Accounts"
INGRESS_REQUESTS = 1000
"""Requests that one ingress replica holds; the engines' own bounds refuse long before."""
OPERATOR_SECONDS = 900
"""Life of the key with which a deployment asks its own service."""
METRICS_SECONDS = 1.0
"""Replicas tell how busy they are so often, where their number follows the load."""


@dataclass(frozen=True)
class Shape:
    """What the cluster decides about an application."""

    gpus_per_replica: float = 0
    ingress_replicas: int = 1


def shape(config: ServeSection, *, ours: bool, gpus: int) -> Shape:
    """
    Args:
        ours: whether this is a Ray of our own, on one machine.
        gpus: of the cluster.
    """
    wanted = config.gpus_per_replica
    return Shape(
        wanted if wanted is not None else (1 if gpus else 0),
        config.ingress_replicas or (1 if ours else 2),
    )


def application(
    config: ServeSection,
    store: str,
    models: Sequence[Served],
    shape: Shape,
    *,
    runtime_env: Mapping[str, Any],
    operator: Key | None = None,
) -> dict[str, Any]:
    """The application's part of a Serve config.

    Args:
        store: uri of the storage root.
        operator: the key with which its deployment asks it.
    """
    shared = shape.ingress_replicas > 1
    deployments = [_ingress(config, models, shape, operator)]
    if shared:
        deployments.append(_accounts(config))
    deployments += [_engine(config, served, shape) for served in models]
    return {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "runtime_env": dict(runtime_env),
        "args": {
            "store": store,
            "models": [served.card.id for served in models],
            "shared_accounts": shared,
            "settings": {
                "max_tokens": config.max_tokens,
                "choices": config.max_concurrent,
                "deadline_seconds": config.deadline_seconds,
                "max_body_bytes": config.max_body_bytes,
                "max_requests": INGRESS_REQUESTS,
                "loopback": is_loopback(config.host),
                "quota": {
                    "requests_per_minute": config.requests_per_minute,
                    "tokens_per_minute": config.tokens_per_minute,
                    "concurrent": config.concurrent_per_key,
                },
            },
            "engine": {
                "slots": config.max_concurrent,
                "max_waiting": config.max_waiting,
                "threads": config.threads_per_replica,
                **config.engine.model_dump(),
            },
        },
        "deployments": deployments,
    }


def _shutdown(config: ServeSection) -> dict[str, Any]:
    """A replica that goes finishes what it runs, within the deadline of a request."""
    return {
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": config.deadline_seconds + 5,
    }


def _ingress(
    config: ServeSection, models: Sequence[Served], shape: Shape, operator: Key | None
) -> dict[str, Any]:
    known = operator and {
        "id": operator.id,
        "digest": operator.digest,
        "expires": operator.expires,
    }
    return {
        "name": INGRESS,
        "num_replicas": shape.ingress_replicas,
        # The ingress refuses by itself, in the conventions' shape, before Serve would.
        "max_ongoing_requests": 2 * INGRESS_REQUESTS,
        "max_queued_requests": INGRESS_REQUESTS,
        "backpressure_config": {"status_code": 503, "retry_after_s": 1},
        "max_surge_percent": config.max_surge_percent,
        "ray_actor_options": {"num_cpus": 0},
        "user_config": {
            "models": [asdict(served.card) for served in models],
            "operator": known,
        },
        **_shutdown(config),
    }


def _accounts(config: ServeSection) -> dict[str, Any]:
    """One replica, because it is the one place where keys' use is written down."""
    return {
        "name": ACCOUNTS,
        "num_replicas": 1,
        "max_ongoing_requests": 2 * INGRESS_REQUESTS,
        "max_surge_percent": config.max_surge_percent,
        "ray_actor_options": {"num_cpus": 0},
        **_shutdown(config),
    }


def _engine(config: ServeSection, served: Served, shape: Shape) -> dict[str, Any]:
    capacity = config.max_concurrent + config.max_waiting
    return {
        "name": served.card.id,
        **_replicas(config),
        # The engine refuses by itself, at once; calls beyond a bound of Serve's would wait in front
        # of it, to be refused after all.
        "max_ongoing_requests": INGRESS_REQUESTS,
        "max_queued_requests": config.most_replicas * capacity + config.max_concurrent,
        "max_constructor_retry_count": 2,
        "max_surge_percent": config.max_surge_percent,
        # A replica that was killed is missed within seconds.
        "health_check_period_s": 2,
        "ray_actor_options": {
            "num_cpus": config.threads_per_replica,
            "num_gpus": shape.gpus_per_replica,
        },
        "user_config": {"model": served.artifact.id},
        **_shutdown(config),
    }


def _replicas(config: ServeSection) -> dict[str, Any]:
    if isinstance(config.replicas, int):
        return {"num_replicas": config.replicas}
    least, most = config.replicas
    policy = {
        "policy_function": POLICY,
        "policy_kwargs": {"target_tokens": config.target_tokens},
    }
    return {
        "autoscaling_config": {
            **({"policy": policy} if config.target_tokens else {}),
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": max(1.0, config.target_load * config.max_concurrent),
            "metrics_interval_s": METRICS_SECONDS,
            "look_back_period_s": max(METRICS_SECONDS, config.upscale_seconds),
            "upscale_delay_s": config.upscale_seconds,
            "downscale_delay_s": config.downscale_seconds,
        }
    }


def serve_config(
    config: ServeSection, ours: Mapping[str, Any], others: list[dict[str, Any]]
) -> dict[str, Any]:
    """The whole Serve config. A PUT replaces everything: `others` are kept by repeating them."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.host, "port": config.port},
        # Lines of JSON, of which our own name each request; none holds what was said in it.
        "logging_config": {"enable_access_log": False, "encoding": "JSON"},
        "applications": [*others, dict(ours)],
    }


HEAD = """\
# Written by `heliostat serve --write-config`. On a cluster that has Heliostat installed:
#   serve deploy THIS_FILE
# For HAProxy (its binary, in Ray's wheel, is GPLv2), start every node with
#   RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1
#   RAY_SERVE_HAPROXY_BINARY_PATH=PATH_OF_THE_COMMAND_heliostat-haproxy
#   RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serving.border:middlewares
# and with RAY_worker_niceness=5, so that what takes calls in goes before what computes.
# A newer model loads in place: change its version in both user_configs.
"""


def as_yaml(tree: Mapping[str, Any]) -> str:
    """For `serve deploy`, with a head that says how."""
    return HEAD + yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_guarded(config: ServeSection, keys: KeyFile) -> bool:
    """Whether the service has keys.

    Raises:
        ConfigError: where it has none, or none that is valid, and is to be open to the network.
    """
    found = keys.read()
    if is_loopback(config.host) or (found and any(k.state(time.time()) == "valid" for k in found)):
        return found is not None
    raise ConfigError(
        f"serve.host {config.host} opens the service to the network and {keys.place} holds no "
        "valid key: make one with `heliostat keys create NAME`, or take serve.host=127.0.0.1"
    )


def operator_key() -> tuple[str, Key]:
    """A key for the deployment itself, which nobody stores."""
    expires = int(time.time()) + OPERATOR_SECONDS
    return new_key("operator", expires=expires)
